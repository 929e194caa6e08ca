// A layer and its gradients, in float32.
#pragma once

#include <attncore/layers.hpp>
#include <vector>

#include "kit.h"

namespace attncore {

struct LayerShape {
  Index batch, tokens, in_heads, in_dim, out_heads, out_dim;
  [[nodiscard]] Index in() const { return in_heads * in_dim; }
  [[nodiscard]] Index out() const { return out_heads * out_dim; }
  [[nodiscard]] Index rows() const { return batch * tokens; }
};

/// (batch, token, head · dim) memory as (batch, head, token, dim).
inline Tensor split(std::vector<float>& memory, Index batch, Index tokens, Index heads, Index dim) {
  constexpr Index kItem = sizeof(float);
  return {memory.data(),
          DType::f32,
          {batch, heads, tokens, dim},
          {tokens * heads * dim * kItem, dim * kItem, heads * dim * kItem, kItem}};
}

/// One layer and its gradients, in memory where the heads of a token lie beside each other.
struct Case {
  LayerShape n;
  std::vector<float> x, weight, bias, y, d_y, d_x, d_weight, d_bias;
  std::vector<Index> at;  // positions, (batch, token)
  Rope rope;

  Case(const LayerShape& shape, Random& random) : n(shape) {
    x = noise(n.rows() * n.in(), random);
    weight = noise(n.out() * n.in(), random);
    bias = noise(n.out(), random);
    d_y = noise(n.rows() * n.out(), random);
    y.resize(d_y.size()), d_x.resize(x.size()), d_weight.resize(weight.size()), d_bias.resize(bias.size());
    for (Index i = 0; i < n.rows(); ++i) at.push_back(random.below(5000) - 100);
  }

  void give_positions() {
    rope.positions = Tensor::contiguous(at.data(), DType::i64, {n.batch, 1, n.tokens, 1});
  }
  [[nodiscard]] Index position(Index row) const {
    return rope.positions.given() ? at[static_cast<std::size_t>(row)] : row % n.tokens;
  }
  Tensor xs() { return split(x, n.batch, n.tokens, n.in_heads, n.in_dim); }
  Tensor ys() { return split(y, n.batch, n.tokens, n.out_heads, n.out_dim); }
  Tensor weights() { return Tensor::contiguous(weight.data(), DType::f32, {1, 1, n.out(), n.in()}); }
  Tensor biases() { return Tensor::contiguous(bias.data(), DType::f32, {1, 1, 1, n.out()}); }

  void run(const Options& options, const Rope* rotary) {
    linear(xs(), weights(), biases(), ys(), rotary, options);
    const LinearGradients gradients{
        .d_x = split(d_x, n.batch, n.tokens, n.in_heads, n.in_dim),
        .d_weight = Tensor::contiguous(d_weight.data(), DType::f32, {1, 1, n.out(), n.in()}),
        .d_bias = Tensor::contiguous(d_bias.data(), DType::f32, {1, 1, 1, n.out()})};
    linear_backward(split(d_y, n.batch, n.tokens, n.out_heads, n.out_dim), xs(), weights(), gradients, rotary,
                    options);
  }
};

}  // namespace attncore
