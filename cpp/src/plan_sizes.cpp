#include "plan_sizes.h"

namespace attncore {
namespace {

constexpr Index kScratchBytes = 200 << 10;     // of a tile: its queries, scores and output stay in L2
constexpr Index kBlockKeys = 512;              // of a super-block, at most
constexpr Index kBlockBytes = Index{8} << 20;  // of a super-block, at most
constexpr Index kMostParts = 32;
constexpr Index kAloneBytes = 512 << 10;          // of the panels of a section that is alone: they stay in L2
constexpr Index kAllAloneBytes = Index{8} << 20;  // of all threads' such panels

Index tile_rows(const Call& call, const Kernels& kernels) {
  Index rows = kernels.most_rows;
  for (; rows > kernels.row_block; rows -= kernels.row_block) {
    const Sizes sizes = kernels.sizes(call, rows);
    if (sizes.scratch + sizes.state <= kScratchBytes) break;
  }
  return rows;
}

Index block_keys(const Call& call, const Kernels& kernels) {
  const Index panels = kBlockBytes / kernels.sizes(call, 0).panel;
  return max(1, min(panels, kBlockKeys / kernels.key_tile)) * kernels.key_tile;
}

/// Bits depend on it.  Whether states are double is a matter of the longest entry, and of padding: here they always are.
Index most_parts(const Call& call, const Kernels& kernels) {
  const Index state = kernels.sizes(call, kSplitRows).state * (call.keys > kFoldKeys ? 1 : 2);
  return max(1, min(kMostParts, kStateBytes / state));
}

}  // namespace

PlanSizes::PlanSizes(const Call& call, const Kernels& kernels)
    : tile_rows(attncore::tile_rows(call, kernels)),
      block_keys(attncore::block_keys(call, kernels)),
      most_parts(attncore::most_parts(call, kernels)),
      step(round_up(kPartKeys, kernels.key_tile)),
      key_tile(kernels.key_tile),
      panel(kernels.sizes(call, 0).panel),
      key_bytes(call.dim * item_size(call.key.dtype) + call.value_dim * item_size(call.value.dtype)) {}

bool PlanSizes::panels_fit(Index keys, int threads) const noexcept {
  return keys <= block_keys && ceil_div(keys, key_tile) * panel <= min(kAloneBytes, kAllAloneBytes / threads);
}

Index PlanSizes::part_keys(const Sequence& sequence) const noexcept {
  Index keys = step;  // times a power of two, so that sequences share parts
  while (ceil_div(sequence.keys, keys) > most_parts) keys *= 2;
  return keys;
}

}  // namespace attncore
