#include "cache_format.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "cpu/kernels/rotate.h"
#include "number.h"
#include "require.h"

namespace attncore {
namespace {

// What the largest number of a row becomes.
constexpr double kMost8 = 127, kMost4 = 7, kMostF8 = 448;

constexpr std::int32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000;

/// x / scale by a multiplication with 1 / scale, to a multiple of 2⁻³⁷, of quotients below 2¹⁰.  Each rounding below
/// makes of it what it makes of the quotient: of that, a tie is a multiple of 2⁻¹⁰, and what is none is farther than
/// 2⁻³⁶ from each tie, since a float has 24 bits.  So the error is at most half a step.
ATTN_INLINE double quotient(float x, double reciprocal) noexcept {
  constexpr double kLast = 0x1.8p15;  // its last bit
  return (x * reciprocal + kLast) - kLast;
}

/// To the nearest integer, ties to even, of |x| < 2³¹: x + 1.5·2⁵² has it in its last bits.
ATTN_INLINE std::int32_t nearest(double x) noexcept {
  return static_cast<std::int32_t>(std::bit_cast<std::uint64_t>(x + 0x1.8p52));
}

/// x / scale to float8_e4m3fn: 1 bit of sign, 4 of exponent (bias 7), 3 of fraction; ties to even.
ATTN_INLINE std::byte to_f8(float x, double reciprocal) noexcept {
  const double size = quotient(std::fabs(x), reciprocal);
  const auto bits = std::bit_cast<std::uint64_t>(size);
  // Below 2⁻⁶ the result is a multiple of 2⁻⁹: adding 2⁴³ leaves it, rounded, at the end of the sum.
  const std::uint64_t subnormal =
      std::bit_cast<std::uint64_t>(size + 0x1p43) - std::bit_cast<std::uint64_t>(0x1p43);
  // Else the exponent's bias changes by 1023 − 7 and 49 bits are rounded away.
  constexpr std::uint64_t kBias = std::uint64_t{1016} << 52U, kHalf = (std::uint64_t{1} << 48U) - 1;
  const std::uint64_t normal = (bits - kBias + kHalf + ((bits >> 49U) & 1U)) >> 49U;
  const std::uint64_t below = 0 - ((bits - std::bit_cast<std::uint64_t>(0x1p-6)) >> 63U);  // all ones, or 0
  const std::uint32_t sign = std::bit_cast<std::uint32_t>(x) >> 24U & 0x80U;
  return static_cast<std::byte>(sign | (subnormal & below) | (normal & ~below));
}

/// What the largest magnitude of a row is divided by: `most` times it neither over- nor underflows.
ATTN_INLINE float scale_of(float largest, double most) noexcept {
  if (largest == 0) return 1;
  const auto scale = static_cast<float>(largest / most);
  if (scale * most > FLT_MAX) return std::nextafter(scale, 0.0F);
  return std::max(scale, FLT_MIN);
}

/// The first number has the low half of a byte.
void quantise4(const float* row, Index dim, double reciprocal, std::byte* to) noexcept {
  for (Index i = 0; i < dim; i += 2) {
    const std::int32_t low = nearest(quotient(row[i], reciprocal));
    const std::int32_t high = nearest(quotient(row[i + 1], reciprocal));
    to[i / 2] = static_cast<std::byte>((low & 0xf) | (high & 0xf) << 4);
  }
}

/// `count` floats p[0], p[stride], … become numbers, in a scratch row: a register more may be written.
template <class T>
void read_row(const std::byte* p, Index stride, DType dtype, Index count, T* row) noexcept {
  const bool direct =
      sizeof(T) == sizeof(float) ? dtype != DType::f64 : dtype == DType::f64 || dtype == DType::f32;
  if (direct) return load_span<Portable, T>(p, stride, dtype, count, row);
  for (Index i = 0; i < count; ++i) row[i] = static_cast<T>(read_number(p + i * stride, dtype));
}

template <class T>
std::vector<T> scratch_row(Index dim) {
  return std::vector<T>(static_cast<std::size_t>(dim) + Portable::kBytes / sizeof(T));
}

/// A row becomes `dim` numbers of i8, i4 or f8, and their factor.  False, and nothing written, if it has a NaN or an
/// infinity.
bool quantise_row(const float* row, Index dim, DType dtype, std::byte* to, float& scale) noexcept {
  // Magnitudes as integers: these have the order of the numbers, and NaN comes last.
  std::int32_t largest = 0;
  for (Index i = 0; i < dim; ++i)
    largest = std::max(largest, std::bit_cast<std::int32_t>(row[i]) & kMagnitude);
  if (largest >= kInfinity) return false;
  const double most = dtype == DType::i8 ? kMost8 : dtype == DType::i4 ? kMost4 : kMostF8;
  scale = scale_of(std::bit_cast<float>(largest), most);
  const double reciprocal = 1 / double{scale};
  if (dtype == DType::i8) {
    for (Index i = 0; i < dim; ++i) to[i] = static_cast<std::byte>(nearest(quotient(row[i], reciprocal)));
  } else if (dtype == DType::i4) {
    quantise4(row, dim, reciprocal, to);
  } else {
    for (Index i = 0; i < dim; ++i) to[i] = to_f8(row[i], reciprocal);
  }
  return true;
}

void dequantise_row(const std::byte* from, float scale, Index dim, DType dtype, float* row) noexcept {
  constexpr Index n = kWidth<Portable, float>;
  with_key_storage<float>(dtype, [&]<DType kStorage>() {
    for (Index i = 0; i < dim; i += n) {
      store(row + i,
            load_items<Portable, float, kStorage>(from + row_bytes(dtype, i), 1, min(n, dim - i)) * scale);
    }
  });
}

/// run(head, token) for all rows, until one says no: that one.
template <class Run>
std::optional<BadRow> for_rows(const Tensor& t, Run run) {
  for (Index head = 0; head < t.shape[1]; ++head) {
    for (Index token = 0; token < t.shape[2]; ++token) {
      if (!run(head, token)) return BadRow{head, token};
    }
  }
  return std::nullopt;
}

template <class T>
void convert_rows(const Tensor& from, const Tensor& to) {
  const Index dim = to.shape[3];
  std::vector<T> row = scratch_row<T>(dim);
  for_rows(to, [&](Index head, Index token) {
    read_row(at(from, 0, head, token), from.stride[3], from.dtype, dim, row.data());
    store_span<Portable, T>(at(to, 0, head, token), to.stride[3], to.dtype, dim, row.data());
    return true;
  });
}

}  // namespace

Index row_bytes(DType dtype, Index dim) noexcept {
  return dtype == DType::i4 ? (dim + 1) / 2 : dim * item_size(dtype);
}

void copy_rows(const Tensor& from, const Tensor& to) noexcept {
  const Index bytes = row_bytes(to.dtype, to.shape[3]), tokens = to.shape[2];
  const bool as_one = from.stride[2] == bytes && to.stride[2] == bytes;
  for (Index head = 0; head < to.shape[1]; ++head) {
    if (as_one) {
      std::memcpy(at(to, 0, head), at(from, 0, head), static_cast<std::size_t>(tokens * bytes));
      continue;
    }
    for (Index token = 0; token < tokens; ++token) {
      std::memcpy(at(to, 0, head, token), at(from, 0, head, token), static_cast<std::size_t>(bytes));
    }
  }
}

void convert(const Tensor& from, const Tensor& to) {
  const bool same = from.dtype == to.dtype && to.stride[3] == item_size(to.dtype);
  if (same && from.stride[3] == to.stride[3]) return copy_rows(from, to);
  accumulation(to.dtype) == DType::f64 ? convert_rows<double>(from, to) : convert_rows<float>(from, to);
}

void reject_row(const char* argument, Index entry, const BadRow& row, Index first, DType dtype) {
  reject(argument, "has a NaN or an infinity for entry " + std::to_string(entry) + " (head " +
                       std::to_string(row.head) + ", token " + std::to_string(first + row.token) + "), " +
                       name(dtype) + " can only store finite numbers of float32's range");
}

std::optional<BadRow> quantise(const Tensor& from, const Tensor& to, const Tensor& scale) {
  const Index dim = to.shape[3];
  std::vector<float> row = scratch_row<float>(dim);
  return for_rows(to, [&](Index head, Index token) {
    read_row(at(from, 0, head, token), from.stride[3], from.dtype, dim, row.data());
    float factor = 1;
    if (!quantise_row(row.data(), dim, to.dtype, at(to, 0, head, token), factor)) return false;
    std::memcpy(at(scale, 0, head, token), &factor, sizeof factor);
    return true;
  });
}

void dequantise(const Tensor& from, const Tensor& scale, const Tensor& to) {
  const Index dim = to.shape[3];
  std::vector<float> row = scratch_row<float>(dim);
  for_rows(to, [&](Index head, Index token) {
    float factor = 1;
    std::memcpy(&factor, at(scale, 0, head, token), sizeof factor);
    dequantise_row(at(from, 0, head, token), factor, dim, from.dtype, row.data());
    store_span<Portable, float>(at(to, 0, head, token), to.stride[3], to.dtype, dim, row.data());
    return true;
  });
}

}  // namespace attncore
