// What the x86 ISAs share.
#pragma once

#include <immintrin.h>

#include "../tile/coins.h"

namespace attncore {

/// float8_e4m3fn, each in 16 bits, as float16 of 2⁻⁸ times the value: the exponent's bias is 7 there and 15 here.  Its largest
/// magnitude is a NaN.
ATTN_INLINE __m256i f8_as_f16(__m256i bits) noexcept {
  const __m256i halves =
      _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(bits, 8), 1), _mm256_set1_epi16(-0x4001));
  const __m256i magnitude = _mm256_and_si256(halves, _mm256_set1_epi16(0x3fff));
  const __m256i is_nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x3f80));
  return _mm256_or_si256(halves, _mm256_and_si256(is_nan, _mm256_set1_epi16(0x7e00)));
}
inline constexpr float kF8OverF16 = 256;

}  // namespace attncore
