// How long a call will take, for explain().
#pragma once

#include "plan.h"

namespace attncore {

/// Seconds that the plan's tasks take its threads: a row tile against some key tiles is timed, on the caller's own arrays, and
/// counted as often as the plan has it.  Takes some milliseconds; writes nothing but memory of its own.
[[nodiscard]] double estimated_compute_seconds(const Call& call, const Plan& plan);

}  // namespace attncore
