// What a tile of scores goes through, row by row, between the product and the softmax.
#pragma once

#include "../tile/coins.h"
#include "few_rows.h"

namespace attncore {

/// Where causality, windows and segments leave no pair of a tile out, or some.
ATTN_INLINE Band band_of(const Call& call, const Block& block, Range rows, Range keys) noexcept {
  const Range seen = ScoreSteps::band(call, block.first_position());
  return {.first = {seen.begin - keys.begin, seen.end - keys.begin},
          .rows = rows.size(),
          .keys = keys.size(),
          .lead = call.group == 1 ? 0 : rows.begin % call.group,
          .group = call.group,
          .of_query = Segments::ranges(call, block),
          .tile = keys.begin};
}

/// The keys of a tile that a row may see, rounded as the softmax reads them.
template <class Isa, class T>
ATTN_INLINE Range seen_of(const Band& band, Range tile, Index row) noexcept {
  return band.whole ? Range{0, tile.size()} : in_pairs_of_registers<Isa, T>(band.keys_of({row, row + 1}));
}

/// Applies the score steps that have work in this tile to what one row of it may see; `visit_slope`: as Pipeline::apply has it.
template <class Isa, class T, class... VisitSlope>
ATTN_INLINE void apply_steps(const Call& call, const Row& row, StepSet steps, Range keys, Index last,
                             Range seen, T* scores, VisitSlope... visit_slope) noexcept {
  using M = ScoreMath<Isa, T>;
  constexpr Index n = kWidth<Isa, T>;
  const auto visit = [&](auto step) {
    for (Index i = seen.begin; i < seen.end; i += n) {
      const typename M::Keys at{keys.begin + i, min(n, last - keys.begin - i)};
      store(scores + i, step(load<Vec<Isa, T>>(scores + i), at));
    }
  };
  ScoreSteps::apply<M>(call, row, steps, visit, visit_slope...);
}

/// Narrows a tile's keys as far as ScoreSteps::narrow can, and says what the steps do to what is left.
template <class Isa, class T>
ATTN_INLINE TileWork touch_tile(const Call& call, const Block& block, Range& keys) noexcept {
  TileWork work;
  keys = ScoreSteps::narrow(call, block, keys);
  work.hidden = keys.empty();
  if (work.hidden) return work;
  const Range padded{keys.begin, keys.begin + round_up(keys.size(), kWidth<Isa, T>)};
  return ScoreSteps::touch(call, block, padded);
}

/// What the steps read of a row is fetched so many rows before they are applied to it, the first rows' before the tile's products:
/// a whole tile at once is more than a core can wait for (Zen 4 drops the rest: biases cost 12 to 17 % more time).
inline constexpr Index kRowsAhead = 8;

ATTN_INLINE void fetch_first_rows(const Call& call, const TaskRows& row_at, Index rows, StepSet steps,
                                  Range keys) noexcept {
  if (steps == 0) return;
  for (Index row = 0; row < min(kRowsAhead, rows); ++row) ScoreSteps::fetch(call, row_at(row), steps, keys);
}
ATTN_INLINE void fetch_next_row(const Call& call, const TaskRows& row_at, Index row, Index rows,
                                StepSet steps, Range keys) noexcept {
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
    const Index count = keys.size();
    TokenWalk walk(source, keys.begin, keys.end);
    for (Index first = 0, run = 0; first < count; first += run) {
      run = min(count - first, walk.run());
      copy_run(walk.take(run), walk.stride(), factors + first, run);
    }
    for (Index i = count; i < round_up(count, kWidth<Isa, T>); ++i) factors[i] = 1;
    return factors;
  }

  alignas(Isa::kBytes) T factors[kKeys];

 private:
  static ATTN_INLINE void copy_run(const std::byte* in, Index stride, T* out, Index count) noexcept {
    constexpr Index kItem = sizeof(float);
    if (stride == kItem && sizeof(T) == kItem) {
      __builtin_memcpy(out, in, static_cast<std::size_t>(count * kItem));
      return;
    }
    for (Index i = 0; i < count; ++i) {
      float item;
      __builtin_memcpy(&item, in + i * stride, sizeof item);
      out[i] = item;
    }
  }
};

/// Some of a row's scores, in whole registers.
template <class Isa, class T>
ATTN_INLINE void multiply_by(T* scores, T scale, Range some) noexcept {
  for (Index i = some.begin; i < some.end; i += kWidth<Isa, T>)
    store(scores + i, load<Vec<Isa, T>>(scores + i) * scale);
}

template <class Isa, class T>
ATTN_INLINE void multiply_by(T* items, const T* factors, Index count) noexcept {
  using V = Vec<Isa, T>;
  for (Index i = 0; i < count; i += kWidth<Isa, T>)
    store(items + i, load<V>(items + i) * load<V>(factors + i));
}

/// The scales of a tile, or null where there are none.
template <class Isa, class T>
struct TileFactors {
  const T *keys = nullptr, *values = nullptr;

  ATTN_INLINE void look_up(const Call& call, const Task& task, Range tile) noexcept {
    keys = key_scales_.of(call, call.key_scale, task, tile);
    values = value_scales_.of(call, call.value_scale, task, tile);
  }

  /// A row's scores go through keys' scales and the steps that have work.  Returns what multiplies its weights: values' scales and dropout's
  /// coins, or null.
  ATTN_INLINE const T* apply(const Call& call, const TaskRows& row_at, Index row, StepSet steps, Range tile,
                             Index last, Range seen, T* scores, TileCoins<Isa, T>& coins) const noexcept {
    if (keys != nullptr) multiply_by<Isa, T>(scores, keys, tile.size());
    if (steps != 0) apply_steps<Isa, T>(call, row_at(row), steps, tile, last, seen, scores);
    if (!call.dropout.given()) return values;
    T* const factors = coins.of(call.dropout, row_at(row), tile);
    if (values != nullptr) multiply_by<Isa, T>(factors, values, tile.size());
    return factors;
  }

 private:
  TileScales<Isa, T> key_scales_, value_scales_;
};

}  // namespace attncore
