// The arithmetic of AttentionState.  Of the scores s of the keys so far a row keeps, in float64,
//
//     maximum m,  sum = Σ exp(s − m),  output = Σ exp(s − m) · value
//
// and for float64 queries also what rounding took from the sums (sum_rest, output_rest), so that a million small pieces
// cost no more accuracy than one.
//
// m may lag behind the largest score by up to kLag: it then stays where it is, and nothing is rescaled.  If it followed
// every new maximum, a row whose scores rise slowly would be rounded once a piece.
#pragma once

#include "tensor.h"

namespace attncore {

inline constexpr double kLag = 8;

struct Sums {
  Tensor maximum, sum;           // f64 (batch, head, query, 1); −inf and 0: nothing seen
  Tensor output;                 // f64 (batch, head, query, value_dim)
  Tensor sum_rest, output_rest;  // alike, or not given
};

/// What some keys alone give: out = Σ exp(s − m) · value / sum, of f32 or f64, as maximum and sum.
struct PieceResult {
  Tensor out, maximum, sum;
};

/// sums += piece, a batch entry of the piece for each of the sums.  Never stops halfway.
void add_piece(const Sums& sums, const PieceResult& piece, const Options& options);

/// sums += other.
void add_sums(const Sums& sums, const Sums& other, const Options& options);

/// out and lse of all that was seen; `sinks`, one a head, are keys of that score and a zero value.
void finish_sums(const Sums& sums, const Tensor& sinks, const Tensor& out, const Tensor& lse,
                 const Options& options);

/// Floats of any dtype and strides as f32 or f64 without gaps.
void convert(const Tensor& from, const Tensor& to, const Options& options);

}  // namespace attncore
