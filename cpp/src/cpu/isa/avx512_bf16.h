// What avx512_bf16 and amx share: avx512's tag, and the dot product of bfloat16 pairs.
#pragma once

#include "../kernels/kernels.h"
#include "../tile/pairs.h"
#include "avx512.h"

namespace attncore {

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

/// 2^y = 2^f 2^⌊y⌋; of −∞ the instructions make f = 0 and then 0.
template <>
struct ExpToRound<Avx512> {
  static ATTN_INLINE Vec<Avx512, float> of(Vec<Avx512, float> x) noexcept {
    using V = Vec<Avx512, float>;
    constexpr int kTerms = sizeof kExp2Polynomial / sizeof(float);
    const V y = x * ExpConstants<float>::kLog2e;
    const V f = bit_cast<V>(_mm512_maskz_reduce_ps(0xffff, bit_cast<__m512>(y), _MM_FROUND_TO_NEG_INF));
    V q = broadcast<V>(kExp2Polynomial[kTerms - 1]);
    for (int i = kTerms - 2; i >= 0; --i) q = q * f + kExp2Polynomial[i];
    return bit_cast<V>(_mm512_maskz_scalef_ps(0xffff, bit_cast<__m512>(q * f + 1.0F), bit_cast<__m512>(y)));
  }
};

namespace {
[[maybe_unused]] bool supported_with_pairs() noexcept {
  return supported() && __builtin_cpu_supports("avx512bf16") != 0;
}
}  // namespace

extern const Kernels avx512_f32, avx512_f64;  // what they take but for bfloat16

}  // namespace attncore
