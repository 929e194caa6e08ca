// What forward_pipeline.h works in.
#pragma once

#include "../tile/sums_apart.h"
#include "../tile/tile_weights.h"
#include "forward.h"

namespace attncore {

template <class Isa, class Item>
struct PipelineScratch {
  /// Few rows': theirs are not split.
  using General = Scratch<Isa, float, std::conditional_t<kSplit<Item>, float, Item>>;

  Matrix<float> queries;    // (rows, dim), in pairs or parts
  Matrix<float> scores[2];  // (rows, chunk), and the weights over them
  float* keep[2];           // (rows)
  float* sums;              // 2 × 2 tiles (sums_apart.h)
  std::uint32_t* harmed;    // (rows), of queries in parts: whether a split would harm it (parts.h)
  std::byte* panel;         // one key tile, where panels are not shared

  /// Of scores, or of three parts of weights, which take half as much again.  An odd number of registers: rows at distances of a power
  /// of two would share a few cache sets.
  static constexpr Index kScoreStride =
      max(Index{2}, Index{kParts<Item>}) * kChunkKeys / 2 + kWidth<Isa, float>;
  static_assert(kScoreStride / kWidth<Isa, float> % 2 == 1);
  static ATTN_INLINE Index query_stride(Index dim) noexcept {
    return kSplit<Item> ? depth_of<float, Item>(dim) + kTileDepth : General::padded(dim);
  }
  static constexpr Index kSums = kSumsApart<Item> ? 4 * kTileRows * kTileColumns : 0;

  static ATTN_INLINE PipelineScratch carve(Carver& from, const Call& call, Index rows) noexcept {
    const Index dims = query_stride(call.dim), each = General::padded(rows);
    const auto floats = [&](Index count, Index stride) {
      return Matrix<float>{from.take<float>(count * stride), stride};
    };
    PipelineScratch scratch;
    scratch.queries = floats(rows, dims);
    for (Matrix<float>& scores : scratch.scores) scores = floats(rows, kScoreStride);
    scratch.sums = from.take<float>(kSums);
    for (float*& keep : scratch.keep) keep = from.take<float>(each);
    scratch.harmed = from.take<std::uint32_t>(kSplit<Item> ? each : 0);
    scratch.panel = nullptr;
    return scratch;
  }
  static ATTN_INLINE Sizes sizes(const Call& call, Index rows) noexcept {
    Carver counted;
    (void)carve(counted, call, rows);
    Sizes sizes = General::sizes(call, rows);
    sizes.scratch = max(sizes.scratch, round_up(counted.used(), 64));
    sizes.panel = max(sizes.panel, KeyTile<Isa, float, Item>::bytes(call));
    return sizes;
  }
  static ATTN_INLINE PipelineScratch in(std::byte* memory, const Call& call, Index rows) noexcept {
    Carver from(memory);
    PipelineScratch scratch = carve(from, call, rows);
    scratch.panel = memory + sizes(call, rows).scratch;
    return scratch;
  }
};

}  // namespace attncore
