// What the layers' kernels read: validated products and rotations.
#pragma once

#include <attncore/layers.hpp>

#include "call.h"

namespace attncore {

/// The rotations of rope: pair i of a token at position p turns by p · frequency[i], and is multiplied by a factor.
///
/// p is far + near with near in 0 … kNear − 1.  sin and cos of far's angle and of near's are taken in double and joined
/// by the addition theorems, so that consecutive tokens share most of them; bits depend on p alone.
struct Rotation {
  static constexpr Index kNear = 16;

  Tensor positions;  // (batch or repeated, 1, token, 1); not given: the token's index
  double base = 1, factor = 1;
  Index dims = 0;  // 0: no rotation
  bool interleaved = false, inverse = false;

  const double* frequency =
      nullptr;                   // dims / 2; not there: base^(−2i / dims), of which a device makes a table
  const double* near = nullptr;  // kNear · (cosines, sines), dims / 2 each; not there: taken when needed

  [[nodiscard]] ATTN_INLINE Index pairs() const noexcept { return dims / 2; }
  [[nodiscard]] ATTN_INLINE bool given() const noexcept { return dims > 0; }
  [[nodiscard]] ATTN_INLINE Index position(Index batch, Index token) const noexcept {
    return positions.given() ? read_int(at(positions, batch, 0, token), positions.dtype) : token;
  }
};

/// cos and sin of an angle, in double.
ATTN_INLINE void turn(double angle, double& cosine, double& sine) noexcept {
  sine = __builtin_sin(angle);
  cosine = __builtin_cos(angle);
}

/// The same of position · frequency, exactly: a sum of two doubles.  Whoever compiles this, with whatever flags, gets the same
/// bits: so the multiply-adds are spelled out.
ATTN_INLINE void turn_exactly(double position, double frequency, double& cosine, double& sine) noexcept {
  const double angle = position * frequency;
  double c = 0, s = 0, c_of_rest = 0, s_of_rest = 0;
  turn(angle, c, s);
  turn(__builtin_fma(position, frequency, -angle), c_of_rest, s_of_rest);
  cosine = __builtin_fma(c, c_of_rest, -(s * s_of_rest));
  sine = __builtin_fma(s, c_of_rest, c * s_of_rest);
}

/// The same of a position below Rotation::kNear: as a rule the rest is less than a double tells.
ATTN_INLINE void turn_near(double position, double frequency, double& cosine, double& sine) noexcept {
  if (__builtin_fabs(frequency) > 1) return turn_exactly(position, frequency, cosine, sine);
  turn(position * frequency, cosine, sine);
}

/// A tensor as a matrix: its rows are (batch, token) pairs, its columns (head, dim) pairs.
ATTN_FN constexpr Index rows_of(const Tensor& t) noexcept { return t.shape[0] * t.shape[2]; }
ATTN_FN constexpr Index columns_of(const Tensor& t) noexcept { return t.shape[1] * t.shape[3]; }

/// c (rows, columns) = a (rows, depth) · b (depth, columns) + bias, where each is a tensor as a matrix, or its
/// transpose.
struct Product {
  Tensor a, b, c;
  Tensor bias;  // (1, 1, 1, columns), or not given
  bool a_transposed = false, b_transposed = false;
  Rotation rotate_a, rotate_c;  // of a before the product, of c after the bias
  Index rows = 0, columns = 0, depth = 0;
  bool b_in_place = true;  // b's rows and columns have one stride each

  [[nodiscard]] DType compute() const noexcept { return accumulation(c.dtype); }
};

/// out = x, rotated.
struct RopeCall {
  Tensor x, out;
  Rotation rotation;
};

}  // namespace attncore
