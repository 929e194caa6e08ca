// O = keep · O + P · V of a chunk of keys, where P · V is summed apart: of three parts of bfloat16 32 keys are six products, and as
// many roundings of a long sum would cost float32's digits (1.6 times the error after 2048 keys, by counting).  A matrix unit stores a
// block's sums as the next block begins (tile_stream.h); between the products of that one they are added to O's rows, in place.
#pragma once

#include "softmax.h"
#include "tile_stream.h"

namespace attncore {

template <class Item>
inline constexpr bool kSumsApart = kParts<Item> > 2;

template <class Isa>
class SumsApart {
 public:
  /// `room`: for 2 × 2 tiles.
  SumsApart(Matrix<float> output, float* room, Index rows) noexcept
      : output_(output), room_(room), rows_(rows), stored_{.row = rows} {}

  /// A block is about to begin, so that what the unit holds is stored.
  void advance() noexcept {
    finish();
    if (held_.registers > 0) stored_ = held_;
    held_ = {};
  }
  /// It is of P · V, and of O's columns from this one on.
  [[nodiscard]] Matrix<float> hold(Index column, Index registers, const float* keep) noexcept {
    held_ = {column, registers, 0, keep};
    return {room_, kStride};
  }
  /// Between two products; four times a block or more often.
  ATTN_INLINE void add_some() noexcept {
    constexpr Index kRows = 8;
    add_rows(min(stored_.row + kRows, rows_));
  }
  void finish() noexcept { add_rows(rows_); }

 private:
  static constexpr Index kStride = 2 * kTileColumns;

  struct Block {
    Index column = 0, registers = 0, row = 0;  // the next to be added
    const float* keep = nullptr;
  };

  void add_rows(Index end) noexcept {
    using V = Vec<Isa, float>;
    for (; stored_.row < end; ++stored_.row) {
      float* out = output_.row(stored_.row) + stored_.column;
      const float* const sums = room_ + stored_.row * kStride;
      const float keep = stored_.keep[stored_.row];
      store(out, load<V>(out) * keep + load<V>(sums));
      if (stored_.registers == 1) continue;
      out += kTileColumns;
      store(out, load<V>(out) * keep + load<V>(sums + kTileColumns));
    }
  }

  const Matrix<float> output_;
  float* const room_;
  const Index rows_;
  Block held_, stored_;  // by the unit; in `room`
};

}  // namespace attncore
