// The scratch memory of a call, and the threads that it may use.
#pragma once

#include <algorithm>
#include <string>

#include "../call.h"
#include "../parallel.h"
#include "../require.h"

namespace attncore {

inline constexpr std::size_t kKeptBytes = std::size_t{4} << 20U;  // of workspace, between calls

/// The workspace of a call: the caller's, else the calling thread's own, else (Options::cancelled may call the library
/// while the thread's is in use) one for this call.
class Memory {
 public:
  Memory(const Options& options, Index bytes) {
    thread_local Own own;
    if (options.workspace == nullptr && !own.in_use) own_ = &own;
    Workspace& workspace = own_ != nullptr                ? own_->workspace
                           : options.workspace != nullptr ? *options.workspace
                                                          : spare_;
    data_ = workspace.reserve(static_cast<std::size_t>(bytes));
    if (own_ != nullptr) own_->in_use = true;
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    if (own_ == nullptr) return;
    own_->workspace.trim(kKeptBytes);
    own_->in_use = false;
  }
  std::byte* take(Index bytes) noexcept {
    std::byte* const taken = data_;
    data_ += bytes;
    return taken;
  }

 private:
  struct Own {
    Workspace workspace;
    bool in_use = false;
  };
  Own* own_ = nullptr;
  Workspace spare_;
  std::byte* data_;
};

inline int threads_of(const Options& options) {
  if (options.num_threads < 0)
    reject("num_threads", "is " + std::to_string(options.num_threads) + ", must be at least 0");
  return options.num_threads > 0 ? std::min(options.num_threads, kMostThreads) : get_num_threads();
}

/// Threads worth waking for so many multiply-adds: some microseconds of work each.
inline int worthwhile_threads(double products, Index tasks, const Options& options) {
  const double worth = std::min(4e-6 * products, static_cast<double>(tasks));
  return std::clamp(static_cast<int>(std::min(worth, 1e6)), 1, threads_of(options));
}

}  // namespace attncore
