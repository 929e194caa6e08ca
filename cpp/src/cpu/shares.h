// Which thread begins with which of tasks that don't wait for each other.
#pragma once

#include <algorithm>
#include <atomic>
#include <attncore/attncore.hpp>
#include <bit>
#include <vector>

namespace attncore {

/// Each thread's share are runs of tasks, every threads-th one, the same in each call: what a core fetches ahead is mostly its own, what
/// it read in the last call may still be in its cache, and where tasks become smaller, as sequences do, all shares have as much of each.
/// Who is done helps the others.
class Shares {
 public:
  Shares(Index tasks, int threads)
      : tasks_(tasks),
        run_bits_(
            std::bit_width(static_cast<unsigned>(std::min(tasks / (kRunsOfThread * threads), kMostRun)) | 1) -
            1),
        next_(static_cast<std::size_t>(threads)) {}

  /// The next task for this thread; any number past the last one if there is none.
  Index claim(int thread) noexcept {
    const int threads = static_cast<int>(next_.size());
    for (int i = 0; i < threads; ++i) {
      const int owner = thread + i < threads ? thread + i : thread + i - threads;
      std::atomic<Index>& next = next_[static_cast<std::size_t>(owner)].value;
      if (task(owner, next.load(std::memory_order_relaxed)) >= tasks_) continue;
      if (const Index claimed = task(owner, next++); claimed < tasks_) return claimed;
    }
    return tasks_;
  }

 private:
  static constexpr Index kMostRun = 16, kRunsOfThread = 8;
  struct alignas(64) Next {
    std::atomic<Index> value{0};
  };

  /// Of an owner's tasks the i-th; they rise with i.
  [[nodiscard]] Index task(int owner, Index i) const noexcept {
    const auto threads = static_cast<Index>(next_.size());
    const Index run = i >> run_bits_;
    return ((run * threads + owner) << run_bits_) + i - (run << run_bits_);
  }

  const Index tasks_;
  const int run_bits_;  // a run is 2^run_bits_ tasks
  std::vector<Next> next_;
};

}  // namespace attncore
