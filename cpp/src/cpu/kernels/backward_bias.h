// The gradient of a bias that is broadcast: a pass of its own, whose tasks each own a tile of it and go through all the
// batch entries, heads, queries and keys that the tile is repeated for.
#pragma once

#include "backward_parameters.h"

namespace attncore {

template <class Isa, class T, class Item>
class BackwardBiasKernel {
 public:
  static Index bytes(const Call& call) noexcept {
    const Index rows = max(bias_queries(call), 1) * call.group;
    return BackwardScratch<Isa, T, Item>::in(nullptr, call).bytes + rows * row_items() * Index{sizeof(T)};
  }

  /// Queries of a tile of a bias's gradient.
  static Index bias_queries(const Call& call) noexcept {
    return max(1, 2 * backward_rows(call, Isa::kRows) / call.group);
  }

  BackwardBiasKernel(const BackwardCall& backward, const BackwardBiasTask& task, std::byte* memory) noexcept
      : backward_(backward),
        call_(backward.call),
        task_(task),
        d_bias_(backward.gradients.d_biases.items[task.bias]),
        memory_(memory),
        sums_{reinterpret_cast<T*>(memory + BackwardScratch<Isa, T, Item>::in(nullptr, call_).bytes),
              row_items()} {}

  void run() noexcept {
    __builtin_memset(sums_.data, 0, static_cast<std::size_t>(sum_rows() * sums_.stride) * sizeof(T));
    for (Index batch = task_.batches.begin; batch < task_.batches.end; ++batch) {
      for (Index head = task_.kv_heads.begin; head < task_.kv_heads.end; ++head) {
        if (!add_head(task_.sequences[batch], head)) return;
      }
    }
    write();
  }

 private:
  static ATTN_INLINE Index row_items() noexcept { return Isa::template kKeyTile<T>; }
  [[nodiscard]] bool sums_heads() const noexcept { return d_bias_.stride[1] == 0; }
  [[nodiscard]] bool sums_queries() const noexcept { return d_bias_.stride[2] == 0; }
  [[nodiscard]] bool sums_keys() const noexcept { return d_bias_.stride[3] == 0; }
  [[nodiscard]] Index sum_heads() const noexcept { return sums_heads() ? 1 : call_.group; }
  [[nodiscard]] Index sum_rows() const noexcept {
    return (sums_queries() ? 1 : task_.queries.size()) * sum_heads();
  }

  /// False: the call was cancelled.
  bool add_head(const Sequence& sequence, Index kv_head) noexcept {
    const Index most = backward_rows(call_, Isa::kRows);
    const Index key_tile = Isa::template kKeyTile<T>;
    const Range queries = intersect(task_.queries, {0, sequence.queries});
    const Range all_keys = intersect(task_.keys, {0, sequence.keys});
    BackwardTile<Isa, T, Item> tile(backward_, sequence, kv_head, memory_, task_.stats);
    for (Index key = all_keys.begin; key < all_keys.end; key += key_tile) {
      const Range keys{key, min(key + key_tile, all_keys.end)};
      bool loaded = false;
      for (Index row = queries.begin * call_.group; row < queries.end * call_.group; row += most) {
        const Range rows{row, min(row + most, queries.end * call_.group)};
        const auto seen = tile.look(rows, keys);
        if (seen.keys.empty()) continue;
        if (task_.poll()) return false;
        if (!loaded) {
          tile.load_keys(keys);
          tile.load_values(keys);
          loaded = true;
        }
        tile.load_rows(rows);
        tile.differentiate(seen, [&](const Row& r, const T* d_scores) {
          add(r, r.head - kv_head * call_.group, d_scores, seen.keys.size());
        });
      }
    }
    return true;
  }

  void add(const Row& row, Index head, const T* d_scores, Index count) const noexcept {
    const Index query = sums_queries() ? 0 : row.query - task_.queries.begin;
    T* const sums = sums_.row(query * sum_heads() + (sums_heads() ? 0 : head));
    V total{};
    for (Index i = 0; i < count; i += kWidth<Isa, T>) {
      const V d = load<V>(d_scores + i);
      if (sums_keys()) {
        total += d;
      } else {
        store(sums + i, load<V>(sums + i) + d);
      }
    }
    if (sums_keys()) sums[0] += horizontal_sum<Isa, T>(total);
  }

  void write() const noexcept {
    const Index keys = sums_keys() ? 1 : task_.keys.size();
    for (Index row = 0; row < sum_rows(); ++row) {
      const Index head = task_.kv_heads.begin * call_.group + row % sum_heads();
      const Index query = task_.queries.begin + row / sum_heads();
      write_row<Isa, T>(sums_.row(row), keys, 1,
                        at(d_bias_, task_.batches.begin, head, query, task_.keys.begin), d_bias_);
    }
  }

  using V = Vec<Isa, T>;
  const BackwardCall& backward_;
  const Call& call_;
  const BackwardBiasTask& task_;
  const Tensor& d_bias_;
  std::byte* memory_;
  Matrix<T> sums_;  // (queries of the tile or 1, heads of the group or 1; key tile)
};

template <class Isa, class T, class Item>
void backward_bias_task(const BackwardCall& backward, const BackwardBiasTask& task,
                        std::byte* scratch) noexcept {
  BackwardBiasKernel<Isa, T, Item>(backward, task, scratch).run();
}

}  // namespace attncore
