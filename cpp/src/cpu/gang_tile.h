// One tile of keys for all tasks of a gang, in as few products as there is room for.
#pragma once

#include "kernels/kernels.h"

namespace attncore {

class GangTile {
 public:
  /// `heads`: the gang is KV heads, all of which are one product; else sequences.
  GangTile(const Call& call, const Kernels& kernels, bool heads, std::byte* scratch) noexcept
      : call_(call), kernels_(kernels), heads_(heads), scratch_(scratch) {}

  void add(const Task& task) noexcept {
    const Index rows = task.rows.size();
    if (!heads_ && (count_ == kMostGangTasks || rows_ + rows > kernels_.gang_rows)) run();
    tasks_[count_] = task;
    tasks_[count_++].in_gang = !heads_;
    rows_ += rows;
  }
  void run() noexcept {
    if (count_ > 0) kernels_.forward_gang(call_, tasks_, count_, scratch_);
    count_ = rows_ = 0;
  }

 private:
  const Call& call_;
  const Kernels& kernels_;
  const bool heads_;
  std::byte* const scratch_;
  Task tasks_[kMostGangHeads];
  Index count_ = 0, rows_ = 0;
};

}  // namespace attncore
