// The vocabulary of the score steps on a CPU: a register of scores is one row against consecutive keys.
#pragma once

#include "../dtype.h"
#include "math.h"

namespace attncore {

template <class Isa, class T>
struct ScoreMath {
  using Scalar = T;
  using Scores = Vec<Isa, T>;

  /// The keys of a register: first + lane, of which `count` exist.
  struct Keys {
    Index first;
    Index count;
  };

  static ATTN_INLINE Scores hidden() noexcept { return broadcast<Scores>(-static_cast<T>(__builtin_inf())); }

  static ATTN_INLINE Scores tanh(Scores x) noexcept { return attncore::tanh<Isa, T>(x); }

  /// Keeps the scores of keys low … high.
  static ATTN_INLINE Scores hide_outside(Scores s, const Keys& keys, Index low, Index high) noexcept {
    constexpr Index kLast = kWidth<Isa, T>;
    const T from = static_cast<T>(max(-1, min(low - keys.first, kLast)));
    const T to = static_cast<T>(max(-1, min(high - keys.first, kLast)));
    const Scores lane = lanes<Isa, T>();
    return ((lane >= from) & (lane <= to)) ? s : hidden();
  }

  static ATTN_INLINE Scores hide_where_zero(Scores s, const std::byte* mask, Index stride,
                                            const Keys& keys) noexcept {
    constexpr int n = kWidth<Isa, T>;
    using Extend = ZeroExtend<Isa, typename IntOf<T>::unsigned_type, std::uint8_t>;
    if (stride == 1 && keys.count == n) return Extend::load(mask) != 0 ? s : hidden();
    std::byte bytes[n]{};
    for (Index i = 0; i < keys.count; ++i) bytes[i] = mask[i * stride];
    return Extend::load(bytes) != 0 ? s : hidden();
  }

  /// Bit i of the words is for key first + i; keys before `first` are not hidden.
  static ATTN_INLINE Scores hide_where_clear(Scores s, const std::uint64_t* words, Index first,
                                             const Keys& keys) noexcept {
    for (Index i = max(0, first - keys.first); i < keys.count; ++i) {
      const Index bit = keys.first + i - first;
      if ((words[bit / 64] >> (bit % 64) & 1U) == 0) s[i] = -static_cast<T>(__builtin_inf());
    }
    return s;
  }

  static ATTN_INLINE Scores hide_where_unequal(Scores s, const std::byte* segments, const Tensor& like,
                                               Index segment, const Keys& keys) noexcept {
    for (Index i = 0; i < keys.count; ++i) {
      if (read_int(segments + i * like.stride[2], like.dtype) != segment)
        s[i] = -static_cast<T>(__builtin_inf());
    }
    return s;
  }

  /// s + bias; a bias of −inf hides the key even where s is NaN.
  static ATTN_INLINE Scores add_or_hide(Scores s, Scores bias) noexcept {
    return bias == hidden() ? bias : s + bias;
  }

  /// run(load) with load(keys): a register of the row that begins at `line`.
  template <class Run>
  static ATTN_INLINE void with_line(const std::byte* line, const Tensor& like, Run run) noexcept {
    const Index stride = like.stride[3];
    if (stride == 0) {
      const Scores item = broadcast<Scores>(load_one(line, like.dtype));
      return run([&](const Keys&) { return item; });
    }
    with_storage<T>(like.dtype, [&]<DType kStorage>() {
      run([&](const Keys& keys) {
        return load_items<Isa, T, kStorage>(line + keys.first * stride, stride, keys.count);
      });
    });
  }

  static ATTN_INLINE T load_one(const std::byte* p, DType dtype) noexcept {
    return load_scalar<Isa, T>(p, dtype);
  }

  /// line[distance + lane] of a line over −farthest … farthest that goes on beyond its ends.
  static ATTN_INLINE Scores by_distance(const T* line, Index farthest, Index distance) noexcept {
    constexpr Index n = kWidth<Isa, T>;
    const T* const middle = line + farthest;
    if (distance >= farthest) return broadcast<Scores>(middle[farthest]);
    if (distance + n <= -farthest) return broadcast<Scores>(middle[-farthest]);
    if (distance >= -farthest && distance + n <= farthest) return attncore::load<Scores>(middle + distance);
    Scores s{};
    for (Index i = 0; i < n; ++i) s[i] = middle[max(-farthest, min(distance + i, farthest))];
    return s;
  }

  /// |position − key|
  static ATTN_INLINE Scores distance(Index position, const Keys& keys) noexcept {
    return absolute(static_cast<T>(position - keys.first) - lanes<Isa, T>());
  }
};

}  // namespace attncore
