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

  static ATTN_INLINE Index bytes(const Call& call, Index rows) noexcept {
    const Index row = query_stride(call.dim) + 2 * kScoreStride;
    const Index each = (kSplit<Item> ? 3 : 2) * General::padded(rows);
    return round_up((rows * row + kSums + each) * Index{sizeof(float)}, 64);
  }
  static ATTN_INLINE Sizes sizes(const Call& call, Index rows) noexcept {
    Sizes sizes = General::sizes(call, rows);
    sizes.scratch = max(sizes.scratch, bytes(call, rows));
    sizes.panel = max(sizes.panel, KeyTile<Isa, float, Item>::bytes(call));
    return sizes;
  }
  static ATTN_INLINE PipelineScratch in(std::byte* memory, const Call& call, Index rows) noexcept {
    const Index stride = kScoreStride, dims = query_stride(call.dim), padded = General::padded(rows);
    float* const queries = reinterpret_cast<float*>(memory);
    float* const scores = queries + rows * dims;
    float* const sums = scores + 2 * rows * stride;
    float* const keep = sums + kSums;
    return {{queries, dims},
            {{scores, stride}, {scores + rows * stride, stride}},
            {keep, keep + padded},
            sums,
            reinterpret_cast<std::uint32_t*>(keep + 2 * padded),
            memory + sizes(call, rows).scratch};
  }
};

}  // namespace attncore
