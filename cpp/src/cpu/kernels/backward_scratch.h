// The memory of the backward passes: what a row needs, and a tile.
#pragma once

#include "forward.h"

namespace attncore {

/// Query rows of a tile: a sum over rows is a sum of such tiles' sums, so that it depends on dims alone.
inline constexpr Index kMostBackwardRows = 96;
ATTN_INLINE Index backward_rows(const Call& call, Index row_block) noexcept {
  constexpr Index kItems = kMostBackwardRows * 256;  // of query and d_out together
  return max(1, min(kMostBackwardRows, kItems / (call.dim + call.value_dim)) / row_block) * row_block;
}

template <class T>
struct RowStats {
  T *origin, *factor, *delta;  // (rows of one sequence and KV head)

  static ATTN_INLINE RowStats in(std::byte* memory, const Call& call, const Sequence& sequence,
                                 Index kv_head) noexcept {
    const Place& place = sequence.query_place;
    const Index tokens = call.query.shape[2], rows = place.tokens * call.group;
    const Index before = (place.batch * call.kv_heads + kv_head) * tokens + place.first;
    T* const first = reinterpret_cast<T*>(memory) + before * 3 * call.group;
    return {first, first + rows, first + 2 * rows};
  }
};

/// A pass's memory, carved up.
template <class Isa, class T, class Item>
struct BackwardScratch {
  Matrix<Item> queries, d_out;           // (rows, dim), (rows, value_dim): where they can't be read in place
  Matrix<T> weights, d_scores;           // (rows, key tile)
  Matrix<Item> weights_by_rows;          // over weights: pairs are of two rows
  Matrix<Item> d_scores_by_rows;         // over d_scores
  Matrix<Item> d_scores_by_keys;         // the same, or pairs of two keys
  Panel<Item> query_panel, d_out_panel;  // the same rows, packed
  Panel<Item> keys_transposed, values_transposed, key_panel;
  Item* few_rows;            // as products in place take them
  Matrix<T> d_key, d_value;  // (key tile, dim), (key tile, value_dim): sums over the rows
  T* slopes;                 // (key tile), of one row
  Index bytes;

  static ATTN_INLINE Index few_row_items(const Call& call) noexcept {
    return kMostDirectRows<Isa, Item> * round_up(max(call.dim, call.value_dim), kWidth<Isa, T>);
  }

  /// Without memory, only counts the bytes.
  static ATTN_INLINE BackwardScratch in(std::byte* memory, const Call& call) noexcept {
    constexpr Index kKeys = Isa::template kKeyTile<T>;
    static_assert(sizeof(Item) == sizeof(T));
    const Index rows = backward_rows(call, Isa::kRows);
    Carver from(memory);
    const auto matrix = [&](Index count, Index items) {
      const Index stride = round_up(items, kWidth<Isa, T>);
      return Matrix<T>{from.take<T>(count * stride), stride};
    };
    const auto items = [](Matrix<T> m, Index apart = 1) {
      return Matrix<Item>{reinterpret_cast<Item*>(m.data), apart * m.stride};
    };
    const auto operand = [&](Index count, Index depth) {
      return items(matrix(count, depth_of<T, Item>(depth)));
    };
    const auto panel = [&](Index columns, Index length) {
      const Index depth = depth_of<T, Item>(length);
      return Panel<Item>{from.take<Item>(panel_items<Isa, Item>(columns, depth)), columns, depth};
    };
    // A register more than the tile: rows at distances of a power of two would share a few cache sets.
    const Index score_stride = kKeys + kWidth<Isa, T>;
    const Matrix<T> weights = matrix(rows, score_stride), d_scores = matrix(rows, score_stride);
    BackwardScratch s{.queries = operand(rows, call.dim),
                      .d_out = operand(rows, call.value_dim),
                      .weights = weights,
                      .d_scores = d_scores,
                      .weights_by_rows = items(weights, kNumbers<T, Item>),
                      .d_scores_by_rows = items(d_scores, kNumbers<T, Item>),
                      .d_scores_by_keys = kInPairs<T, Item> ? operand(rows, score_stride) : items(d_scores),
                      .query_panel = panel(call.dim, rows),
                      .d_out_panel = panel(call.value_dim, rows),
                      .keys_transposed = panel(kKeys, call.dim),
                      .values_transposed = panel(kKeys, call.value_dim),
                      .key_panel = panel(call.dim, kKeys),
                      .few_rows = from.take<Item>(kInPairs<T, Item> ? 0 : few_row_items(call)),
                      .d_key = matrix(kKeys, call.dim),
                      .d_value = matrix(kKeys, call.value_dim),
                      .slopes = from.take<T>(kKeys),
                      .bytes = 0};
    s.bytes = round_up(from.used(), 64);
    return s;
  }
};

}  // namespace attncore
