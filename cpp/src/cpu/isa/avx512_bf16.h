// What avx512_bf16 and amx share: avx512's tag, and the dot product of bfloat16 pairs.
#pragma once

#include <bit>

#include "../kernels/kernels.h"
#include "../tile/pairs.h"
#include "avx512.h"

namespace attncore {

namespace {

/// bfloat16's bits of small numbers.
constexpr std::uint16_t bf16_of(float x) noexcept {
  return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(x) >> 16);
}

/// Of −8 … 7 in four bits; a fifth is ignored.
struct I4Table {
  alignas(64) std::uint16_t items[32]{};
  constexpr I4Table() noexcept {
    for (int i = 0; i < 32; ++i) items[i] = bf16_of(static_cast<float>(i % 16 - (i % 16 > 7 ? 16 : 0)));
  }
};
inline constexpr I4Table kI4Table;

/// Both bytes of bfloat16, by the seven low bits of a magnitude.
struct ByteTable {
  alignas(64) std::uint8_t lower[128]{}, upper[128]{};
  constexpr void set(int i, int bits) noexcept {
    lower[i] = static_cast<std::uint8_t>(bits);
    upper[i] = static_cast<std::uint8_t>(bits >> 8);
  }
};
/// 128, of −128, has 0's place.
inline constexpr ByteTable kI8Table = [] {
  ByteTable table;
  table.set(0, bf16_of(128));
  for (int i = 1; i < 128; ++i) table.set(i, bf16_of(static_cast<float>(i)));
  return table;
}();
inline constexpr ByteTable kF8Table = [] {
  ByteTable table;
  constexpr int kNaN = 0x7fc0, kBias = (127 - 7) << 7;
  for (int i = 0; i < 8; ++i) table.set(i, bf16_of(static_cast<float>(i) / 512));  // subnormal
  for (int i = 8; i < 127; ++i) table.set(i, (i << 4) + kBias);
  table.set(127, kNaN);
  return table;
}();

/// Bytes of two tokens, 32 each, item beside item, as LookedUp takes them.
struct PairOrder {
  alignas(64) std::uint8_t at[64]{};
  constexpr PairOrder() noexcept {
    for (int i = 0; i < 64; ++i) {
      const int lane = i / 16, second = i / 8 % 2;
      at[i] = static_cast<std::uint8_t>(i % 2 * 32 + second * 16 + lane * 4 + i % 8 / 2);
    }
  }
};
inline constexpr PairOrder kPairOrder;

}  // namespace

template <>
struct MultiplyPairs<Avx512> {
  static ATTN_INLINE Vec<Avx512, float> add(U32<Avx512> a, U32<Avx512> b, Vec<Avx512, float> sum) noexcept {
    return bit_cast<Vec<Avx512, float>>(
        _mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
  }
  static ATTN_INLINE U32<Avx512> narrow(Vec<Avx512, float> low, Vec<Avx512, float> high) noexcept {
    return bit_cast<U32<Avx512>>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(high), bit_cast<__m512>(low)));
  }
};

/// A byte on each half of 32 bits, its second item on the upper: five bits look the number up, whose fifth may be its neighbour's.
template <>
struct LoadPairs<Avx512, DType::i4> : OneByOne<Avx512, DType::i4> {
  static ATTN_INLINE U32<Avx512> load(const std::byte* p) noexcept {
    constexpr int kSecond = 12;
    const auto bytes = bit_cast<U32<Avx512>>(_mm512_maskz_cvtepu8_epi32(0xffff, attncore::load<__m128i>(p)));
    const __m512i table = attncore::load<__m512i>(static_cast<const void*>(kI4Table.items));
    return bit_cast<U32<Avx512>>(
        _mm512_maskz_permutexvar_epi16(~0U, bit_cast<__m512i>(bytes | bytes << kSecond), table));
  }
};

/// Of int8 and float8: 64 at once.
template <DType kStorage>
struct LookedUp {
  using Pairs = U32<Avx512>;
  static constexpr __mmask64 kAll = ~__mmask64{0};
  static constexpr bool kTwo = true;

  static ATTN_INLINE Pairs load(const std::byte* p) noexcept {
    Pairs first, second;
    look_up(in_order(_mm512_castsi256_si512(attncore::load<__m256i>(p))), first, second);
    return first;
  }
  static ATTN_INLINE void load(const std::byte* p, Pairs& first, Pairs& second) noexcept {
    look_up(in_order(attncore::load<__m512i>(p)), first, second);
  }
  static ATTN_INLINE void pair_up(const std::byte* even, const std::byte* odd, Pairs& low,
                                  Pairs& high) noexcept {
    const __m512i both = _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(attncore::load<__m256i>(even)),
                                                  attncore::load<__m256i>(odd), 1);
    look_up(_mm512_maskz_permutexvar_epi8(kAll, table_at(kPairOrder.at), both), low, high);
  }

 private:
  static constexpr bool kTwosComplement = kStorage == DType::i8;
  static constexpr const ByteTable& kTable = kTwosComplement ? kI8Table : kF8Table;

  static ATTN_INLINE __m512i table_at(const std::uint8_t* p) noexcept {
    return attncore::load<__m512i>(static_cast<const void*>(p));
  }
  static ATTN_INLINE __m512i in_order(__m512i bytes) noexcept {
    return _mm512_maskz_permutexvar_epi64(0xff, _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), bytes);
  }
  /// Of each 128 bits, the lower half becomes `first`.
  static ATTN_INLINE void look_up(__m512i items, Pairs& first, Pairs& second) noexcept {
    constexpr int kOrAnd = 0xf8;  // a | (b & c)
    const __m512i at = kTwosComplement ? _mm512_maskz_abs_epi8(kAll, items) : items;
    const __m512i lower = _mm512_permutex2var_epi8(table_at(kTable.lower), at, table_at(kTable.lower + 64));
    const __mmask64 seen = kTwosComplement ? _mm512_test_epi8_mask(items, items) : kAll;
    const __m512i magnitude =
        _mm512_maskz_permutex2var_epi8(seen, table_at(kTable.upper), at, table_at(kTable.upper + 64));
    const __m512i upper =
        _mm512_ternarylogic_epi32(magnitude, items, _mm512_set1_epi8(static_cast<char>(0x80)), kOrAnd);
    first = bit_cast<Pairs>(_mm512_maskz_unpacklo_epi8(kAll, lower, upper));
    second = bit_cast<Pairs>(_mm512_maskz_unpackhi_epi8(kAll, lower, upper));
  }
};
template <>
struct LoadPairs<Avx512, DType::i8> : LookedUp<DType::i8> {};
template <>
struct LoadPairs<Avx512, DType::f8> : LookedUp<DType::f8> {};

namespace {
[[maybe_unused]] bool supported_with_pairs() noexcept {
  return supported() && __builtin_cpu_supports("avx512bf16") != 0 &&
         __builtin_cpu_supports("avx512vbmi") != 0;
}
}  // namespace

extern const Kernels avx512_f32, avx512_f64;  // what the tables with pairs or tiles share
extern const Kernels avx512_bf16_pairs;       // bfloat16's; amx takes it in layers

}  // namespace attncore
