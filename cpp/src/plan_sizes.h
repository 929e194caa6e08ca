// The pieces that plans are made of.
#pragma once

#include "cpu/kernels/kernels.h"

namespace attncore {

// What bits depend on is a function of the sequence, head group, dims, dtype and ISA only.
inline constexpr Index kSplitRows =
    32;  // at most so many rows of a sequence and KV head: their keys are split
inline constexpr Index kPartKeys = 1024;  // keys of a part, at least

inline constexpr Index kShortBytes = 8 << 10;  // of keys and values
inline constexpr Index kStateBytes = Index{2}
                                     << 20;  // of states that wait, a thread, in two sections or more

struct PlanSizes {
  Index tile_rows;   // of a row tile, at most
  Index block_keys;  // of a super-block
  Index most_parts;  // that a sequence's keys are split into
  Index step;        // of part_keys
  Index key_tile;    // keys of a panel
  Index panel;       // its bytes
  Index key_bytes;   // of a key and its value

  PlanSizes(const Call& call, const Kernels& kernels);

  /// Whether a section of several row tiles that sees so many keys can be alone: their panels stay in a thread's L2.
  [[nodiscard]] bool panels_fit(Index keys, int threads) const noexcept;
  /// Whether one of a single row tile can: it is read soon enough to be fetched while the one before it is at work.
  [[nodiscard]] bool is_short(Index keys) const noexcept { return keys * key_bytes <= kShortBytes; }

  /// Of a part of the sequence's keys: bits depend on it.
  [[nodiscard]] Index part_keys(const Sequence& sequence) const noexcept;
};

}  // namespace attncore
