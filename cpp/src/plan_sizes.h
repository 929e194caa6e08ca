// The pieces that plans are made of.
#pragma once

#include "cpu/kernels/kernels.h"

namespace attncore {

// What bits depend on is a function of the sequence, head group, dims, dtype and ISA only.
inline constexpr Index kSplitRows =
    32;  // at most so many rows of a sequence and KV head: their keys are split
inline constexpr Index kPartKeys = 1024;  // keys of a part, at least

inline constexpr Index kStateBytes = Index{2}
                                     << 20;  // of states that wait, a thread, in two sections or more

struct PlanSizes {
  Index tile_rows;   // of a row tile, at most
  Index block_keys;  // of a super-block
  Index most_parts;  // that a sequence's keys are split into
  Index step;        // of part_keys

  PlanSizes(const Call& call, const Kernels& kernels);

  /// Of a part of the sequence's keys: bits depend on it.
  [[nodiscard]] Index part_keys(const Sequence& sequence) const noexcept;
};

}  // namespace attncore
