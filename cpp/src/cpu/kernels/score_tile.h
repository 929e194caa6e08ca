// What a tile of scores goes through, row by row, between the product and the softmax.
#pragma once

#include "few_rows.h"

namespace attncore {

/// Applies the score steps that have work in this tile to one row of it; `visit_slope`: as Pipeline::apply has it.
template <class Isa, class T, class... VisitSlope>
ATTN_INLINE void apply_steps(const Call& call, const Row& row, StepSet steps, Range keys, Index last,
                             T* scores, VisitSlope... visit_slope) noexcept {
  using M = ScoreMath<Isa, T>;
  constexpr Index n = kWidth<Isa, T>;
  const auto visit = [&](auto step) {
    for (Index i = 0; i < keys.size(); i += n) {
      const typename M::Keys at{keys.begin + i, min(n, last - keys.begin - i)};
      store(scores + i, step(load<Vec<Isa, T>>(scores + i), at));
    }
  };
  ScoreSteps::apply<M>(call, row, steps, visit, visit_slope...);
}

/// What the steps read of a row is fetched so many rows before they are applied to it, the first rows' before the tile's products:
/// a whole tile at once is more than a core can wait for (Zen 4 drops the rest: biases cost 12 to 17 % more time).
inline constexpr Index kRowsAhead = 8;

template <class RowAt>
ATTN_INLINE void fetch_first_rows(const Call& call, const RowAt& row_at, Index rows, StepSet steps,
                                  Range keys) noexcept {
  if (steps == 0) return;
  for (Index row = 0; row < min(kRowsAhead, rows); ++row) ScoreSteps::fetch(call, row_at(row), steps, keys);
}
template <class RowAt>
ATTN_INLINE void fetch_next_row(const Call& call, const RowAt& row_at, Index row, Index rows, StepSet steps,
                                Range keys) noexcept {
  if (steps != 0 && row + kRowsAhead < rows) ScoreSteps::fetch(call, row_at(row + kRowsAhead), steps, keys);
}

/// What multiplies the scores and the weights of a tile's keys, where keys and values have scales: the scale of what is
/// stored as x · scale leaves the product, Σ q (x · scale) = scale · Σ q x.
template <class Isa, class T>
struct TileScales {
  static constexpr Index kKeys = Isa::template kKeyTile<T>;

  /// Those of the keys, or nothing where there are none; the same for values.
  ATTN_INLINE const T* of(const Call& call, const Tensor& scale, const Task& task, Range keys) noexcept {
    if (!scale.given()) return nullptr;
    const KeySource source = key_source(call, scale, task.sequence, task.kv_head);
    TokenWalk walk(source, keys.begin, keys.end);
    for (Index i = 0; i < round_up(keys.size(), kWidth<Isa, T>); ++i) {
      float item = 1;
      if (i < keys.size()) __builtin_memcpy(&item, walk.next(), sizeof item);
      factors[i] = item;
    }
    return factors;
  }

  alignas(Isa::kBytes) T factors[kKeys];
};

template <class Isa, class T>
ATTN_INLINE void multiply_by(T* items, const T* factors, Index count) noexcept {
  using V = Vec<Isa, T>;
  for (Index i = 0; i < count; i += kWidth<Isa, T>)
    store(items + i, load<V>(items + i) * load<V>(factors + i));
}

}  // namespace attncore
