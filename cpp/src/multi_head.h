// What the parts of the multi-head layer share: its projections, its memory, the checks of its inputs.
#pragma once

#include <array>
#include <attncore/layers.hpp>
#include <vector>

#include "require.h"
#include "rows.h"

namespace attncore {

/// The extents of a call.
struct Extents {
  bool self = true;  // no context is given
  Index batch = 0, queries = 0, keys = 0;
};

inline constexpr AxisNames kWidthAxes{"batch", "", "token", "width"};

/// Checks x, contexts and positions.
Extents require_inputs(const MultiHeadAttentionSettings& settings, const MultiHeadAttention::Inputs& inputs);

/// A result beside the inputs: its dtype, its shape, that it overlaps none of them.
void require_result(const char* argument, const Tensor& result, const Shape& shape, DType dtype,
                    const MultiHeadAttention::Inputs& inputs, const AxisNames& axes);

/// One of the products before attention, or several with the same input: heads = input·weightᵀ + bias.
struct Projection {
  Tensor input, weight, bias, heads;
  const Rope* rotary = nullptr;
  Tensor d_input, d_weight, d_bias;  // for the backward, where `heads` is their gradient
};

/// Projections of the same input whose weights and heads follow each other become one.
[[nodiscard]] std::vector<Projection> joined(const std::array<Projection, 3>& projections);

/// The layer's tensors by name: `which` is its values or its gradients.
class Parameters {
 public:
  using Parameter = MultiHeadAttention::Parameter;
  Parameters(const std::vector<Parameter>& parameters, Tensor Parameter::* which)
      : parameters_(parameters), which_(which) {}

  /// Without data if the layer has no such parameter.
  [[nodiscard]] Tensor operator()(const char* name) const noexcept;
  /// Weight and bias of the projection to queries (0), keys (1), values (2).
  [[nodiscard]] std::pair<Tensor, Tensor> in_projection(const MultiHeadAttentionSettings& settings,
                                                        int index) const noexcept;
  /// bias_k and bias_v as (1, kv_head, 1, dim).
  [[nodiscard]] Tensor by_head(const char* name, const MultiHeadAttentionSettings& settings) const noexcept;

 private:
  const std::vector<Parameter>& parameters_;
  Tensor Parameter::* which_;
};

/// Queries, keys and values of the heads, or their gradients.  Those that are made from the same input lie together.
struct Heads {
  Tensor query, key, value;

  void add_to(Tensors& memory, const MultiHeadAttentionSettings& settings, const Extents& extents);
  void split(const MultiHeadAttentionSettings& settings, const Extents& extents);  // once there is memory

 private:
  Tensor first_, second_;  // all three, for self-attention; else queries, and keys with values
};

/// Rope with a call's positions, for queries and for keys.
struct Rotations {
  bool given = false;  // whether the layer rotates
  Rope query, key;
  Rotations(const MultiHeadAttentionSettings& settings, const MultiHeadAttention::Inputs& inputs);
};

/// Activations: what a forward leaves.
struct MultiHeadState {
  Workspace memory;
  std::uint64_t layer = 0;  // the identity of the one whose forward filled this, 0 if none did
  MultiHeadAttention::Inputs inputs;
  Extents extents;
  Heads projected;    // before norm
  Problem attention;  // over the keys
  Problem appended;   // over what bias_kv and add_zero_attn append, if anything
  State merged;       // out and lse of both
};

/// Checks that a forward of this layer has filled the state.
void require_filled(const MultiHeadState& state, std::uint64_t layer);

/// How many keys bias_kv and add_zero_attn append.
[[nodiscard]] inline Index appended_keys(const MultiHeadAttentionSettings& settings) noexcept {
  return static_cast<Index>(settings.bias_kv) + static_cast<Index>(settings.add_zero_attn);
}

/// The projections of a call; `heads` and the parameters are values, or gradients.
[[nodiscard]] std::array<Projection, 3> projections(const MultiHeadAttentionSettings& settings,
                                                    const Parameters& parameters,
                                                    const MultiHeadState& state);

}  // namespace attncore
