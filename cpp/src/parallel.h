// The one place where threads come from: OpenMP where it was built in, else std::thread.
#pragma once

#include <functional>

namespace attncore {

inline constexpr int kMostThreads = 1024;  // what is asked for beyond that counts as that

/// Runs run(0) … run(threads − 1), run(0) on the caller's thread, and returns when all have.  There may be
/// fewer: runs must share their work by claiming it, and none may wait for one that has not begun.
void parallel(int threads, const std::function<void(int)>& run);

/// "OpenMP" or "std::thread".
[[nodiscard]] const char* parallel_kind() noexcept;

}  // namespace attncore
