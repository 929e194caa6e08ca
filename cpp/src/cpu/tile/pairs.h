// bfloat16 two by two, for instructions that multiply pairs and add both products to a float32: half the registers and half
// the instructions of float32's multiply-adds.
//
// A pair stands where a float32 would, so that panels and products are the same but for their depth, which counts pairs:
// (dim 2i, dim 2i + 1) in queries and keys, (key 2i, key 2i + 1) in weights and values (a matrix unit's: kPartner).  A half
// without a partner is paired with 0.
#pragma once

#include "softmax.h"

namespace attncore {

using Bf16Pair = std::uint32_t;  // the first in the lower half

// MultiplyPairs<Isa>::add(a, b, sum) is sum + Σ products, the second one first, rounded each; narrow(low, high) are the nearest
// bfloat16 of both registers' items.

/// What an ISA with a matrix unit specialises (tiles.h).
template <class Isa>
struct TileUnit;
template <class Isa>
concept HasTiles = requires { sizeof(TileUnit<Isa>); };
inline constexpr Index kTileDepth = 16;  // pairs that such a unit multiplies at once

/// sum + both items of each pair.
template <class Isa>
ATTN_INLINE Vec<Isa, float> add_both(U32<Isa> pairs, Vec<Isa, float> sum) noexcept {
  constexpr Bf16Pair kOnes = 0x3f803f80;
  return MultiplyPairs<Isa>::add(pairs, U32<Isa>{} + kOnes, sum);
}

/// Softmax's weights, over their scores; their sum is of what is multiplied, so that rounding errors of a few large weights
/// cancel out.
template <class Isa>
struct PairWeights {
  static constexpr bool kRounded = true, kGrows = false;
  static ATTN_INLINE Vec<Isa, float> exp(Vec<Isa, float> score, float origin, float unit = 1) noexcept {
    return rounded_exp<Isa>(score, origin, unit);
  }
  static ATTN_INLINE void keep(float* scores, Index i, Vec<Isa, float> first, Vec<Isa, float> second,
                               Vec<Isa, float>& sum) noexcept {
    const U32<Isa> pairs = MultiplyPairs<Isa>::narrow(first, second);
    store(static_cast<void*>(scores + i / 2), pairs);
    sum = add_both<Isa>(pairs, sum);
  }
  static ATTN_INLINE void keep_numbers(float* scores, Index i, Vec<Isa, float> first, Vec<Isa, float> second,
                                       Vec<Isa, float>& sum) noexcept {
    keep(scores, i, first, second, sum);
  }
};

/// Items of the same columns of two tokens, pair by pair.
template <class Isa>
ATTN_INLINE void pair_up(U32<Isa> even, U32<Isa> odd, U32<Isa>& low, U32<Isa>& high) noexcept {
  using Halves = typename Register<std::uint16_t, Isa::kBytes / 2>::type;
  using Lanes = std::make_integer_sequence<int, Isa::kBytes / 2>;
  const auto a = bit_cast<Halves>(even), b = bit_cast<Halves>(odd);
  low = bit_cast<U32<Isa>>(interleave<false, std::uint16_t>(a, b, Lanes{}));
  high = bit_cast<U32<Isa>>(interleave<true, std::uint16_t>(a, b, Lanes{}));
}

/// The same, stored beside each other.
template <class Isa>
ATTN_INLINE void store_paired(void* to, U32<Isa> even, U32<Isa> odd) noexcept {
  U32<Isa> low, high;
  pair_up<Isa>(even, odd, low, high);
  store(to, low);
  store(static_cast<void*>(static_cast<std::byte*>(to) + Isa::kBytes), high);
}

/// The nearest bfloat16 of both registers' items, a pair in each lane.
template <class Isa>
ATTN_INLINE U32<Isa> narrow_lanes(Vec<Isa, float> first, Vec<Isa, float> second) noexcept {
  using Halves = typename Register<std::uint16_t, Isa::kBytes / 2>::type;
  const auto halves = bit_cast<Halves>(MultiplyPairs<Isa>::narrow(first, second));
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return bit_cast<U32<Isa>>(
        __builtin_shufflevector(halves, halves, (i / 2 + i % 2 * kWidth<Isa, float>)...));
  }(std::make_integer_sequence<int, Isa::kBytes / 2>{});
}

/// As many items as two registers of float32 have lanes, beside each other, two by two.  float32 is rounded; what keys and values are
/// quantised to is exact.  An ISA with a shorter way specialises it: the same bits.
template <class Isa, DType kStorage>
struct LoadPairs;

/// What is the same of all that know no shorter way than to load one register after the other.
template <class Isa, DType kStorage>
struct OneByOne {
  static constexpr bool kTwo = false;  // whether load(p, first, second) loads two
  /// The same columns of two tokens, pair by pair.
  static ATTN_INLINE void pair_up(const std::byte* even, const std::byte* odd, U32<Isa>& low,
                                  U32<Isa>& high) noexcept {
    using Load = LoadPairs<Isa, kStorage>;
    attncore::pair_up<Isa>(Load::load(even), Load::load(odd), low, high);
  }
};
template <class Isa, DType kStorage>
struct LoadPairs : OneByOne<Isa, kStorage> {
  static ATTN_INLINE U32<Isa> load(const std::byte* p) noexcept {
    constexpr Index kSecond =
        item_offset<kStorage>(kWidth<Isa, float>, sizeof(typename Storage<kStorage>::Item));
    return MultiplyPairs<Isa>::narrow(Widen<Isa, float, kStorage>::load(p),
                                      Widen<Isa, float, kStorage>::load(p + kSecond));
  }
};
template <class Isa>
struct LoadPairs<Isa, DType::bf16> : OneByOne<Isa, DType::bf16> {
  static ATTN_INLINE U32<Isa> load(const std::byte* p) noexcept { return attncore::load<U32<Isa>>(p); }
};

/// `count` items, `stride` bytes apart, two by two; the rest is 0.
template <class Isa, DType kStorage>
ATTN_INLINE U32<Isa> load_pairs(const std::byte* p, Index stride, Index count) noexcept {
  using Item = typename Storage<kStorage>::Item;
  constexpr Index kItem = sizeof(Item), n = 2 * kWidth<Isa, float>;
  if (count >= n && stride == kItem) return LoadPairs<Isa, kStorage>::load(p);
  constexpr Index kRoom = round_up(n * kItem, Isa::kBytes);
  const Index given = item_offset<kStorage>(max(0, min(count, n)), 1);
  alignas(Isa::kBytes) std::byte room[kRoom];
  for (Index at = 0; at < kRoom; at += Isa::kBytes) {
    const Index here = stride == kItem ? max(0, min(given * kItem - at, Isa::kBytes)) : 0;
    store(static_cast<void*>(room + at), FirstBytes<Isa>::load(p + at, here));
  }
  if (stride != kItem) {
    for (Index i = 0; i < given; ++i) __builtin_memcpy(room + i * kItem, p + i * stride, kItem);
  }
  return LoadPairs<Isa, kStorage>::load(room);
}

/// run.template operator()<kStorage>() for what bfloat16 holds.
template <class Run>
ATTN_INLINE decltype(auto) with_exact_storage(DType dtype, Run run) noexcept {
  switch (dtype) {
    case DType::i8:
      return run.template operator()<DType::i8>();
    case DType::f8:
      return run.template operator()<DType::f8>();
    case DType::i4:
      return run.template operator()<DType::i4>();
    default:
      return run.template operator()<DType::bf16>();
  }
}
/// The same for what pairs are packed of.
template <class Run>
ATTN_INLINE decltype(auto) with_pair_storage(DType dtype, Run run) noexcept {
  return dtype == DType::f32 ? run.template operator()<DType::f32>() : with_exact_storage(dtype, run);
}

/// panel.h's pack_transposed: `dims` of each key, two by two.
template <class Isa, DType kStorage>
void pack_pairs_transposed(Panel<Bf16Pair> panel, const KeySource& source, Index first, Index dims) noexcept {
  constexpr Index n = kWidth<Isa, float>;
  pack_squares<Isa>(panel, source, first, [&](const std::byte* token, Index pair, bool given) {
    const std::byte* const p = token + item_offset<kStorage>(2 * pair, source.dim_stride);
    __builtin_prefetch(p + n * source.token_stride);
    return load_pairs<Isa, kStorage>(p, source.dim_stride, given ? dims - 2 * pair : 0);
  });
}

/// Both halves as float32.
template <class Isa>
ATTN_INLINE Vec<Isa, float> first_of(U32<Isa> pairs) noexcept {
  return bit_cast<Vec<Isa, float>>(pairs << 16);
}
template <class Isa>
ATTN_INLINE Vec<Isa, float> second_of(U32<Isa> pairs) noexcept {
  return bit_cast<Vec<Isa, float>>(pairs & 0xffff0000U);
}

/// Pair i of values is of keys first_of_pair(i) and kPartner more.  What a matrix unit reads is a run of 32 keys whose halves are
/// paired: so weights are rounded and paired without moving any from lane to lane.
template <class Isa>
inline constexpr Index kPartner = HasTiles<Isa> ? kTileDepth : 1;
template <class Isa>
ATTN_INLINE Index first_of_pair(Index pair) noexcept {
  return HasTiles<Isa> ? pair / kTileDepth * 2 * kTileDepth + pair % kTileDepth : 2 * pair;
}

/// panel.h's pack_rows: keys first … first + keys − 1, two by two; deeper in the panel is 0.  Returns whether all items are finite, as
/// rounded.
template <class Isa, DType kStorage>
bool pack_pairs(Panel<Bf16Pair> panel, const KeySource& source, Index first, Index keys) noexcept {
  constexpr Index n = kWidth<Isa, float>;
  U32<Isa> poison{};  // the bits of 0 · item: ± 0, or those of NaN
  for (Index strip = 0; strip < panel.columns; strip += Isa::kColumns * n) {
    const Index registers = strip_registers<Isa, Bf16Pair>(panel.columns, strip);
    Bf16Pair* out = panel.data + strip * panel.depth;
    for (Index pair = 0; pair < panel.depth; ++pair, out += registers * n) {
      const Index key = first_of_pair<Isa>(pair), partner = key + kPartner<Isa>;
      if (key >= keys) {
        for (Index j = 0; j < registers; ++j) store(out + j * n, U32<Isa>{});
        continue;
      }
      const bool alone = partner >= keys;
      const Index offset = item_offset<kStorage>(strip, source.dim_stride);
      const std::byte* const even = source.token(first + key) + offset;
      const std::byte* const odd = alone ? even : source.token(first + partner) + offset;
      for (Index j = 0; j < registers; j += 2) {
        const Index dims = panel.columns - strip - j * n;
        const Index at = item_offset<kStorage>(j * n, source.dim_stride);
        __builtin_prefetch(even + at + kPrefetchTokens * source.token_stride);
        __builtin_prefetch(odd + at + kPrefetchTokens * source.token_stride);
        U32<Isa> items[2];
        pair_up<Isa>(load_pairs<Isa, kStorage>(even + at, source.dim_stride, dims),
                     load_pairs<Isa, kStorage>(odd + at, source.dim_stride, alone ? 0 : dims), items[0],
                     items[1]);
        for (Index i = 0; i < min(2, registers - j); ++i) {
          poison |= bit_cast<U32<Isa>>(first_of<Isa>(items[i]) * 0.0F);
          poison |= bit_cast<U32<Isa>>(second_of<Isa>(items[i]) * 0.0F);
          store(out + (j + i) * n, items[i]);
        }
      }
    }
  }
  return horizontal_sum<Isa, float>(bit_cast<Vec<Isa, float>>(poison)) == 0;
}

/// Ones in the halves of a pair of weights that don't mark hidden pairs (is_hidden_mark).
ATTN_INLINE Bf16Pair seen_halves(Bf16Pair weights) noexcept {
  constexpr Bf16Pair kFirst = 0xffff, kSecond = kFirst << 16, kMark = 0x8000;
  return ((weights & kFirst) == kMark ? 0 : kFirst) | ((weights & kSecond) == kMark << 16 ? 0 : kSecond);
}

/// Hidden values, of two keys, become 0, which leaves the sum as it is; the rest has the bits of any other product.
template <class Isa>
struct VisibleTerm<Isa, Bf16Pair> {
  static ATTN_INLINE Vec<Isa, float> add(Bf16Pair weights, U32<Isa> values, Vec<Isa, float> sum) noexcept {
    const U32<Isa> pairs = U32<Isa>{} + weights;
    return MultiplyPairs<Isa>::add(pairs, values & seen_halves(weights), sum);
  }
};

}  // namespace attncore
