// Forward attention of one task: tiles of keys, an online softmax, no score matrix (Rabe & Staats 2021, Dao
// et al. 2022).
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
  const KeySource k = key_source(call.key, sequence.batch, kv_head);
  const KeySource v = key_source(call.value, sequence.batch, kv_head);
  with_storage<T>(k.storage,
                  [&]<DType kStorage>() { pack_transposed<Isa, T, kStorage>(tile.keys, k, keys.begin); });
  const bool finite = with_storage<T>(
      v.storage, [&]<DType kStorage>() { return pack_rows<Isa, T, kStorage>(tile.values, v, keys.begin); });
  *tile.poison = finite ? 0 : 1;
}

/// What a task works in: its scratch, carved up.
template <class Isa, class T>
struct Scratch {
  Matrix<T> queries;  // (rows, dim)
  Matrix<T> scores;   // (rows, key tile)
  T* keep;            // (rows)
  std::byte* panel;   // one key tile, where panels are not shared

  static ATTN_INLINE Index padded(Index items) noexcept { return OnlineSoftmax<Isa, T>::padded(items); }
  // One register more than the tile: rows whose distance is a power of two would fall into the same cache
  // sets.
  static ATTN_INLINE Index score_stride() noexcept { return Isa::template kKeyTile<T> + kWidth<Isa, T>; }

  static ATTN_INLINE Sizes sizes(const Call& call, Index rows) noexcept {
    const Index panel = round_up((panel_items<Isa, T>(Isa::template kKeyTile<T>, call.dim) +
                                  panel_items<Isa, T>(call.value_dim, Isa::template kKeyTile<T>) + 1) *
                                     Index{sizeof(T)},
                                 64);
    const Index items = rows * (padded(call.dim) + score_stride()) + padded(rows);
    return {round_up(items * Index{sizeof(T)}, 64),
            round_up(OnlineSoftmax<Isa, T>::bytes(rows, call.value_dim), 64), panel};
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
    const Index query =
        call.group == 1 ? at : at / call.group;  // a division costs as much as a register of exp
    const Index head = task.kv_head * call.group + (at - query * call.group);
    return {task.sequence.batch, head, query, query + task.sequence.offset};
  }
  ATTN_INLINE Block block() const noexcept { return block_of(call, task.sequence, task.kv_head, task.rows); }
};

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

/// The query rows of a task in the accumulation type: where they lie, if they lie so, else loaded into
/// `room`.
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

template <class Isa, class T>
void forward_task(const Call& call, const Task& task, std::byte* scratch_memory) noexcept {
  const Index rows = task.rows.size();
  const TaskRows row_at{call, task};
  const Block block = row_at.block();
  const auto scratch = Scratch<Isa, T>::in(scratch_memory, call, rows);
  const auto softmax = OnlineSoftmax<Isa, T>::in(task.state, rows, call.value_dim);
  const Index panel_bytes = Scratch<Isa, T>::sizes(call, rows).panel;
  const Index key_tile = Isa::template kKeyTile<T>;

  if (task.first) softmax.clear(rows);
  const auto queries =
      query_rows<Isa, T>(call, row_at, scratch.queries, rows, task.first || task.packed != nullptr);

  const Range seen = intersect(task.keys, ScoreSteps::visible(call, block));
  for (Index first = seen.begin - seen.begin % key_tile; first < seen.end; first += key_tile) {
    const Range keys{first, min(first + key_tile, seen.end)};
    const TileWork work =
        ScoreSteps::touch(call, block, {first, first + round_up(keys.size(), kWidth<Isa, T>)});
    if (work.hidden) continue;

    const Range packed_keys{first, task.packed != nullptr ? min(first + key_tile, task.keys.end) : keys.end};
    std::byte* panel = scratch.panel;
    if (task.packed != nullptr) {
      panel = const_cast<std::byte*>(task.packed) + (first - task.keys.begin) / key_tile * panel_bytes;
    } else {
      pack_key_tile<Isa, T>(call, task.sequence, task.kv_head, packed_keys, panel);
    }
    const auto tile = KeyTile<Isa, T>::in(panel, call, packed_keys.size());
    const bool poison = *tile.poison != 0;

    // S (rows, keys) = scale · Q·Kᵀ
    gemm<Isa, T>(scratch.scores, queries, as_const(tile.keys), rows, keys.size(), call.dim,
                 Scaled<T>{static_cast<T>(call.scale)});
    for (Index row = 0; row < rows; ++row) {
      T* const scores = scratch.scores.row(row);
      if (work.steps != 0)
        apply_steps<Isa, T>(call, row_at(row), work.steps, keys, task.sequence.keys, scores);
      softmax.update(row, scores, keys.size(), poison, scratch.keep);  // S → P
    }
    // O (rows, value_dim) = keep · O + P·V
    if (poison) {
      gemm_of_visible<Isa, T>(softmax.output, as_const(scratch.scores), as_const(tile.values), rows,
                              keys.size(), Accumulated<T>{scratch.keep});
    } else {
      gemm<Isa, T>(softmax.output, as_const(scratch.scores), as_const(tile.values), rows, call.value_dim,
                   keys.size(), Accumulated<T>{scratch.keep});
    }
  }
  if (task.last) finish_rows<Isa, T>(call, row_at, softmax, rows);
}

}  // namespace attncore
