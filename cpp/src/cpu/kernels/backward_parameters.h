// What a tile's score gradients add to the gradients of the scores' parameters.
//
// A bias without broadcasting takes them as they are.  ALiBi's slopes and the relative bias's table are sums over
// queries and keys: each key tile leaves its share of them in double, and the back end adds the shares in their order.
#pragma once

#include "backward_tile.h"

namespace attncore {

/// Writes a row of the accumulation type to `count` items of a tensor's last axis.
template <class Isa, class T>
void write_row(const T* from, Index count, double scale, std::byte* to, const Tensor& like) noexcept {
  const Index stride = like.stride[3];
  with_storage<T>(like.dtype, [&]<DType kStorage>() {
    for (Index i = 0; i < count; i += kWidth<Isa, T>) {
      const auto items = load<Vec<Isa, T>>(from + i) * static_cast<T>(scale) + T{0};
      store_items<Isa, T, kStorage>(to + i * stride, stride, min(kWidth<Isa, T>, count - i), items);
    }
  });
}

template <class Isa, class T>
class ParameterShares {
 public:
  static ATTN_INLINE Index bytes(const Call& call) noexcept {
    return call.distance_bias.given() ? call.group * line_stride() * Index{sizeof(T)} : 0;
  }

  ParameterShares(const BackwardCall& backward, const BackwardTask& task, std::byte* memory) noexcept
      : call_(backward.call),
        gradients_(backward.gradients),
        task_(task),
        first_head_(task.kv_head * call_.group),
        lines_(reinterpret_cast<T*>(memory)) {}

  void begin_keys(Range keys) noexcept {
    const Index tile = keys.begin / Isa::template kKeyTile<T>;
    alibi_ = relative_ = nullptr;
    if (task_.alibi_shares != nullptr) {
      alibi_ = task_.alibi_shares + tile * call_.group;
      clear_shares(alibi_, call_.group);
    }
    if (task_.relative_shares != nullptr) {
      relative_ = task_.relative_shares + tile * call_.group * call_.distance_bias.buckets;
      clear_shares(relative_, call_.group * call_.distance_bias.buckets);
    }
  }

  void begin_tile(const Block& rows, Range keys) noexcept {
    if (relative_ == nullptr) return;
    first_distance_ = keys.begin - rows.last_position();
    distances_ = keys.end - rows.first_position() - first_distance_;
    for (Index i = 0; i < call_.group * line_stride(); ++i) lines_[i] = 0;
  }

  void add(const Row& row, const T* d_scores, Range keys) const noexcept {
    for (std::size_t i = 0; i < gradients_.d_biases.size; ++i) {
      if ((task_.own_biases >> i & 1U) == 0) continue;
      const Tensor& d_bias = gradients_.d_biases.items[i];
      write_row<Isa, T>(d_scores, keys.size(), 1, at(d_bias, row.batch, row.head, row.query, keys.begin),
                        d_bias);
    }
    const Index head = row.head - first_head_;
    if (alibi_ != nullptr) {
      using M = ScoreMath<Isa, T>;
      V sum{};
      for (Index i = 0; i < keys.size(); i += kWidth<Isa, T>) {
        sum += Alibi::template reduce<M>(row, load<V>(d_scores + i), {keys.begin + i, kWidth<Isa, T>});
      }
      alibi_[head] += static_cast<double>(horizontal_sum<Isa, T>(sum));
    }
    if (relative_ == nullptr) return;
    T* const line = lines_ + head * line_stride() + (keys.begin - row.position - first_distance_);
    for (Index i = 0; i < keys.size(); i += kWidth<Isa, T>) {
      store(line + i, load<V>(line + i) + load<V>(d_scores + i));
    }
  }

  void end_tile() const noexcept {
    if (relative_ == nullptr) return;
    const DistanceBias& bias = call_.distance_bias;
    for (Index head = 0; head < call_.group; ++head) {
      for (Index i = 0; i < distances_; ++i) {
        const Index distance = max(-bias.farthest, min(first_distance_ + i, bias.farthest));
        const Index bucket = bias.bucket[distance + bias.farthest];
        relative_[head * bias.buckets + bucket] += static_cast<double>(lines_[head * line_stride() + i]);
      }
    }
  }

  /// Zeros for the pairs that no tile has visited.
  void write_zeros(Range rows, Range keys) const noexcept {
    if (keys.empty()) return;
    alignas(Isa::kBytes) constexpr T kZeros[kWidth<Isa, T>]{};
    const Task task{.sequence = task_.sequence, .kv_head = task_.kv_head, .rows = rows};
    const TaskRows row_at{call_, task};
    for (std::size_t i = 0; i < gradients_.d_biases.size; ++i) {
      if ((task_.own_biases >> i & 1U) == 0) continue;
      const Tensor& d_bias = gradients_.d_biases.items[i];
      for (Index row = 0; row < rows.size(); ++row) {
        const Row r = row_at(row);
        for (Index key = keys.begin; key < keys.end; key += kWidth<Isa, T>) {
          const Index count = min(kWidth<Isa, T>, keys.end - key);
          write_row<Isa, T>(kZeros, count, 1, at(d_bias, r.batch, r.head, r.query, key), d_bias);
        }
      }
    }
  }

 private:
  using V = Vec<Isa, T>;

  /// Distances of a tile, with room for a register more.
  static ATTN_INLINE Index line_stride() noexcept {
    return Isa::template kKeyTile<T> + kMostBackwardRows + kWidth<Isa, T>;
  }

  static ATTN_INLINE void clear_shares(double* shares, Index count) noexcept {
    for (Index i = 0; i < count; ++i) shares[i] = 0;
  }

  const Call& call_;
  const Gradients& gradients_;
  const BackwardTask& task_;
  Index first_head_;
  T* lines_;  // (group, distances of a tile): sums over its rows
  Index first_distance_ = 0, distances_ = 0;
  double *alibi_ = nullptr, *relative_ = nullptr;  // of the key tile
};

}  // namespace attncore
