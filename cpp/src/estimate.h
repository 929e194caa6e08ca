// How long a call will take: some of its own tasks are run and timed, without results.
#pragma once

#include "plan.h"

namespace attncore {

struct Estimate {
  double kernel_seconds = 0;   // of all tasks, one after another
  double longest_seconds = 0;  // of the longest task
};

/// Takes some milliseconds; reads the operands, writes nothing of the caller's.
[[nodiscard]] Estimate estimate(const Call& call, const Plan& plan);

}  // namespace attncore
