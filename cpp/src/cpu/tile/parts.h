// float16 and float32 as sums of bfloat16, for units that multiply pairs of those (pairs.h) and nothing longer.
//
// A number of 24 bits is the sum of 3 bfloat16, of 8 bits each, exactly, and one of 11 bits that of 2: each part is what is
// left, cut off after 8 bits, so that all have the number's sign.  Of the products of two sums those are taken that matter, the
// small ones first (parts 0, 1, 2 from the large one on):
//
//     2 parts, scores:   A1·B0 + A1·B1 + A0·B1, then A0·B0          exact for float16: scores of 1e4 need it
//     2 parts, P · V:    A1·B0 + A0·B1, then A0·B0                  less 2⁻¹⁴: float16's results are rounded by 2⁻¹¹
//     3 parts:           A2·B0 + A1·B0 + A1·B1 + A0·B1 + A0·B2, then A0·B0        less 2⁻²¹
//
// float16 takes 2 parts; float32 3, or 2 by Precision::high, the second one rounded then.  Weights have as many as values.
//
// An item, Part<n>, stands where a pair would, so that panels and products are the same but for the depth, which counts parts: of
// 16 pairs all first parts, then all second ones, …, then the next 16 pairs.  Depths are whole such runs.  The halves of a pair are
// 16 dims, or keys, apart, as kPartner has it: so numbers are split without moving any from lane to lane.
//
// What a split would harm: Inf and NaN (∞ − ∞), and numbers below 2⁻¹⁰⁰, since the units take subnormal parts for 0.  Packing
// notices them, key by key; kernels/harmed.h multiplies them otherwise.
#pragma once

#include <array>

#include "pairs.h"

namespace attncore {

/// The same part of the two halves of a pair.
template <int kCount>
struct Part {
  Bf16Pair pair;
};

/// Of weights that are rounded to two parts.
struct RoundedPart {
  Bf16Pair pair;
};

template <class Item>
inline constexpr int kParts = 1;
template <int n>
inline constexpr int kParts<Part<n>> = n;
template <>
inline constexpr int kParts<RoundedPart> = 2;

/// Whether items are parts: whether there are more than one.
template <class Item>
inline constexpr bool kSplit = kParts<Item> > 1;

template <class Item>
using WeightOf = std::conditional_t<std::is_same_v<Item, Part<2>>, RoundedPart, Item>;

/// The products of A's parts with B's but for A0·B0, which is the last one.  Each changes but one of both.
struct PartPair {
  int a, b;
};
template <class A>
inline constexpr std::array<PartPair, 0> kSmallProducts{};
template <>
inline constexpr std::array<PartPair, 3> kSmallProducts<Part<2>>{{{1, 0}, {1, 1}, {0, 1}}};
template <>
inline constexpr std::array<PartPair, 2> kSmallProducts<RoundedPart>{{{1, 0}, {0, 1}}};
template <>
inline constexpr std::array<PartPair, 5> kSmallProducts<Part<3>>{{{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}}};

/// How many products of parts stand for one of numbers.
template <class A>
inline constexpr Index kProducts = Index{kSmallProducts<A>.size()} + 1;

inline constexpr Index kRunItems = 2 * kTileDepth;  // dims or keys of 16 pairs

/// Parts over so many dims or keys.
template <int n>
ATTN_INLINE Index parts_depth(Index count) noexcept {
  return n * kTileDepth * ceil_div(count, kRunItems);
}

/// The parts of pairs (first[i], second[i]).
template <class Isa, int n>
ATTN_INLINE void split(Vec<Isa, float> first, Vec<Isa, float> second, U32<Isa>* parts) noexcept {
  constexpr std::uint32_t kUpper = 0xffff0000U, kHalfUnit = 0x8000;
  for (int part = 0; part < n - 1; ++part) {
    const U32<Isa> a = bit_cast<U32<Isa>>(first) & kUpper, b = bit_cast<U32<Isa>>(second) & kUpper;
    parts[part] = a >> 16 | b;
    first -= bit_cast<Vec<Isa, float>>(a);
    second -= bit_cast<Vec<Isa, float>>(b);
  }
  constexpr std::uint32_t kRounding = n == 2 ? kHalfUnit : 0;
  parts[n - 1] =
      (bit_cast<U32<Isa>>(first) + kRounding) >> 16 | ((bit_cast<U32<Isa>>(second) + kRounding) & kUpper);
}

/// What the halves of parts add up to; exactly, if they came from numbers.
template <class Isa, int n>
ATTN_INLINE void join(const U32<Isa>* parts, Vec<Isa, float>& first, Vec<Isa, float>& second) noexcept {
  first = first_of<Isa>(parts[n - 1]);
  second = second_of<Isa>(parts[n - 1]);
  for (int part = n - 2; part >= 0; --part) {
    first += first_of<Isa>(parts[part]);
    second += second_of<Isa>(parts[part]);
  }
}

/// Lanes that a split would harm: all bits set.
template <class Isa>
ATTN_INLINE U32<Isa> harmed_lanes(Vec<Isa, float> items) noexcept {
  constexpr std::uint32_t kLeast = (127U - 100U) << 23U, kInfinity = 0x7f800000U;  // 2⁻¹⁰⁰
  const U32<Isa> magnitude = bit_cast<U32<Isa>>(items) & 0x7fffffffU;
  return bit_cast<U32<Isa>>((magnitude - kLeast >= kInfinity - kLeast) & (magnitude != 0));
}
template <class Isa>
ATTN_INLINE bool any_lane(U32<Isa> lanes) noexcept {
  constexpr std::uint32_t kOne = 0x3f800000U;
  return AnyAbove<Isa, float>::of(bit_cast<Vec<Isa, float>>(lanes & kOne), 0.5F);
}

/// Items from `dim` on, of `dims`, or zeros.
template <class Isa, DType kStorage>
ATTN_INLINE Vec<Isa, float> load_dims(const std::byte* p, Index stride, Index dim, Index dims) noexcept {
  const Index count = max(0, min(kWidth<Isa, float>, dims - dim));
  return load_items<Isa, float, kStorage>(p + dim * stride, stride, count);
}

template <class Isa, DType kStorage>
bool is_harmed(const std::byte* p, Index stride, Index dims) noexcept {
  U32<Isa> harmed{};
  for (Index dim = 0; dim < dims; dim += kWidth<Isa, float>) {
    harmed |= harmed_lanes<Isa>(load_dims<Isa, kStorage>(p, stride, dim, dims));
  }
  return any_lane<Isa>(harmed);
}

/// One bit a key.
using KeyBits = std::uint32_t;
inline constexpr Index kKeyBits = 32;
ATTN_INLINE bool has_key(const KeyBits* bits, Index key) noexcept {
  return (bits[key / kKeyBits] >> key % kKeyBits & 1U) != 0;
}

ATTN_INLINE bool any_key(const KeyBits* bits, Index words) noexcept {
  KeyBits any = 0;
  for (Index i = 0; i < words; ++i) any |= bits[i];
  return any != 0;
}

/// Which of keys first … first + keys − 1 a split would harm.
template <class Isa, DType kStorage>
void find_harmed(const KeySource& source, Index first, Index keys, Index dims, KeyBits* bits) noexcept {
  for (Index key = 0; key < keys; ++key) {
    const KeyBits harmed = is_harmed<Isa, kStorage>(source.token(first + key), source.dim_stride, dims);
    bits[key / kKeyBits] |= harmed << key % kKeyBits;
  }
}

/// run.template operator()<kStorage>() for what parts are made of.
template <class Run>
ATTN_INLINE decltype(auto) with_part_storage(DType dtype, Run run) noexcept {
  return dtype == DType::f32 ? run.template operator()<DType::f32>() : run.template operator()<DType::f16>();
}

/// panel.h's pack_transposed.  Returns whether no item is harmed.
template <class Isa, DType kStorage, int n>
bool pack_parts_transposed(Panel<Part<n>> panel, const KeySource& source, Index first, Index dims) noexcept {
  constexpr Index kKeys = kTileDepth;  // at once
  static_assert(kWidth<Isa, float> == kKeys);
  U32<Isa> harmed{};
  for (Index column = 0; column < panel.columns; column += kKeys) {
    const Index strip = column - column % (Isa::kColumns * kKeys);
    const Index stride = strip_registers<Isa, Part<n>>(panel.columns, strip) * kKeys;
    Part<n>* out = panel.data + strip * panel.depth + (column - strip);
    const Index keys = min(kKeys, panel.columns - column);
    const std::byte* in[kKeys];
    for (Index key = 0; key < kKeys; ++key) in[key] = source.token(first + column + min(key, keys - 1));
    for (Index dim = 0; dim < dims; dim += kRunItems) {
      U32<Isa> block[n][kKeys];
      for (Index key = 0; key < kKeys; ++key) {
        const Index given = key < keys ? dims : 0;
        const auto get = [&](Index from) {
          __builtin_prefetch(in[key] + from * source.dim_stride + kKeys * source.token_stride);
          return load_dims<Isa, kStorage>(in[key], source.dim_stride, from, given);
        };
        const auto low = get(dim), high = get(dim + kTileDepth);
        harmed |= harmed_lanes<Isa>(low) | harmed_lanes<Isa>(high);
        U32<Isa> parts[n];
        split<Isa, n>(low, high, parts);
        for (int part = 0; part < n; ++part) block[part][key] = parts[part];
      }
      for (int part = 0; part < n; ++part) {
        transpose<Isa, Bf16Pair>(block[part]);
        for (Index i = 0; i < kTileDepth; ++i, out += stride) store(static_cast<void*>(out), block[part][i]);
      }
    }
  }
  return !any_lane<Isa>(harmed);
}

/// panel.h's pack_rows, of keys first … first + keys − 1; deeper in the panel is 0.  Returns whether no item is harmed.
template <class Isa, DType kStorage, int n>
bool pack_parts(Panel<Part<n>> panel, const KeySource& source, Index first, Index keys) noexcept {
  constexpr Index kLanes = kWidth<Isa, float>;
  U32<Isa> harmed{};
  for (Index strip = 0; strip < panel.columns; strip += Isa::kColumns * kLanes) {
    const Index stride = strip_registers<Isa, Part<n>>(panel.columns, strip) * kLanes;
    for (Index pair = 0; pair < panel.depth / n; ++pair) {
      const Index run = pair / kTileDepth, key = run * kRunItems + pair % kTileDepth,
                  partner = key + kTileDepth;
      Part<n>* const out = panel.data + strip * panel.depth + (run * (n - 1) * kTileDepth + pair) * stride;
      const std::byte* const token = source.token(first + min(key, keys - 1));
      const std::byte* const other = source.token(first + min(partner, keys - 1));
      for (Index j = 0; j < stride; j += kLanes) {
        const auto get = [&](const std::byte* in, bool given) {
          const Index from = strip + j;
          __builtin_prefetch(in + from * source.dim_stride + kPrefetchTokens * source.token_stride);
          return load_dims<Isa, kStorage>(in, source.dim_stride, from, given ? panel.columns : 0);
        };
        const auto a = get(token, key < keys), b = get(other, partner < keys);
        harmed |= harmed_lanes<Isa>(a) | harmed_lanes<Isa>(b);
        U32<Isa> parts[n];
        split<Isa, n>(a, b, parts);
        for (int part = 0; part < n; ++part) {
          store(static_cast<void*>(out + part * kTileDepth * stride + j), parts[part]);
        }
      }
    }
  }
  return !any_lane<Isa>(harmed);
}

}  // namespace attncore
