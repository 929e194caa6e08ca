// What forward_pipeline.h works in.
#pragma once

#include "../tile/tile_weights.h"
#include "forward.h"

namespace attncore {

template <class Isa>
struct PipelineScratch {
  using General = Scratch<Isa, float, Bf16Pair>;

  Matrix<float> queries;    // (rows, dim), in pairs
  Matrix<float> scores[2];  // (rows, chunk), and the weights in pairs over them
  float* keep[2];           // (rows)
  std::byte* panel;         // one key tile, where panels are not shared

  /// Keys of a chunk; dropout draws its coins for whole key tiles.
  static ATTN_INLINE Index chunk(const Call& call) noexcept {
    return call.dropout.given() ? Isa::template kKeyTile<float> : kPlainKeys;
  }
  static ATTN_INLINE Index score_stride(const Call& call) noexcept {
    return chunk(call) + kWidth<Isa, float>;  // as General's: not a power of two
  }
  static ATTN_INLINE Index bytes(const Call& call, Index rows) noexcept {
    const Index row = General::query_stride(call.dim) + 2 * score_stride(call);
    return round_up((rows * row + 2 * General::padded(rows)) * Index{sizeof(float)}, 64);
  }
  /// Few rows take the general one.
  static ATTN_INLINE Sizes sizes(const Call& call, Index rows) noexcept {
    Sizes sizes = General::sizes(call, rows);
    sizes.scratch = max(sizes.scratch, bytes(call, rows));
    return sizes;
  }
  static ATTN_INLINE PipelineScratch in(std::byte* memory, const Call& call, Index rows) noexcept {
    const Index stride = score_stride(call), dims = General::query_stride(call.dim);
    float* const queries = reinterpret_cast<float*>(memory);
    float* const scores = queries + rows * dims;
    float* const keep = scores + 2 * rows * stride;
    return {{queries, dims},
            {{scores, stride}, {scores + rows * stride, stride}},
            {keep, keep + General::padded(rows)},
            memory + sizes(call, rows).scratch};
  }
};

}  // namespace attncore
