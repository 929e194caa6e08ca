// What a task works with: packed key tiles, scratch memory, its rows.
#pragma once

#include "../../score/steps.h"
#include "../tile/score_math.h"
#include "../tile/softmax.h"
#include "kernels.h"

namespace attncore {

/// The panels of one key tile, in Sizes::panel bytes.
template <class Isa, class T>
struct KeyTile {
  Panel<T> keys;    // (dim, keys): Kᵀ
  Panel<T> values;  // (keys, value_dim)
  T* poison;        // 0, or 1 if values hold Inf or NaN

  static ATTN_INLINE KeyTile in(std::byte* memory, const Call& call, Index count) noexcept {
    T* const keys = reinterpret_cast<T*>(memory);
    T* const values = keys + panel_items<Isa, T>(count, call.dim);
    return {{keys, count, call.dim},
            {values, call.value_dim, count},
            values + panel_items<Isa, T>(call.value_dim, count)};
  }
};

template <class Isa, class T>
void pack_key_tile(const Call& call, const Sequence& sequence, Index kv_head, Range keys,
                   std::byte* memory) noexcept {
  const auto tile = KeyTile<Isa, T>::in(memory, call, keys.size());
  const KeySource k = key_source(call, call.key, sequence, kv_head);
  const KeySource v = key_source(call, call.value, sequence, kv_head);
  pack_transposed<Isa, T>(tile.keys, k, keys.begin);
  *tile.poison = pack_rows<Isa, T>(tile.values, v, keys.begin) ? 0 : 1;
}

template <class Isa, class T>
struct RowState {
  OnlineSoftmax<Isa, T> recent;  // since the last multiple of kFoldKeys
  OnlineSoftmax<Isa, T> before;
  bool folds;  // whether there is a `before`

  static ATTN_INLINE Index bytes(const Call& call, Index rows) noexcept {
    const Index one = round_up(OnlineSoftmax<Isa, T>::bytes(rows, call.value_dim), 64);
    return call.keys > kFoldKeys ? 2 * one : one;
  }
  static ATTN_INLINE RowState in(std::byte* memory, const Call& call, Index rows) noexcept {
    const bool folds = call.keys > kFoldKeys;
    std::byte* const second = folds ? memory + bytes(call, rows) / 2 : memory;
    return {OnlineSoftmax<Isa, T>::in(memory, rows, call.value_dim),
            OnlineSoftmax<Isa, T>::in(second, rows, call.value_dim), folds};
  }
  void clear(Index rows) const noexcept {
    recent.clear(rows);
    if (folds) before.clear(rows);
  }
  void fold(Index rows) const noexcept {
    if (!folds) return;
    before.merge(recent, rows);
    recent.clear(rows);
  }
  /// The state of all keys, in `recent`.
  ATTN_INLINE OnlineSoftmax<Isa, T> whole(Index rows) const noexcept {
    if (folds) recent.merge(before, rows);
    return recent;
  }
};

/// What a task works in: its scratch, carved up.
template <class Isa, class T>
struct Scratch {
  Matrix<T> queries;  // (rows, dim)
  Matrix<T> scores;   // (rows, key tile)
  T* keep;            // (rows)
  std::byte* panel;   // one key tile, where panels are not shared

  static ATTN_INLINE Index padded(Index items) noexcept { return OnlineSoftmax<Isa, T>::padded(items); }
  // A register more than the tile: rows at distances of a power of two would share a few cache sets.
  static ATTN_INLINE Index score_stride() noexcept { return Isa::template kKeyTile<T> + kWidth<Isa, T>; }

  static ATTN_INLINE Sizes sizes(const Call& call, Index rows) noexcept {
    const Index panel = round_up((panel_items<Isa, T>(Isa::template kKeyTile<T>, call.dim) +
                                  panel_items<Isa, T>(call.value_dim, Isa::template kKeyTile<T>) + 1) *
                                     Index{sizeof(T)},
                                 64);
    const Index items = rows * (padded(call.dim) + score_stride()) + padded(rows);
    return {round_up(items * Index{sizeof(T)}, 64), RowState<Isa, T>::bytes(call, rows), panel};
  }

  static ATTN_INLINE Scratch in(std::byte* memory, const Call& call, Index rows) noexcept {
    T* const queries = reinterpret_cast<T*>(memory);
    T* const scores = queries + rows * padded(call.dim);
    T* const keep = scores + rows * score_stride();
    return {{queries, padded(call.dim)}, {scores, score_stride()}, keep, memory + sizes(call, rows).scratch};
  }
};

/// The rows of a task.
struct TaskRows {
  const Call& call;
  const Task& task;
  ATTN_INLINE Row operator()(Index row) const noexcept {
    const Index at = task.rows.begin + row;
    const Index query = call.group == 1 ? at : at / call.group;  // a division costs as much as an exp
    const Index head = task.kv_head * call.group + (at - query * call.group);
    return row_of(task.sequence, head, query);
  }
  ATTN_INLINE Block block() const noexcept { return block_of(call, task.sequence, task.kv_head, task.rows); }
};

}  // namespace attncore
