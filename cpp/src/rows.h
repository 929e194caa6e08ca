// Row arithmetic beside matrix products: what the multi-head layer does to rows of (batch, head, token, dim) tensors.
// The last axis has no gaps; sums are in float32 (float64 for float64), in an order that the shape alone gives.
#pragma once

#include "tensor.h"

namespace attncore {

/// Results of attention on some keys.
struct State {
  Tensor out, lse;
};

/// Attention over the union of two disjoint key sets, from its results on each: with w_i = exp(lse_i − lse),
/// out = w_1·out_1 + w_2·out_2.
void merge_states(const State& first, const State& second, const State& merged, const Options& options);

/// The gradients by one part of a merge: d_part.out = w·d_out and d_part.lse = w·⟨d_out, part.out − merged.out⟩.
/// d_part.out may be d_out.
void split_gradient(const Tensor& d_out, const State& merged, const State& part, const State& d_part,
                    const Options& options);

/// y = x / √(mean x² + ε) · gain (Zhang & Sennrich 2019); gain is (1, 1, 1, dim).
void rms_norm(const Tensor& x, const Tensor& gain, double epsilon, const Tensor& y, const Options& options);

/// Its backward: d_y becomes d_x, d_gain (1, 1, 1, dim) is written.
void rms_norm_backward(const Tensor& d_y, const Tensor& x, const Tensor& gain, double epsilon,
                       const Tensor& d_gain, const Options& options);

/// to += from, of one shape.
void add_rows(const Tensor& from, const Tensor& to, const Options& options);

/// sum (1, head, 1, dim) = Σ_batch x (batch, head, 1, dim)
void sum_over_batch(const Tensor& x, const Tensor& sum);

/// probabilities (batch, head, row, key), float32 or float64, times exp(part_lse − lse) of their row.
void scale_by_part(const Tensor& probabilities, const Tensor& part_lse, const Tensor& lse,
                   const Options& options);

/// mean (batch, 1, row, key) over the heads of probabilities.
void mean_over_heads(const Tensor& probabilities, const Tensor& mean, const Options& options);

}  // namespace attncore
