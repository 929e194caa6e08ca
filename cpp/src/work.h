// How much there is to do: what plans and explain() go by.
#pragma once

#include "call.h"

namespace attncore {

struct Work {
  double flops = 0, bytes = 0;  // of the pairs that can be seen; of the operands
};
[[nodiscard]] Work work_of(const Call& call);

/// (query, key) pairs of one head that the window and the lengths leave, to the accuracy of 64 bands of rows; segments in their order to
/// the last one.
[[nodiscard]] double visible_pairs(const Call& call, const Sequence& sequence);

/// The batch, so that no long sequence is left for the end.
[[nodiscard]] std::vector<Sequence> longest_first(const Call& call);

}  // namespace attncore
