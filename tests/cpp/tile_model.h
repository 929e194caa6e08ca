// A matrix unit in software: what Intel's manual says that TDPBF16PS does, one multiply-add at a time, so that the code around
// the unit can be tested on any machine.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "check.h"
#include "cpu/kernels/forward_tiles.h"

namespace attncore {
namespace {

/// avx512's shapes, in the compiler's vectors.
struct Modelled {
  static constexpr int kBytes = 64, kRows = 6, kColumns = 4;
  template <class T>
  static constexpr Index kKeyTile = 128;
};

[[maybe_unused]] bool supported() noexcept { return true; }  // isa_test.h asks

/// Rounded to nearest even; what is subnormal after rounding is 0.  `exact` is a sum of two numbers of 24 bits, rounded to 53: to
/// round it twice is harmless (Figueroa 1995).
float flushed(double exact) {
  constexpr double kLeast = 0x1p-126 * (1 - 0x1p-25);  // half a unit below the least normal number
  const auto x = static_cast<float>(exact);
  return std::fabs(exact) < kLeast ? std::copysign(0.0F, x) : x;
}

float bf16_value(std::uint32_t half) {
  const std::uint32_t bits = half << 16U;
  float x = 0;
  std::memcpy(&x, &bits, sizeof x);
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0F, x) : x;
}
float first_half(Bf16Pair pair) { return bf16_value(pair & 0xffffU); }
float second_half(Bf16Pair pair) { return bf16_value(pair >> 16U); }

float fused(float a, float b, float sum) { return flushed(double(a) * double(b) + double(sum)); }
float added(float a, float b) { return flushed(double(a) + double(b)); }

/// The registers of a thread.
struct TileRegisters {
  bool configured = false;
  bool broken = false;  // multiplies the first of each pair only
  Index rows[8];
  std::uint32_t row[8][kTileRows][16];

  void configure(const Index (&rows_of)[8]) {
    CHECK(!configured);
    std::memcpy(rows, rows_of, sizeof rows);
    std::memset(row, 0xff, sizeof row);  // NaN
    configured = true;
  }
  void release() {
    CHECK(configured);
    configured = false;
  }
  void zero(int tile) {
    CHECK(configured);
    std::memset(row[tile], 0, sizeof row[tile]);
  }
  void load(int tile, const void* p, Index stride) {
    CHECK(configured);
    for (Index i = 0; i < rows[tile]; ++i)
      std::memcpy(row[tile][i], static_cast<const std::byte*>(p) + i * stride, sizeof row[tile][i]);
  }
  void store(int tile, void* p, Index stride) const {
    CHECK(configured);
    for (Index i = 0; i < rows[tile]; ++i)
      std::memcpy(static_cast<std::byte*>(p) + i * stride, row[tile][i], sizeof row[tile][i]);
  }
  void multiply(int sum, int a, int b) {
    CHECK(configured && rows[sum] == rows[a] && rows[b] == kTileDepth);
    for (Index i = 0; i < rows[sum]; ++i) {
      float first[kTileColumns]{}, second[kTileColumns]{}, sums[kTileColumns];
      for (Index k = 0; k < kTileDepth; ++k) {
        const Bf16Pair x = row[a][i][k];
        for (Index j = 0; j < kTileColumns; ++j) {
          const Bf16Pair y = row[b][k][j];
          first[j] = fused(first_half(x), first_half(y), first[j]);
          if (!broken) second[j] = fused(second_half(x), second_half(y), second[j]);
        }
      }
      std::memcpy(sums, row[sum][i], sizeof sums);
      for (Index j = 0; j < kTileColumns; ++j) sums[j] = added(sums[j], added(first[j], second[j]));
      std::memcpy(row[sum][i], sums, sizeof sums);
    }
  }
};
thread_local TileRegisters tiles;

}  // namespace

template <>
struct TileUnit<Modelled> {
  static void configure(Index rows = 2 * kTileRows) noexcept {
    const Index upper = min(rows, kTileRows), lower = rows > kTileRows ? rows - kTileRows : kTileRows;
    tiles.configure({upper, upper, lower, lower, upper, lower, kTileRows, kTileRows});
  }
  static void release() noexcept { tiles.release(); }
  template <int kTile>
  static void zero() noexcept {
    tiles.zero(kTile);
  }
  template <int kTile>
  static void load(const void* p, Index stride) noexcept {
    tiles.load(kTile, p, stride);
  }
  template <int kTile>
  static void store(void* p, Index stride) noexcept {
    tiles.store(kTile, p, stride);
  }
  template <int kSum, int kA, int kB>
  static void multiply() noexcept {
    tiles.multiply(kSum, kA, kB);
  }
};

template <>
struct MultiplyPairs<Modelled> {
  static ATTN_INLINE Vec<Modelled, float> add(U32<Modelled> a, U32<Modelled> b,
                                              Vec<Modelled, float> sum) noexcept {
    sum += second_of<Modelled>(a) * second_of<Modelled>(b);
    return sum + first_of<Modelled>(a) * first_of<Modelled>(b);
  }
  static ATTN_INLINE U32<Modelled> narrow(Vec<Modelled, float> low, Vec<Modelled, float> high) noexcept {
    std::uint16_t halves[32];
    store_as<Modelled, float, DType::bf16>(halves, low);
    store_as<Modelled, float, DType::bf16>(halves + 16, high);
    return load<U32<Modelled>>(static_cast<const void*>(halves));
  }
};

}  // namespace attncore
