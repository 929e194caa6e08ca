// AVX2, FMA and F16C: Haswell (2013), Zen (2017) and later.
#include <immintrin.h>

#include "isa.h"

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
struct Widen<Avx2, float, DType::f16> {
  static ATTN_INLINE Vec<Avx2, float> load(const void* p) noexcept {
    return bit_cast<Vec<Avx2, float>>(_mm256_cvtph_ps(attncore::load<__m128i>(p)));
  }
};

extern constinit const IsaTable avx2 = make_table<Avx2>("avx2", supported);

}  // namespace attncore
