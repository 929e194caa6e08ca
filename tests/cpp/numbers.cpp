// Elementary functions and 16-bit formats of one ISA, against the C library and the formats' definitions.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "isa_test.h"

namespace {

using namespace attncore;

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <class T>
constexpr T kNan = std::numeric_limits<T>::quiet_NaN();

template <class T>
using Bits = typename IntOf<T>::unsigned_type;

struct Error {
  double relative = 0, ulps = 0;
};

/// The largest error of run(register) against want(item), over some `count` numbers of either sign and of all
/// magnitudes low … high.
template <class T, class Run, class Want>
Error largest_error(T low, T high, int count, Run run, Want want) {
  using V = Vec<Isa, T>;
  constexpr int n = kWidth<Isa, T>;
  const auto first = std::bit_cast<Bits<T>>(low), last = std::bit_cast<Bits<T>>(high);
  const Bits<T> step = std::max<Bits<T>>(1, (last - first) / static_cast<Bits<T>>(count));
  Error worst;
  for (Bits<T> bits = first; bits < last; bits += n * step) {
    V x;
    for (int i = 0; i < n; ++i) {
      x[i] = std::bit_cast<T>(static_cast<Bits<T>>(bits + i * step));
      x[i] = std::min(x[i], high);
    }
    for (const V& signed_x : {x, -x}) {
      const V y = run(signed_x);
      for (int i = 0; i < n; ++i) {
        const auto expected = want(signed_x[i]);
        const double error = static_cast<double>(std::fabs(y[i] - expected));
        const int exponent = std::max(std::ilogb(expected), std::numeric_limits<T>::min_exponent - 1);
        worst.relative = std::max(worst.relative, error / static_cast<double>(std::fabs(expected)));
        worst.ulps = std::max(worst.ulps, std::ldexp(error, std::numeric_limits<T>::digits - 1 - exponent));
      }
    }
  }
  return worst;
}

template <class T>
T exp_of(T x) {
  return attncore::exp<Isa, T>(broadcast<Vec<Isa, T>>(x))[0];
}

template <class T>
T tanh_of(T x) {
  return attncore::tanh<Isa, T>(broadcast<Vec<Isa, T>>(x))[0];
}

template <class T>
void exp_at_special_values() {
  constexpr T kSmallest = ExpConstants<T>::kSmallest;
  for (const T x :
       {-kInfinity<T>, std::numeric_limits<T>::lowest(), T(-1e6), std::nextafter(kSmallest, -kInfinity<T>)}) {
    CHECK(exp_of(x) == 0);
    CHECK(!std::signbit(exp_of(x)));
  }
  CHECK(exp_of(kSmallest) > 0);
  for (const T x : {T(0), -T(0), std::numeric_limits<T>::denorm_min()}) CHECK(exp_of(x) == 1);
  for (const T x : {kNan<T>, -kNan<T>}) CHECK(std::isnan(exp_of(x)));
}

void exponential() {
  const auto run_float = [](Vec<Isa, float> x) { return attncore::exp<Isa, float>(x); };
  const auto run_double = [](Vec<Isa, double> x) { return attncore::exp<Isa, double>(x); };
  const Error f =
      largest_error<float>(0x1p-40F, 87.0F, 500000, run_float, [](double x) { return std::exp(x); });
  const Error d =
      largest_error<double>(0x1p-60, 708.0, 50000, run_double, [](long double x) { return std::exp(x); });
  // Evenly over −87 … 0 too, where magnitudes alone would leave most numbers near 0.
  double even = 0;
  for (int i = 0; i < 870000; ++i) {
    const float x = -static_cast<float>(i) * 1e-4F;
    const double want = std::exp(double{x});
    even = std::max(even, std::fabs(double{exp_of(x)} - want) / want);
  }
  std::printf("exp: float %.3g (evenly %.3g), double %.3g ulp\n", f.relative, even, d.ulps);
  CHECK(f.relative <= 2e-7);
  CHECK(even <= 2e-7);
  CHECK(d.ulps <= 4);
  exp_at_special_values<float>();
  exp_at_special_values<double>();
}

template <class T>
void tanh_at_special_values() {
  CHECK(tanh_of(kInfinity<T>) == 1);
  CHECK(tanh_of(-kInfinity<T>) == -1);
  CHECK(tanh_of(std::numeric_limits<T>::max()) == 1);
  for (const T x : {T(0), -T(0)}) CHECK(tanh_of(x) == 0);
  for (const T x : {kNan<T>, -kNan<T>}) CHECK(std::isnan(tanh_of(x)));
  Random random;
  for (int i = 0; i < 2000; ++i) {
    const T x = std::ldexp(static_cast<T>(random.number()), random.below(40) - 30);
    CHECK(tanh_of(-x) == -tanh_of(x));
    CHECK(std::fabs(tanh_of(x)) <= 1);
  }
}

void hyperbolic_tangent() {
  const auto run_float = [](Vec<Isa, float> x) { return attncore::tanh<Isa, float>(x); };
  const auto run_double = [](Vec<Isa, double> x) { return attncore::tanh<Isa, double>(x); };
  const Error f =
      largest_error<float>(1e-8F, 100.0F, 500000, run_float, [](double x) { return std::tanh(x); });
  const Error d =
      largest_error<double>(1e-8, 100.0, 50000, run_double, [](long double x) { return std::tanh(x); });
  std::printf("tanh: float %.3g ulp, double %.3g ulp\n", f.ulps, d.ulps);
  CHECK(f.ulps <= 4);
  CHECK(d.ulps <= 4);
  tanh_at_special_values<float>();
  tanh_at_special_values<double>();
}

/// A 16-bit format: a sign, then the exponent, then the fraction.
template <DType kStorage>
struct Format {
  static constexpr int kFraction = kStorage == DType::f16 ? 10 : 7;
  static constexpr int kMost = (1 << (15 - kFraction)) - 1;  // exponent field of Inf and NaN
  static constexpr int kBias = kMost / 2;
  static constexpr int kLowest = 1 - kBias;  // exponent of subnormals

  /// What a pattern means.
  static double value(unsigned pattern) {
    const int exponent = static_cast<int>(pattern >> kFraction) & kMost;
    const int fraction = static_cast<int>(pattern) & ((1 << kFraction) - 1);
    double magnitude =
        std::ldexp(fraction + (exponent > 0 ? 1 << kFraction : 0), std::max(exponent, 1) - kBias - kFraction);
    if (exponent == kMost) magnitude = fraction == 0 ? kInfinity<double> : kNan<double>;
    return (pattern >> 15U) != 0 ? -magnitude : magnitude;
  }

  /// The value nearest to x, of two the one with an even pattern.
  static double nearest(float x) {
    if (x == 0 || !std::isfinite(x)) return x;
    const double quantum = std::ldexp(1, std::max(std::ilogb(x), kLowest) - kFraction);
    const double rounded = std::nearbyint(x / quantum) * quantum;
    return std::fabs(rounded) >= std::ldexp(1, kBias + 1) ? std::copysign(kInfinity<double>, rounded)
                                                          : rounded;
  }
};

bool same(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

template <DType kStorage>
void check_narrow(const std::vector<float>& numbers) {
  constexpr std::size_t n = kWidth<Isa, float>;
  for (std::size_t i = 0; i + n <= numbers.size(); i += n) {
    std::uint16_t patterns[n];
    store_as<Isa, float, kStorage>(patterns, load<Vec<Isa, float>>(&numbers[i]));
    for (std::size_t j = 0; j < n; ++j) {
      CHECK(same(Format<kStorage>::value(patterns[j]), Format<kStorage>::nearest(numbers[i + j])));
    }
  }
}

/// Every pattern widens to what it means, and narrows to itself.
template <DType kStorage>
void every_pattern() {
  constexpr unsigned n = kWidth<Isa, float>;
  for (unsigned first = 0; first < 65536; first += n) {
    std::uint16_t patterns[n], back[n];
    for (unsigned i = 0; i < n; ++i) patterns[i] = static_cast<std::uint16_t>(first + i);
    const auto wide = Widen<Isa, float, kStorage>::load(patterns);
    store_as<Isa, float, kStorage>(back, wide);
    for (unsigned i = 0; i < n; ++i) {
      CHECK(same(wide[i], Format<kStorage>::value(first + i)));
      CHECK(patterns[i] == back[i] || std::isnan(wide[i]));
      CHECK(same(wide[i], Format<kStorage>::value(back[i])));
    }
  }
}

/// Halfway between every two neighbours, the floats next to that, and beyond the largest.
template <DType kStorage>
void ties() {
  std::vector<float> numbers;
  for (unsigned pattern = 0; Format<kStorage>::value(pattern) < kInfinity<double>; ++pattern) {
    const double low = Format<kStorage>::value(pattern);
    double high = Format<kStorage>::value(pattern + 1);
    if (std::isinf(high)) high = std::ldexp(1, Format<kStorage>::kBias + 1);
    const auto middle = static_cast<float>((low + high) / 2);
    for (const float x : {middle, std::nextafter(middle, 0.0F), std::nextafter(middle, kInfinity<float>)}) {
      numbers.push_back(x);
      numbers.push_back(-x);
    }
  }
  numbers.resize(numbers.size() / kWidth<Isa, float> * kWidth<Isa, float> + kWidth<Isa, float>, kNan<float>);
  check_narrow<kStorage>(numbers);
}

template <DType kStorage>
void any_floats() {
  using Limits = std::numeric_limits<float>;
  std::vector<float> numbers{0.0F,
                             -0.0F,
                             Limits::denorm_min(),
                             Limits::min(),
                             Limits::max(),
                             Limits::lowest(),
                             kInfinity<float>,
                             -kInfinity<float>,
                             kNan<float>,
                             -kNan<float>};
  for (const std::uint32_t nan : {0x7f800001U, 0xff800001U, 0x7fffffffU, 0xffffffffU, 0x7fbfffffU}) {
    numbers.push_back(std::bit_cast<float>(nan));
  }
  Random random;
  while (numbers.size() % 64 != 0 || numbers.size() < 200000)
    numbers.push_back(std::bit_cast<float>(random.bits()));
  for (int i = 0; i < 64000; ++i)
    numbers.push_back(std::ldexp(random.number(), random.below(46) - 28));  // in f16's range
  check_narrow<kStorage>(numbers);
}

template <DType kStorage>
void sixteen_bits() {
  every_pattern<kStorage>();
  ties<kStorage>();
  any_floats<kStorage>();
}

}  // namespace

void test() {
  exponential();
  hyperbolic_tangent();
  sixteen_bits<DType::f16>();
  sixteen_bits<DType::bf16>();
}
