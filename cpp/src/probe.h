// Estimates of what the machine reaches, for explain(): cheap, where fma_peak() and read_bandwidth() are thorough.
#pragma once

#include "cpu/dispatch.h"

namespace attncore {

/// Multiply-adds a second of so many threads: of one, the best of several short tries (a team's tries would measure
/// how it wakes up), times their number.
[[nodiscard]] double estimated_peak(const Kernels& kernels, int threads);

/// Bytes a second that so many threads read from memory, measured once a process.
[[nodiscard]] double estimated_bandwidth(int threads);

/// Seconds that so many threads take to begin and to end.
[[nodiscard]] double estimated_wait(int threads);

}  // namespace attncore
