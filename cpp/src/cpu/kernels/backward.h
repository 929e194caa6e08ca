// The backward pass: gradients of queries, keys and values, tile by tile (Dao et al. 2022).
//
//     for each tile of keys:  dK = dV = 0
//       for each tile of rows that sees some of them:
//         S, P, dS                                       (backward_tile.h)
//         dV += (P Z)ᵀ · d_out      dK += dSᵀ · Q      dQ += dS · K
//       write dK, dV
//     write dQ
//
// A task that owns rows and keys does all of it; one that owns only keys leaves dQ out, one that owns only rows dK and
// dV.  The sums and their order are the same, so that it does not matter to the bits which tasks a plan makes.
#pragma once

#include "backward_parameters.h"

namespace attncore {

template <class Isa, class T, class Item>
class BackwardKernel {
 public:
  /// Scratch for tasks that own so many rows.
  static Index bytes(const Call& call, Index owned_rows) noexcept {
    return BackwardScratch<Isa, T, Item>::in(nullptr, call).bytes + ParameterShares<Isa, T>::bytes(call) +
           owned_rows * padded_dim(call) * Index{sizeof(T)};
  }

  BackwardKernel(const BackwardCall& backward, const BackwardTask& task, std::byte* memory) noexcept
      : call_(backward.call),
        gradients_(backward.gradients),
        task_(task),
        tile_(backward, task.sequence, task.kv_head, memory, task.stats),
        scratch_(tile_.scratch()),
        parameters_(backward, task, memory + scratch_.bytes),
        d_query_{reinterpret_cast<T*>(memory + scratch_.bytes + ParameterShares<Isa, T>::bytes(call_)),
                 padded_dim(call_)} {}

  void run() noexcept {
    const Index key_tile = Isa::template kKeyTile<T>;
    if (task_.owns_rows) clear(d_query_, task_.rows.size());
    for (Index key = task_.keys.begin; key < task_.keys.end; key += key_tile) {
      if (!run_keys({key, min(key + key_tile, task_.keys.end)})) return;
    }
    if (task_.owns_rows) write_queries();
  }

 private:
  using Seen = typename BackwardTile<Isa, T, Item>::Seen;

  static ATTN_INLINE Index padded_dim(const Call& call) noexcept {
    return round_up(call.dim, kWidth<Isa, T>);
  }

  /// One tile of keys against all rows.  False: the call was cancelled.
  bool run_keys(Range keys) noexcept {
    const Index most = backward_rows(call_, Isa::kRows);
    const Range real_keys = intersect(keys, {0, task_.sequence.keys});
    if (task_.owns_keys) {
      clear(scratch_.d_key, keys.size());
      clear(scratch_.d_value, keys.size());
      parameters_.begin_keys(keys);
    }
    bool loaded = false;
    for (Index row = task_.rows.begin; row < task_.rows.end; row += most) {
      const Range all{row, min(row + most, task_.rows.end)};
      const Range rows = intersect(all, {0, task_.sequence.queries * call_.group});
      const auto seen = tile_.look(rows, real_keys);
      if (!seen.keys.empty()) {
        if (task_.poll()) return false;
        if (!loaded) load_keys(real_keys);
        loaded = true;
        run_tile(rows, seen);
      }
      if (task_.owns_keys && task_.own_biases != 0) {
        const Range visited = seen.keys.empty() ? Range{row, row} : rows;
        parameters_.write_zeros(visited, {seen.keys.end, keys.end});
        parameters_.write_zeros({max(visited.end, row), all.end}, keys);
      }
    }
    if (task_.owns_keys) write_keys(keys);
    return true;
  }

  void load_keys(Range keys) noexcept {
    tile_.load_keys(keys);
    tile_.load_values(keys);
    if (!task_.owns_rows) return;
    key_panel_ = scratch_.key_panel;
    key_panel_.depth = depth_of<T, Item>(keys.size());
    const KeySource source = key_source(call_, call_.key, task_.sequence, task_.kv_head);
    keys_are_finite_ = pack_items<Isa, T>(key_panel_, source, keys.begin, keys.size());
  }

  void run_tile(Range rows, const Seen& seen) noexcept {
    tile_.load_rows(rows);
    if (task_.owns_keys) {
      parameters_.begin_tile(block_of(call_, task_.sequence, task_.kv_head, rows), seen.keys);
      tile_.differentiate(
          seen, [&](const Row& row, const T* d_scores) { parameters_.add(row, d_scores, seen.keys); });
      parameters_.end_tile();
    } else {
      tile_.differentiate(seen, [](const Row&, const T*) {});
    }
    tile_.make_operands(seen);
    if (task_.owns_keys) {
      add_keys(gradients_.d_value, scratch_.d_value, scratch_.weights_by_rows, scratch_.d_out_panel,
               tile_.d_out(), seen);
      add_keys(gradients_.d_key, scratch_.d_key, scratch_.d_scores_by_rows, scratch_.query_panel,
               tile_.queries(), seen);
    }
    if (!task_.owns_rows) return;
    const Matrix<T> d_query{d_query_.row(rows.begin - task_.rows.begin), d_query_.stride};
    add_product(d_query, as_const(scratch_.d_scores_by_keys), key_panel_, keys_are_finite_, rows.size(),
                depth_of<T, Item>(seen.keys.size()), SeenWeights<kNumbers<T, Item>>{seen.band});
  }

  /// sums (keys, dims) += tileᵀ · rows, with the rows packed here.
  void add_keys(const Tensor& wanted, Matrix<T> sums, Matrix<Item> tile, Panel<Item> panel,
                Matrix<const Item> rows, const Seen& seen) const noexcept {
    if (!wanted.given()) return;
    const Index count = tile_.rows().size();
    panel.depth = depth_of<T, Item>(count);
    const bool finite = pack_items<Isa, T>(panel, source_of<T>(rows), 0, count);
    add_product(sums, transposed(as_const(tile)), panel, finite, seen.keys.size(), panel.depth,
                SeenWeights<kNumbers<T, Item>, true>{seen.band});
  }

  template <class A, class Extents>
  void add_product(Matrix<T> c, A a, Panel<Item> b, bool finite, Index rows, Index depth,
                   Extents extents) const noexcept {
    if (finite) return gemm<Isa, T>(c, a, as_const(b), rows, b.columns, depth, Added<T>{}, extents);
    gemm_of_visible<Isa, T>(c, a, as_const(b), rows, depth, Added<T>{});
  }

  void write_keys(Range keys) const noexcept {
    const Tensor &d_key = gradients_.d_key, &d_value = gradients_.d_value;
    const Place& place = task_.sequence.key_place;
    for (Index i = 0; i < min(keys.end, place.tokens) - keys.begin; ++i) {
      const Index batch = place.batch, head = task_.kv_head, key = place.first + keys.begin + i;
      if (d_key.given()) {
        write_row<Isa, T>(scratch_.d_key.row(i), call_.dim, call_.scale, at(d_key, batch, head, key), d_key);
      }
      if (d_value.given()) {
        write_row<Isa, T>(scratch_.d_value.row(i), call_.value_dim, 1, at(d_value, batch, head, key),
                          d_value);
      }
    }
  }

  void write_queries() const noexcept {
    const Tensor& d_query = gradients_.d_query;
    const Task all{.sequence = task_.sequence, .kv_head = task_.kv_head, .rows = task_.rows};
    const TaskRows row_at{call_, all};
    const Index end = min(task_.rows.end, task_.sequence.query_place.tokens * call_.group);
    for (Index row = 0; row < end - task_.rows.begin; ++row) {
      const Row r = row_at(row);
      write_row<Isa, T>(d_query_.row(row), call_.dim, call_.scale, at(d_query, r), d_query);
    }
  }

  static ATTN_INLINE void clear(Matrix<T> m, Index rows) noexcept {
    __builtin_memset(m.data, 0, static_cast<std::size_t>(rows * m.stride) * sizeof(T));
  }

  const Call& call_;
  const Gradients& gradients_;
  const BackwardTask& task_;
  BackwardTile<Isa, T, Item> tile_;
  const BackwardScratch<Isa, T, Item>& scratch_;
  ParameterShares<Isa, T> parameters_;
  Matrix<T> d_query_;  // (rows of the task, dim)
  Panel<Item> key_panel_{};
  bool keys_are_finite_ = true;
};

template <class Isa, class T, class Item>
void backward_task(const BackwardCall& backward, const BackwardTask& task, std::byte* scratch) noexcept {
  BackwardKernel<Isa, T, Item>(backward, task, scratch).run();
}

}  // namespace attncore
