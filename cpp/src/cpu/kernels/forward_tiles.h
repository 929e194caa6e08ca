// Forward attention of bfloat16 on a matrix unit: forward.h with products of tiles.
#pragma once

#include "../tile/tiles.h"
#include "forward.h"

namespace attncore {

/// The unit is configured once a task; few rows, which read keys in place, do without it.
template <class Isa>
void forward_in_tiles(const Call& call, const Task& task, std::byte* scratch) noexcept {
  if (reads_in_place<Isa, float>(call, task.sequence)) {
    return forward_task<Isa, float, Bf16Pair>(call, task, scratch);
  }
  TileUnit<Isa>::configure();
  forward_task<Isa, float, Bf16Pair>(call, task, scratch);
  TileUnit<Isa>::release();
}

/// The peak of a core, as probe.h's multiply_adds: `rounds` rounds of 2 × 2 products, read from the first cache.
template <class Isa>
double multiply_tile_rounds(Index rounds) noexcept {
  constexpr Bf16Pair kFactor = 0x3f7f3f7f;  // 255/256 twice: zeros would cost less power than data does
  constexpr Index kSteps = 8, kDepth = kSteps * kTileDepth;
  alignas(64) Bf16Pair a[2 * kTileRows * kDepth], b[kDepth * 2 * kTileColumns];
  for (Bf16Pair& pair : a) pair = kFactor;
  for (Bf16Pair& pair : b) pair = kFactor;
  TileBuffers buffers;
  TileUnit<Isa>::configure();
  for (Index round = 0; round < rounds; round += kSteps) {
    multiply_tiles<Isa, 2, 2>({a, kDepth}, {b, 2 * kTileColumns}, 2 * kTileRows, kDepth, 0, buffers);
  }
  TileUnit<Isa>::release();
  constexpr Index kRound = 4 * kTileRows * kTileDepth * kTileColumns;  // pairs
  return 2.0 * 2.0 * kRound * static_cast<double>(round_up(rounds, kSteps));
}

/// What forward calls, for an ISA with a matrix unit; the rest is forward_kernels'.
template <class Isa>
constexpr Kernels tile_kernels(Kernels kernels) noexcept {
  kernels.row_block = kTileRows;
  kernels.forward = forward_in_tiles<Isa>;
  kernels.multiply_adds = multiply_tile_rounds<Isa>;
  return kernels;
}

}  // namespace attncore
