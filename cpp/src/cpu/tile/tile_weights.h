// The softmax beside a matrix unit's products.  There, multiply-adds and comparisons of registers start once a cycle instead of
// twice, integers and sums as ever (Sapphire Rapids): weights are rounded, or split, by integers and sums, and a full row of plain
// scores takes ten of the former a register: the scale, the maximum, exp's.
#pragma once

#include "tiles.h"

namespace attncore {

/// How weights are kept, those of keys i + lane and i + 16 + lane in a pair: for products of items.
template <class Isa, class Item>
struct TileWeights;

/// Rounded half up.
template <class Isa>
struct TileWeights<Isa, Bf16Pair> {
  static constexpr bool kRounded = true, kGrows = false;
  using V = Vec<Isa, float>;

  static ATTN_INLINE V exp(V score, float origin, float unit = 1) noexcept {
    return rounded_exp<Isa>(score, origin, unit);
  }

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

/// In parts, which lie where the scores were; three take half as much memory again.  The first part of NaN is NaN, or infinite and
/// the next one NaN: so its products are NaN.
template <class Isa, int n>
struct TileWeights<Isa, Part<n>> {
  static constexpr bool kRounded = n == 2, kGrows = n > 2;
  using V = Vec<Isa, float>;

  /// The difference loses no digit: scores of 1e4 need it.  The relative error is ≤ 3e-7 + 8e-8 |score − origin|.
  static ATTN_INLINE V exp(V score, float origin, float unit = 1) noexcept {
    return PowerOfTwo<Isa>::of((score * unit - origin) * ExpConstants<float>::kLog2e);
  }

  static ATTN_INLINE void keep(float* scores, Index i, V first, V second, V& sum) noexcept {
    static_assert(kWidth<Isa, float> == kTileDepth);
    U32<Isa> parts[n];
    split<Isa, n>(first, second, parts);
    auto* const out = reinterpret_cast<Bf16Pair*>(scores) + i / kRunItems * n * kTileDepth;
    for (int part = 0; part < n; ++part) store(static_cast<void*>(out + part * kTileDepth), parts[part]);
    if constexpr (kRounded) join<Isa, n>(parts, first, second);
    sum += first;
    sum += second;
  }
  static ATTN_INLINE void keep_numbers(float* scores, Index i, V first, V second, V& sum) noexcept {
    keep(scores, i, first, second, sum);
  }
};

/// Keys of a chunk (kernels/forward_pipeline.h).  What is stored for it stays in the first cache, 48 KB.  Of 32 rows, with dims and value
/// dims of 64 (128), in KB:
///
///                stored: two chunks' scores, O, sums      read: Q        keys and values
///     pairs               16         8 (16)                    4 (8)        16 (32)
///     2 parts             16         8 (16)                    8 (16)       32 (64)
///     3 parts             24         8 (16)    4              12 (24)       48 (96)
///
/// Tiles that come from the second cache take 22 cycles instead of 8, but of parts two are loaded for four products, 64 cycles.  32 keys
/// would store half as much, and take a third more instructions.
inline constexpr Index kChunkKeys = 64;

/// Rows' sums of weights, lane by lane as long as tiles of keys go on.
template <class Isa, class Item>
class LaneSums {
 public:
  using V = Vec<Isa, float>;

  void load(const OnlineSoftmax<Isa, float>& softmax, Index rows) noexcept {
    for (Index row = 0; row < rows; ++row) {
      V seen{}, exact{};
      seen[0] = softmax.sum[row];
      exact[0] = softmax.exact_sum[row];
      sums_[row] = {seen, exact};
    }
  }
  void store(const OnlineSoftmax<Isa, float>& softmax, Index rows) const noexcept {
    for (Index row = 0; row < rows; ++row) {
      softmax.sum[row] = horizontal_sum<Isa, float>(sums_[row].seen);
      softmax.exact_sum[row] = kExact ? horizontal_sum<Isa, float>(sums_[row].exact) : softmax.sum[row];
    }
  }
  ATTN_INLINE void add(Index row, float keep, const WeightSums<V>& sums) noexcept {
    sums_[row].seen = sums_[row].seen * keep + sums.seen;
    if constexpr (kExact) sums_[row].exact = sums_[row].exact * keep + sums.exact;
  }

 private:
  static constexpr bool kExact = TileWeights<Isa, Item>::kRounded;  // else they are the same
  WeightSums<V> sums_[2 * kTileRows];
};

}  // namespace attncore
