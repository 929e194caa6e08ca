// AVX-512 F, BW, DQ and VL: Skylake-SP (2017), Zen 4 (2022) and later.
#pragma once

#include "../tile/math.h"
#include "x86.h"

namespace attncore {
namespace {

struct Avx512 {
  static constexpr int kBytes = 64, kRows = 6, kColumns = 4;
  template <class T>
  static constexpr Index kKeyTile = 128;
};

bool supported() noexcept {
  return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
         __builtin_cpu_supports("avx512dq") != 0 && __builtin_cpu_supports("avx512vl") != 0 &&
         __builtin_cpu_supports("fma") != 0;  // F16C came long before
}

}  // namespace

template <>
struct ZeroExtend<Avx512, std::uint32_t, std::uint16_t> {
  static ATTN_INLINE U32<Avx512> load(const void* p) noexcept {
    return bit_cast<U32<Avx512>>(_mm512_maskz_cvtepu16_epi32(0xffff, attncore::load<__m256i>(p)));
  }
};

template <>
struct ZeroExtend<Avx512, std::uint32_t, std::uint8_t> {
  static ATTN_INLINE U32<Avx512> load(const void* p) noexcept {
    return bit_cast<U32<Avx512>>(_mm512_maskz_cvtepu8_epi32(0xffff, attncore::load<__m128i>(p)));
  }
};

template <>
struct ZeroExtend<Avx512, std::uint64_t, std::uint8_t> {
  using Result = typename Register<std::uint64_t, 8>::type;
  static ATTN_INLINE Result load(const void* p) noexcept {
    return bit_cast<Result>(
        _mm512_maskz_cvtepu8_epi64(0xff, _mm_loadl_epi64(static_cast<const __m128i*>(p))));
  }
};

template <>
struct FirstBytes<Avx512> {
  using Bytes = Register<std::uint8_t, 64>::type;
  static ATTN_INLINE Bytes load(const std::byte* p, Index count) noexcept {
    const __mmask64 first = count < 64 ? (__mmask64{1} << count) - 1 : ~__mmask64{0};
    return bit_cast<Bytes>(_mm512_maskz_loadu_epi8(first, p));
  }
};

template <>
struct Widen<Avx512, float, DType::f16> {
  static ATTN_INLINE Vec<Avx512, float> load(const void* p) noexcept {
    return bit_cast<Vec<Avx512, float>>(_mm512_maskz_cvtph_ps(0xffff, attncore::load<__m256i>(p)));
  }
};

template <>
struct Widen<Avx512, float, DType::i8> {
  static ATTN_INLINE Vec<Avx512, float> load(const void* p) noexcept {
    const __m512i items = _mm512_maskz_cvtepi8_epi32(0xffff, attncore::load<__m128i>(p));
    return bit_cast<Vec<Avx512, float>>(_mm512_maskz_cvtepi32_ps(0xffff, items));
  }
};

template <>
struct Widen<Avx512, float, DType::f8> {
  static ATTN_INLINE Vec<Avx512, float> load(const void* p) noexcept {
    const __m256i half = f8_as_f16(_mm256_cvtepu8_epi16(attncore::load<__m128i>(p)));
    return bit_cast<Vec<Avx512, float>>(_mm512_maskz_cvtph_ps(0xffff, half)) * kF8OverF16;
  }
};

template <>
struct AnyAbove<Avx512, float> {
  static ATTN_INLINE bool of(Vec<Avx512, float> v, float bound) noexcept {
    return _mm512_cmp_ps_mask(bit_cast<__m512>(v), _mm512_set1_ps(bound), _CMP_GT_OQ) != 0;
  }
};

template <>
struct AnyAbove<Avx512, double> {
  static ATTN_INLINE bool of(Vec<Avx512, double> v, double bound) noexcept {
    return _mm512_cmp_pd_mask(bit_cast<__m512d>(v), _mm512_set1_pd(bound), _CMP_GT_OQ) != 0;
  }
};

/// 2^t = 2^⌊t⌋ · 2^f, f = t − ⌊t⌋: a minimax fit of its error relative to 2^f (8e-8) that is 1 at 0.  Numbers too small become 0.
template <>
struct PowerOfTwo<Avx512> {
  static ATTN_INLINE Vec<Avx512, float> of(Vec<Avx512, float> t) noexcept {
    using V = Vec<Avx512, float>;
    constexpr int kFloor = 1, kQuiet = 8;
    constexpr float kPolynomial[] = {0.6931512951850891F, 0.24016444385051727F, 0.05579991266131401F,
                                     0.009017030708491802F, 0.0018671300495043397F};
    const V f = bit_cast<V>(_mm512_maskz_reduce_ps(0xffff, bit_cast<__m512>(t), kFloor | kQuiet));
    V p = broadcast<V>(kPolynomial[4]);
    for (int i = 3; i >= 0; --i) p = p * f + kPolynomial[i];
    return bit_cast<V>(_mm512_maskz_scalef_ps(0xffff, bit_cast<__m512>(p * f + 1), bit_cast<__m512>(t)));
  }
};

template <>
ATTN_INLINE WideProduct<U32<Avx512>> MultiplyWide<Avx512>::of(U32<Avx512> a, std::uint32_t b) noexcept {
  const __m512i by = _mm512_set1_epi64(b);
  const __m512i even = _mm512_maskz_mul_epu32(0xff, bit_cast<__m512i>(a), by);
  const __m512i odd = _mm512_maskz_mul_epu32(0xff, bit_cast<__m512i>(bit_cast<Wide>(a) >> 32U), by);
  const __m512i high =
      _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);  // even lanes: the upper halves
  return {bit_cast<U32<Avx512>>(high), a * b};
}

}  // namespace attncore
