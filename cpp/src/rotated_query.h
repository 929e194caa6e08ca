// The queries of a cache's call, rotated as its keys are.
#pragma once

#include "cache_call.h"

namespace attncore {

/// forward() of a whole problem, whose queries turn by the positions of their tokens: the last new one stands at its entry's
/// last, and one of a tree as many steps past the tokens before it as it has ancestors.
void forward_rotated(const Problem& problem, const CacheSettings& settings, const Options& options);

}  // namespace attncore
