// Elementary functions on registers.
#pragma once

#include "simd.h"

namespace attncore {

// exp(r) − 1 = r + r² p(r) on |r| ≤ ln2 / 2.  p is a minimax fit of the error relative to exp(r) (Lawson's
// algorithm at 40 digits): 3.1e-9 for float, 3.7e-18 for double, so that what remains is rounding.
template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float kRound = 0x1.8p23F;  // x + kRound is x as an integer, in the low bits
  static constexpr float kLog2e = 0x1.715476p+0F;
  static constexpr float kLn2High = 0x1.62e4p-1F, kLn2Low = 0x1.7f7d1cp-20F;  // n · kLn2High is exact
  static constexpr float kSmallest = -87.0F;                                  // exp of less is flushed to 0
  static constexpr int kFractionBits = 23, kBias = 127;
  static constexpr float kPolynomial[] = {0.499999934119765439F, 0.1666652010273597F, 0.0416683943162289228F,
                                          0.00836878088311761634F, 0.00138144620263313049F};
};

template <>
struct ExpConstants<double> {
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLog2e = 0x1.71547652b82fep+0;
  static constexpr double kLn2High = 0x1.62e42fefap-1, kLn2Low = 0x1.cf79abc9e3b39p-40;
  static constexpr double kSmallest = -708.0;
  static constexpr int kFractionBits = 52, kBias = 1023;
  static constexpr double kPolynomial[] = {
      0.500000000000001074,   0.166666666666664103,    0.0416666666665290133,  0.00833333333349548181,
      0.00138888889439648436, 0.000198412695052165229, 2.48014927224628228e-5, 2.75575868529325945e-6,
      2.76303919925196474e-7, 2.50001395690073253e-8};
};

/// x = n ln2 + r: power = 2ⁿ and minus_one = exp(r) − 1, for kSmallest ≤ x ≤ −kSmallest (NaN gives NaN).
template <class V>
struct ExpParts {
  V power, minus_one;
};

template <class Isa, class T>
ATTN_INLINE ExpParts<Vec<Isa, T>> exp_parts(Vec<Isa, T> x) noexcept {
  using V = Vec<Isa, T>;
  using C = ExpConstants<T>;
  using Int = typename Register<typename IntOf<T>::type, kWidth<Isa, T>>::type;
  const V shifted = x * C::kLog2e + C::kRound;
  const V n = shifted - C::kRound;
  const V r = (x - n * C::kLn2High) - n * C::kLn2Low;
  constexpr int kTerms = sizeof(C::kPolynomial) / sizeof(T);
  V p = broadcast<V>(C::kPolynomial[kTerms - 1]);
  for (int i = kTerms - 2; i >= 0; --i) p = p * r + C::kPolynomial[i];
  const Int exponent = (bit_cast<Int>(shifted) + C::kBias) << C::kFractionBits;
  return {bit_cast<V>(exponent), r * r * p + r};
}

/// exp(x) for x ≤ −kSmallest: relative error ≤ 2e-7 (double: 4 ulp); less than kSmallest gives 0, NaN gives
/// NaN.
template <class Isa, class T>
ATTN_INLINE Vec<Isa, T> exp(Vec<Isa, T> x) noexcept {
  const auto parts = exp_parts<Isa, T>(x);
  return x < ExpConstants<T>::kSmallest ? Vec<Isa, T>{} : parts.power * parts.minus_one + parts.power;
}

/// 2^t of what is rounded to 16 bits and fewer afterwards.  An ISA with instructions for a number's whole part specialises it.
template <class Isa>
struct PowerOfTwo {
  static ATTN_INLINE Vec<Isa, float> of(Vec<Isa, float> t) noexcept {
    constexpr float kLn2 = 0x1.62e43p-1F;
    return exp<Isa, float>(t * kLn2);
  }
};

/// Beyond it an origin might overflow in base 2.
inline constexpr float kFarOrigin = 0x1p100F;

/// exp(unit · x − origin), the same; `unit` is a power of two.  The relative error is ≤ 3e-7 + 6e-8 |unit · x − origin|, and
/// 6e-8 |origin|, which weights of one origin share.
template <class Isa>
ATTN_INLINE Vec<Isa, float> rounded_exp(Vec<Isa, float> x, float origin, float unit = 1) noexcept {
  constexpr float kLog2e = ExpConstants<float>::kLog2e;
  if (__builtin_fabsf(origin) > kFarOrigin) [[unlikely]]
    return PowerOfTwo<Isa>::of((x * unit - origin) * kLog2e);
  return PowerOfTwo<Isa>::of(x * (unit * kLog2e) - origin * kLog2e);
}

/// Whether it may be rounded_exp's `unit`: a power of two, positive and far from under- and overflow.
ATTN_INLINE bool folds_into_exponent(float scale) noexcept {
  constexpr std::uint32_t kFraction = 0x7fffff;
  return scale > 0x1p-32F && scale < 0x1p32F && (bit_cast<std::uint32_t>(scale) & kFraction) == 0;
}

/// tanh(x) = −e / (2 + e) with e = exp(−2 |x|) − 1: relative accuracy for small x, where scores mostly are.
template <class Isa, class T>
ATTN_INLINE Vec<Isa, T> tanh(Vec<Isa, T> x) noexcept {
  using V = Vec<Isa, T>;
  const V magnitude = absolute(x);
  const auto parts = exp_parts<Isa, T>(at_least(-2 * magnitude, broadcast<V>(T(-60))));  // tanh(30) is 1
  const V e = parts.power * parts.minus_one + (parts.power - 1);
  const V positive = -e / (2 + e);
  return x < 0 ? -positive : positive;
}

}  // namespace attncore
