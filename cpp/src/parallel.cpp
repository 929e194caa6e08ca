#include "parallel.h"

#include <pthread.h>
#ifdef ATTNCORE_OPENMP
#include <omp.h>
#endif

#include <atomic>
#include <mutex>
#include <thread>
#include <vector>

namespace attncore {
namespace {

void run_on_new_threads(int threads, const std::function<void(int)>& run) {
  std::vector<std::jthread> team;  // whose end waits for theirs
  team.reserve(static_cast<std::size_t>(threads));
  try {
    for (int thread = 1; thread < threads; ++thread) team.emplace_back(std::cref(run), thread);
  } catch (...) {
    // No more threads are to be had: those that began, and the caller, do all the work.
  }
  run(0);
}

#ifdef ATTNCORE_OPENMP
// libgomp's team does not survive fork(), and a child that opens a region would wait for it forever.
std::atomic<bool> forked{false};
[[maybe_unused]] const int kForkHandler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

void run_region(int threads, const std::function<void(int)>& run) {
#pragma omp parallel num_threads(threads)
  run(omp_get_thread_num());  // the caller is 0, and a number stays with its thread
}

/// Whether there is a team of so many threads: libgomp ends the process when it cannot start one.  Each calling thread has a
/// team of its own there; when it grows, others wait, so that what the trial has found is still there for libgomp.
bool team_may_be(int threads) {
  thread_local int largest = 1;
  if (threads <= largest) return true;
  static std::mutex growing;
  const std::lock_guard one_at_a_time(growing);
  std::atomic<int> begun{1};
  run_on_new_threads(threads, [&](int thread) { begun += thread > 0 ? 1 : 0; });
  if (begun < threads) return false;
  run_region(threads, [](int) {});
  largest = threads;
  return true;
}

void run_on_team(int threads, const std::function<void(int)>& run) {
  if (forked || !team_may_be(threads)) return run_on_new_threads(threads, run);
  run_region(threads, run);
}
#else
void run_on_team(int threads, const std::function<void(int)>& run) { run_on_new_threads(threads, run); }
#endif

}  // namespace

void parallel(int threads, const std::function<void(int)>& run) {
  if (threads <= 1) return run(0);
  run_on_team(threads, run);
}

const char* parallel_kind() noexcept {
#ifdef ATTNCORE_OPENMP
  return "OpenMP";
#else
  return "std::thread";
#endif
}

}  // namespace attncore
