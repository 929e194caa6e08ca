// Forward attention of one task: tiles of keys, an online softmax, no score matrix
// (Rabe & Staats 2021; Dao et al. 2022).
#pragma once

#include "../tile/coins.h"
#include "task.h"

namespace attncore {

/// Rows of a tensor over (batch, head, query, dims) in the accumulation type, into `room`.
template <class Isa, class T>
void load_rows(const Tensor& t, Index dims, const TaskRows& row_at, Matrix<T> room, Index rows) noexcept {
  with_storage<T>(t.dtype, [&]<DType kStorage>() {
    for (Index row = 0; row < rows; ++row) {
      const Row r = row_at(row);
      const std::byte* const in = at(t, r.batch, r.head, r.query);
      for (Index dim = 0; dim < dims; dim += kWidth<Isa, T>) {
        const Index count = min(kWidth<Isa, T>, dims - dim);
        store(room.row(row) + dim, load_items<Isa, T, kStorage>(in + dim * t.stride[3], t.stride[3], count));
      }
    }
  });
}

/// The same rows where they lie, if they lie so; else in `room`, loaded if asked.
template <class Isa, class T>
ATTN_INLINE Matrix<const T> rows_of(const Tensor& t, Index dims, const TaskRows& row_at, Matrix<T> room,
                                    Index rows, bool load) noexcept {
  constexpr Index kItem = sizeof(T);
  const Row first = row_at(0);
  const std::byte* const data = at(t, first.batch, first.head, first.query);
  const bool aligned = t.stride[2] % kItem == 0 && reinterpret_cast<std::uintptr_t>(data) % alignof(T) == 0;
  if (t.dtype == row_at.call.compute() && row_at.call.group == 1 && t.stride[3] == kItem && aligned) {
    return {reinterpret_cast<const T*>(data), t.stride[2] / kItem};
  }
  if (load) load_rows<Isa, T>(t, dims, row_at, room, rows);
  return as_const(room);
}

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

/// out and lse of rows that have seen all their keys.
template <class Isa, class T>
void finish_rows(const Call& call, const TaskRows& row_at, const OnlineSoftmax<Isa, T>& softmax,
                 Index rows) noexcept {
  const Tensor& sinks = call.score.sinks;
  for (Index row = 0; row < rows; ++row) {
    const Row r = row_at(row);
    if (sinks.given()) softmax.add_sink(row, load_scalar<Isa, T>(at(sinks, 0, r.head), sinks.dtype));
    const T factor = softmax.sum[row] == 0 ? T{0} : 1 / softmax.sum[row];  // nothing visible: 0
    std::byte* const out = at(call.out, r.batch, r.head, r.query);
    const Index stride = call.out.stride[3];
    with_storage<T>(call.out.dtype, [&]<DType kStorage>() {
      for (Index dim = 0; dim < call.value_dim; dim += kWidth<Isa, T>) {
        // Whether −0 met a tile of hidden keys, and became 0, depends on the row's neighbours: + 0 hides it.
        const auto items = load<Vec<Isa, T>>(softmax.output.row(row) + dim) * factor + T{0};
        store_items<Isa, T, kStorage>(out + dim * stride, stride, min(kWidth<Isa, T>, call.value_dim - dim),
                                      items);
      }
    });
    if (call.sum.given()) {
      __builtin_memcpy(at(call.lse, r.batch, r.head, r.query), softmax.maximum + row, sizeof(T));
      __builtin_memcpy(at(call.sum, r.batch, r.head, r.query), softmax.sum + row, sizeof(T));
    } else if (call.lse.given()) {
      const T lse = softmax.log_sum_exp(row);
      __builtin_memcpy(at(call.lse, r.batch, r.head, r.query), &lse, sizeof lse);
    }
  }
}

/// The panels of a key tile: packed before for all who share them, or packed here.
template <class Isa, class T>
ATTN_INLINE KeyTile<Isa, T> key_tile_of(const Call& call, const Task& task, Range keys, Index panel_bytes,
                                        std::byte* room) noexcept {
  if (task.packed == nullptr) {
    pack_key_tile<Isa, T>(call, task.sequence, task.kv_head, keys, room);
    return KeyTile<Isa, T>::in(room, call, keys.size());
  }
  const Index number = (keys.begin - task.keys.begin) / Isa::template kKeyTile<T>;
  std::byte* const panel = const_cast<std::byte*>(task.packed) + number * panel_bytes;  // read only
  return KeyTile<Isa, T>::in(panel, call, min(Isa::template kKeyTile<T>, task.keys.end - keys.begin));
}

template <class Isa, class T>
void forward_task(const Call& call, const Task& task, std::byte* scratch_memory) noexcept {
  const Index rows = task.rows.size();
  const TaskRows row_at{call, task};
  const Block block = row_at.block();
  const auto scratch = Scratch<Isa, T>::in(scratch_memory, call, rows);
  const auto state = RowState<Isa, T>::in(task.state, call, rows);
  const auto& softmax = state.recent;
  const auto weights = as_const(scratch.scores);
  const Accumulated<T> accumulated{scratch.keep};
  const Index panel_bytes = Scratch<Isa, T>::sizes(call, rows).panel;
  const Index key_tile = Isa::template kKeyTile<T>;
  TileCoins<Isa, T> coins;

  if (task.first) state.clear(rows);
  const bool load = task.first || task.packed != nullptr;  // else they are there from the keys before
  const auto queries =
      rows_of<Isa, T>(call.query, call.dim, row_at, scratch.queries, rows, load);  // (rows, dim)

  const Range seen = intersect(task.keys, ScoreSteps::visible(call, block));
  for (Index first = seen.begin - seen.begin % key_tile; first < seen.end; first += key_tile) {
    if (first % kFoldKeys == 0 && first > 0) state.fold(rows);
    const Range keys{first, min(first + key_tile, seen.end)};
    const Range padded{first, first + round_up(keys.size(), kWidth<Isa, T>)};
    const TileWork work = ScoreSteps::touch(call, block, padded);
    if (work.hidden) continue;
    const auto tile = key_tile_of<Isa, T>(call, task, keys, panel_bytes, scratch.panel);
    const bool poison = *tile.poison != 0;

    // S (rows, keys) = scale · Q·Kᵀ
    gemm<Isa, T>(scratch.scores, queries, as_const(tile.keys), rows, keys.size(), call.dim,
                 Scaled<T>{static_cast<T>(call.scale)});
    // S → P: softcap, biases and masks where they have work, then the online softmax
    for (Index row = 0; row < rows; ++row) {
      T* const scores = scratch.scores.row(row);
      if (work.steps != 0) {
        apply_steps<Isa, T>(call, row_at(row), work.steps, keys, task.sequence.keys, scores);
      }
      const T* const factors = call.dropout.given() ? coins.of(call.dropout, row_at(row), keys) : nullptr;
      softmax.update(row, scores, keys.size(), poison, scratch.keep, factors);
    }
    // O (rows, value_dim) = keep · O + P·V
    const auto values = as_const(tile.values);
    if (poison) {
      gemm_of_visible<Isa, T>(softmax.output, weights, values, rows, keys.size(), accumulated);
    } else {
      gemm<Isa, T>(softmax.output, weights, values, rows, call.value_dim, keys.size(), accumulated);
    }
  }
  if (task.last) finish_rows<Isa, T>(call, row_at, state.whole(rows), rows);
}

}  // namespace attncore
