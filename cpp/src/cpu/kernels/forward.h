// Forward attention of one task: tiles of keys, an online softmax, no score matrix
// (Rabe & Staats 2021; Dao et al. 2022).
#pragma once

#include "task.h"

namespace attncore {

template <class Isa, class T>
void load_queries(const Call& call, const TaskRows& row_at, Matrix<T> queries, Index rows) noexcept {
  const Tensor& q = call.query;
  with_storage<T>(q.dtype, [&]<DType kStorage>() {
    for (Index row = 0; row < rows; ++row) {
      const Row r = row_at(row);
      const std::byte* const in = at(q, r.batch, r.head, r.query);
      for (Index dim = 0; dim < call.dim; dim += kWidth<Isa, T>) {
        const Index dims = min(kWidth<Isa, T>, call.dim - dim);
        store(queries.row(row) + dim,
              load_items<Isa, T, kStorage>(in + dim * q.stride[3], q.stride[3], dims));
      }
    }
  });
}

/// The query rows of a task in the accumulation type: where they lie, if they lie so; else in `room`.
template <class Isa, class T>
ATTN_INLINE Matrix<const T> query_rows(const Call& call, const TaskRows& row_at, Matrix<T> room, Index rows,
                                       bool load) noexcept {
  const Tensor& q = call.query;
  constexpr Index kItem = sizeof(T);
  const Row first = row_at(0);
  const std::byte* const data = at(q, first.batch, first.head, first.query);
  const bool aligned = q.stride[2] % kItem == 0 && reinterpret_cast<std::uintptr_t>(data) % alignof(T) == 0;
  if (q.dtype == call.compute() && call.group == 1 && q.stride[3] == kItem && aligned) {
    return {reinterpret_cast<const T*>(data), q.stride[2] / kItem};
  }
  if (load) load_queries<Isa, T>(call, row_at, room, rows);
  return as_const(room);
}

/// Applies the score steps that have work in this tile to one row of it.
template <class Isa, class T>
ATTN_INLINE void apply_steps(const Call& call, const Row& row, StepSet steps, Range keys, Index last,
                             T* scores) noexcept {
  using M = ScoreMath<Isa, T>;
  constexpr Index n = kWidth<Isa, T>;
  ScoreSteps::apply<M>(call, row, steps, [&](auto step) {
    for (Index i = 0; i < keys.size(); i += n) {
      const typename M::Keys at{keys.begin + i, min(n, last - keys.begin - i)};
      store(scores + i, step(load<Vec<Isa, T>>(scores + i), at));
    }
  });
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
    if (call.lse.given()) {
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

  if (task.first) state.clear(rows);
  const bool load = task.first || task.packed != nullptr;  // else they are there from the keys before
  const auto queries = query_rows<Isa, T>(call, row_at, scratch.queries, rows, load);  // (rows, dim)

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
      softmax.update(row, scores, keys.size(), poison, scratch.keep);
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
