// A crew runs numbered tasks on threads: claimed from one counter, or from one a thread if they don't wait for each other; with waits
// that cannot lock up and a way to stop.
#pragma once

#include <atomic>
#include <exception>
#include <thread>

#include "../parallel.h"
#include "kernels/kernels.h"
#include "shares.h"

namespace attncore {

class Crew {
 public:
  Crew(int threads, const Options& options) : threads_(threads), options_(options) {}

  /// run(task, thread) for each task 0 … tasks − 1, in this order of claiming.  Throws what
  /// Options::cancelled threw, or Cancelled if it said so.
  template <class Run>
  void run(Index tasks, Run run) {
    std::atomic<Index> next{0};
    run_claimed(tasks, [&](int) { return next++; }, run);
  }

  /// The same for tasks that don't wait for each other.
  template <class Run>
  void run_shares(Index tasks, Run run) {
    if (threads_ == 1) return this->run(tasks, run);
    Shares shares(tasks, threads_);
    run_claimed(tasks, [&](int thread) { return shares.claim(thread); }, run);
  }

  /// Whether the call was cancelled.  The caller's thread asks; the others learn it here.
  bool poll(int thread) noexcept {
    if (thread == 0 && options_.cancelled && !stopped_) {
      try {
        if (options_.cancelled()) stopped_ = true;
      } catch (...) {
        error_ = std::current_exception();
        stopped_ = true;
      }
    }
    return stopped_.load(std::memory_order_relaxed);
  }

  /// For a kernel to ask.
  [[nodiscard]] Poll poll_for(int thread) noexcept {
    return {[](void* crew, int by) { return static_cast<Crew*>(crew)->poll(by); }, this, thread};
  }

  /// Waits for what a task claimed earlier will bring about.  False: the call was cancelled meanwhile.
  template <class Condition>
  bool wait(int thread, Condition condition) noexcept {
    constexpr int kSpins = 2000;  // some 50 µs, then the core is left to others
    for (int spin = 0; !condition(); ++spin) {
      if (poll(thread)) return false;
      if (spin < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
    return true;
  }

 private:
  template <class Claim, class Run>
  void run_claimed(Index tasks, Claim claim, Run run) {
    if (threads_ == 1) {
      for (Index task = 0; task < tasks && !poll(0); ++task) run(task, 0);
    } else {
      share(tasks, claim, run);
    }
    if (error_) std::rethrow_exception(error_);
    if (stopped_) throw Cancelled();
  }

  template <class Claim, class Run>
  void share(Index tasks, Claim claim, Run run) {
    std::atomic<Index> done{0};
    parallel(threads_, [&](int thread) {
      Index own = 0;  // counted together in the end: a line takes some 100 ns from core to core
      for (Index task = claim(thread); task < tasks && !poll(thread); task = claim(thread), ++own)
        run(task, thread);
      done += own;
      if (thread == 0 && options_.cancelled) wait(thread, [&] { return done == tasks; });  // and go on asking
    });
  }

  static void pause() noexcept {
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
  }

  int threads_;
  const Options& options_;
  std::atomic<bool> stopped_{false};
  std::exception_ptr error_;
};

/// A counter in memory that the workspace gives; what was written before `set` or `count_down` is seen after
/// `get`.
class Counter {
 public:
  explicit Counter(std::int32_t& value) noexcept : value_(value) {}
  [[nodiscard]] Index get() const noexcept { return value_.load(std::memory_order_acquire); }
  void set(Index value) noexcept {
    value_.store(static_cast<std::int32_t>(value), std::memory_order_release);
  }
  /// What is left.
  Index count_down() noexcept { return value_.fetch_sub(1, std::memory_order_acq_rel) - 1; }

 private:
  std::atomic_ref<std::int32_t> value_;
};

}  // namespace attncore
