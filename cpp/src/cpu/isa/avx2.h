// AVX2, FMA and F16C: Haswell (2013), Zen (2017) and later.
#pragma once

#include "x86.h"

namespace attncore {
namespace {

struct Avx2 {
  static constexpr int kBytes = 32, kRows = 6, kColumns = 2;
  template <class T>
  static constexpr Index kKeyTile = 128;
};

bool supported() noexcept {
  // clang 15 cannot ask for F16C; every CPU with AVX2 has it
  return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0;
}

}  // namespace

template <>
struct ZeroExtend<Avx2, std::uint32_t, std::uint16_t> {
  static ATTN_INLINE U32<Avx2> load(const void* p) noexcept {
    return bit_cast<U32<Avx2>>(_mm256_cvtepu16_epi32(attncore::load<__m128i>(p)));
  }
};

template <>
struct ZeroExtend<Avx2, std::uint32_t, std::uint8_t> {
  static ATTN_INLINE U32<Avx2> load(const void* p) noexcept {
    return bit_cast<U32<Avx2>>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
  }
};

template <>
struct ZeroExtend<Avx2, std::uint64_t, std::uint8_t> {
  using Result = typename Register<std::uint64_t, 4>::type;
  static ATTN_INLINE Result load(const void* p) noexcept {
    int bytes = 0;
    __builtin_memcpy(&bytes, p, sizeof bytes);
    return bit_cast<Result>(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes)));
  }
};

/// Whole words by a masked load; what is left of a word, of 16-bit items, as well.
template <>
struct FirstBytes<Avx2> {
  using Bytes = Register<std::uint8_t, 32>::type;
  static ATTN_INLINE Bytes load(const std::byte* p, Index count) noexcept {
    const auto words = static_cast<int>(count / 4), rest = static_cast<int>(count % 4);
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i whole = _mm256_maskload_epi32(reinterpret_cast<const int*>(p),
                                                _mm256_cmpgt_epi32(_mm256_set1_epi32(words), lanes));
    if (rest == 0) return bit_cast<Bytes>(whole);
    int last = 0;
    __builtin_memcpy(&last, p + 4 * words, static_cast<std::size_t>(rest));
    const __m256i at_last = _mm256_cmpeq_epi32(_mm256_set1_epi32(words), lanes);
    return bit_cast<Bytes>(_mm256_or_si256(whole, _mm256_and_si256(at_last, _mm256_set1_epi32(last))));
  }
};

template <>
struct Widen<Avx2, float, DType::f16> {
  static ATTN_INLINE Vec<Avx2, float> load(const void* p) noexcept {
    return bit_cast<Vec<Avx2, float>>(_mm256_cvtph_ps(attncore::load<__m128i>(p)));
  }
};

template <>
struct Widen<Avx2, float, DType::i8> {
  static ATTN_INLINE Vec<Avx2, float> load(const void* p) noexcept {
    const __m256i items = _mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
    return bit_cast<Vec<Avx2, float>>(_mm256_cvtepi32_ps(items));
  }
};

template <>
struct Widen<Avx2, float, DType::f8> {
  static ATTN_INLINE Vec<Avx2, float> load(const void* p) noexcept {
    const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(p));
    const __m256i half = f8_as_f16(_mm256_cvtepu8_epi16(bytes));
    return bit_cast<Vec<Avx2, float>>(_mm256_cvtph_ps(_mm256_castsi256_si128(half))) * kF8OverF16;
  }
};

template <>
struct AnyAbove<Avx2, float> {
  static ATTN_INLINE bool of(Vec<Avx2, float> v, float bound) noexcept {
    return _mm256_movemask_ps(_mm256_cmp_ps(bit_cast<__m256>(v), _mm256_set1_ps(bound), _CMP_GT_OQ)) != 0;
  }
};

template <>
struct AnyAbove<Avx2, double> {
  static ATTN_INLINE bool of(Vec<Avx2, double> v, double bound) noexcept {
    return _mm256_movemask_pd(_mm256_cmp_pd(bit_cast<__m256d>(v), _mm256_set1_pd(bound), _CMP_GT_OQ)) != 0;
  }
};

template <>
ATTN_INLINE WideProduct<U32<Avx2>> MultiplyWide<Avx2>::of(U32<Avx2> a, std::uint32_t b) noexcept {
  const __m256i by = _mm256_set1_epi64x(b);
  const __m256i even = _mm256_mul_epu32(bit_cast<__m256i>(a), by);
  const __m256i odd = _mm256_mul_epu32(bit_cast<__m256i>(bit_cast<Wide>(a) >> 32U), by);
  return join(bit_cast<Wide>(even), bit_cast<Wide>(odd));
}

}  // namespace attncore
