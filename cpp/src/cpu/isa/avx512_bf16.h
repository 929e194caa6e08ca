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

namespace {
[[maybe_unused]] bool supported_with_pairs() noexcept {
  return supported() && __builtin_cpu_supports("avx512bf16") != 0;
}
}  // namespace

extern const Kernels avx512_f32, avx512_f64;  // what they take but for bfloat16

}  // namespace attncore
