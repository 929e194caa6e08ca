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

/// Softmax's weights, over their scores; their sum is of what is multiplied, so that rounding errors of a few large weights
/// cancel out.
template <class Isa>
struct PairWeights {
  static constexpr bool kRounded = true, kGrows = false;
  static ATTN_INLINE Vec<Isa, float> exp(Vec<Isa, float> score, float origin) noexcept {
    return rounded_exp<Isa>(score, origin);
  }
  static ATTN_INLINE void keep(float* scores, Index i, Vec<Isa, float> first, Vec<Isa, float> second,
                               Vec<Isa, float>& sum) noexcept {
    constexpr std::uint32_t kOnes = 0x3f803f80;
    const U32<Isa> pairs = MultiplyPairs<Isa>::narrow(first, second);
    store(static_cast<void*>(scores + i / 2), pairs);
    sum = MultiplyPairs<Isa>::add(pairs, U32<Isa>{} + kOnes, sum);
  }
};

/// `count` items of bfloat16 or of float32, which is rounded, `stride` bytes apart, two by two; the rest is 0.
template <class Isa, DType kStorage>
ATTN_INLINE U32<Isa> load_pairs(const std::byte* p, Index stride, Index count) noexcept {
  constexpr Index kItem = 2, kLanes = kWidth<Isa, float>, n = 2 * kLanes;
  const Index given = max(0, min(count, n));
  if constexpr (kStorage == DType::f32) {
    const Index second = max(0, given - kLanes);
    return MultiplyPairs<Isa>::narrow(load_items<Isa, float, kStorage>(p, stride, given - second),
                                      load_items<Isa, float, kStorage>(p + kLanes * stride, stride, second));
  } else {
    if (count >= n && stride == kItem) return load<U32<Isa>>(p);
    alignas(Isa::kBytes) std::uint16_t items[n]{};
    if (stride == kItem) {
      __builtin_memcpy(items, p, static_cast<std::size_t>(given * kItem));
    } else {
      for (Index i = 0; i < given; ++i) __builtin_memcpy(&items[i], p + i * stride, kItem);
    }
    return load<U32<Isa>>(static_cast<const void*>(items));
  }
}

/// run.template operator()<kStorage>() for what pairs are made of.
template <class Run>
ATTN_INLINE decltype(auto) with_pair_storage(DType dtype, Run run) noexcept {
  return dtype == DType::f32 ? run.template operator()<DType::f32>() : run.template operator()<DType::bf16>();
}

/// panel.h's pack_transposed: `dims` of each key, two by two.
template <class Isa, DType kStorage>
void pack_pairs_transposed(Panel<Bf16Pair> panel, const KeySource& source, Index first, Index dims) noexcept {
  constexpr Index n = kWidth<Isa, float>;
  pack_squares<Isa>(panel, source, first, [&](const std::byte* token, Index pair, bool given) {
    const std::byte* const p = token + 2 * pair * source.dim_stride;
    __builtin_prefetch(p + n * source.token_stride);
    return load_pairs<Isa, kStorage>(p, source.dim_stride, given ? dims - 2 * pair : 0);
  });
}

/// Items of the same columns of two tokens, pair by pair.
template <class Isa>
ATTN_INLINE void pair_up(U32<Isa> even, U32<Isa> odd, U32<Isa>& low, U32<Isa>& high) noexcept {
  using Halves = typename Register<std::uint16_t, Isa::kBytes / 2>::type;
  using Lanes = std::make_integer_sequence<int, Isa::kBytes / 2>;
  const auto a = bit_cast<Halves>(even), b = bit_cast<Halves>(odd);
  low = bit_cast<U32<Isa>>(interleave<false, std::uint16_t>(a, b, Lanes{}));
  high = bit_cast<U32<Isa>>(interleave<true, std::uint16_t>(a, b, Lanes{}));
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
      const std::byte* const even = source.token(first + key) + strip * source.dim_stride;
      const std::byte* const odd = alone ? even : source.token(first + partner) + strip * source.dim_stride;
      for (Index j = 0; j < registers; j += 2) {
        const Index dims = panel.columns - strip - j * n, at = j * n * source.dim_stride;
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
