// Forward attention on a matrix unit: forward.h with products of tiles.
#pragma once

#include "forward_pipeline.h"
#include "forward_task.h"

namespace attncore {

/// What forward calls for few rows, which read keys in place: the handful do without the unit, which is configured once for the others.
template <class Isa>
struct UnsplitRows {
  static constexpr Index kGangRows = kMostDirectRows<Isa, Bf16Pair>;
  static constexpr auto reads_in_place = attncore::reads_in_place<Isa, float, Bf16Pair>;
  // A function of its own: inlined, its release is joined with the caller's, and nobody can count that each follows a configure.
  [[gnu::noinline]] static void forward(const Call& call, const Task& task, std::byte* scratch) noexcept {
    const bool grouped = groups_rows<Isa, float>(call, task.sequence);
    if (grouped) TileUnit<Isa>::configure();
    forward_task<Isa, float, Bf16Pair>(call, task, scratch);
    if (grouped) TileUnit<Isa>::release();
  }
  static void forward_gang(const Call& call, const Task* tasks, Index count, std::byte* scratch) noexcept {
    bool grouped = false;
    for (Index i = 0; i < count; ++i) grouped |= groups_rows<Isa, float>(call, tasks[i].sequence);
    if (grouped) TileUnit<Isa>::configure();
    attncore::forward_gang<Isa, float, Bf16Pair>(call, tasks, count, scratch);
    if (grouped) TileUnit<Isa>::release();
  }
};

/// The unit is configured once a task.
template <class Isa, class Item, class Few>
void forward_in_tiles(const Call& call, const Task& task, std::byte* scratch) noexcept {
  if (Few::reads_in_place(call, task.sequence)) return Few::forward(call, task, scratch);
  TileUnit<Isa>::configure(task.rows.size());
  ForwardPipeline<Isa, Item>(call, task, scratch).run();
  TileUnit<Isa>::release();
}

/// The peak of a core, as probe.h's multiply_adds: `rounds` rounds of 2 × 2 products of items, read from the first cache.
template <class Isa, class Item>
double multiply_tile_rounds(Index rounds) noexcept {
  constexpr Bf16Pair kFactor = 0x3f7f3f7f;  // 255/256 twice: zeros would cost less power than data does
  constexpr Index kSteps = kSplit<Item> ? 2 : 8, kDepth = kSteps * kParts<Item> * kTileDepth;
  alignas(64) Bf16Pair a[2 * kTileRows * kDepth], b[kDepth * 2 * kTileColumns];
  for (Bf16Pair& pair : a) pair = kFactor;
  for (Bf16Pair& pair : b) pair = kFactor;
  alignas(64) float sums[2 * kTileRows * 2 * kTileColumns];
  const SumTiles block{sums, 2 * kTileColumns, true, true};
  auto between = [] {};
  TileStream<Isa> stream;
  TileUnit<Isa>::configure();
  for (Index round = 0; round < rounds; round += kSteps) {
    stream.template multiply<Item>({a, kDepth}, {b, 2 * kTileColumns}, kSteps, block, false, between);
  }
  stream.flush();
  TileUnit<Isa>::release();
  constexpr Index kRound = 4 * kTileRows * kTileDepth * kTileColumns;  // pairs, whatever their parts
  return 2.0 * 2.0 * kRound * static_cast<double>(round_up(rounds, kSteps));
}

/// What forward calls, for an ISA with a matrix unit; the rest is `kernels`, those of pairs.  Tasks are of so few rows that the
/// first cache holds their scores, which the unit stores: into the second it takes twice as long (measured on Sapphire Rapids).
template <class Isa, class Item, class Few = UnsplitRows<Isa>>
constexpr Kernels tile_kernels(const char* name, Kernels kernels) noexcept {
  kernels.name = name;
  kernels.row_block = kTileRows;
  kernels.most_rows = 2 * kTileRows;
  kernels.sizes = PipelineScratch<Isa, Item>::sizes;
  kernels.gang_rows = Few::kGangRows;
  kernels.reads_in_place = Few::reads_in_place;
  kernels.pack = pack_key_tile<Isa, float, Item>;
  kernels.forward = forward_in_tiles<Isa, Item, Few>;
  kernels.forward_gang = Few::forward_gang;
  kernels.multiply_adds = multiply_tile_rounds<Isa, Item>;
  return kernels;
}

}  // namespace attncore
