// The softmax beside a matrix unit's products.  There, multiply-adds and comparisons of registers start once a cycle instead of
// twice, integers and sums as ever (Sapphire Rapids): weights are rounded by integers, and a full row of plain scores takes ten
// of the former a register: the scale, the maximum, exp's.
#pragma once

#include "pairs.h"

namespace attncore {

/// Weights as pairs of bfloat16, rounded half up, of keys i + lane and i + 16 + lane.
template <class Isa>
struct TileWeights {
  static constexpr bool kRounded = true;
  using V = Vec<Isa, float>;

  static ATTN_INLINE V exp(V score, float origin) noexcept { return rounded_exp<Isa>(score, origin); }

  static ATTN_INLINE void keep(float* scores, Index i, V first, V second, V& sum) noexcept {
    keep_numbers(scores, i, plain_nan(first), plain_nan(second), sum);
  }

  /// Of no NaN but such as products of bfloat16 give: rounding would carry out of one that is all ones.
  static ATTN_INLINE void keep_numbers(float* scores, Index i, V first, V second, V& sum) noexcept {
    constexpr std::uint32_t kHalfUnit = 0x8000, kUpper = 0xffff0000U;
    const U32<Isa> low = bit_cast<U32<Isa>>(first) + kHalfUnit;
    const U32<Isa> high = (bit_cast<U32<Isa>>(second) + kHalfUnit) & kUpper;
    const U32<Isa> pairs = low >> 16 | high;
    store(static_cast<void*>(scores + i / 2), pairs);
    sum += first_of<Isa>(pairs);
    sum += bit_cast<V>(high);
  }

 private:
  static ATTN_INLINE V plain_nan(V x) noexcept { return x == x ? x : broadcast<V>(__builtin_nanf("")); }
};

/// Rows of plain scores, unscaled, against so many keys.
inline constexpr Index kPlainKeys = 64;

/// OnlineSoftmax::weigh for a row of them: the same bits.  kFolds: `scale` is a power of two, so that it may be part of the exponent's
/// factor.
template <class Isa, bool kFolds>
ATTN_INLINE WeightSums<Vec<Isa, float>> weigh_plain(const OnlineSoftmax<Isa, float>& softmax, Index row,
                                                    float* scores, float scale, float* keep) noexcept {
  using V = Vec<Isa, float>;
  constexpr Index n = kWidth<Isa, float>, kRegisters = kPlainKeys / n;
  const float unit = kFolds ? scale : 1;
  V score[kRegisters];
  for (Index i = 0; i < kRegisters; ++i)
    score[i] = kFolds ? load<V>(scores + i * n) : load<V>(scores + i * n) * scale;
  V highest = score[0];
  for (Index i = 1; i < kRegisters; ++i) highest = maximum(score[i], highest);
  keep[row] = 1;
  if (AnyAbove<Isa, float>::of(highest, (softmax.maximum[row] + kMaximumLag) / unit)) [[unlikely]]
    keep[row] = softmax.raise(row, horizontal_max<Isa, float>(highest) * unit);

  const float origin = softmax.base(softmax.maximum[row]);
  WeightSums<V> sums{};
  for (Index i = 0; i < kRegisters; i += 2) {
    const V first = rounded_exp<Isa>(score[i], origin, unit);
    const V second = rounded_exp<Isa>(score[i + 1], origin, unit);
    sums.exact += first;
    sums.exact += second;
    TileWeights<Isa>::keep_numbers(scores, i * n, first, second, sums.seen);
  }
  return sums;
}

}  // namespace attncore
