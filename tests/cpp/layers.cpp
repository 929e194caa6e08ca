// linear, linear_backward and rope on tensors that only C++ callers have: heads by strides, rotations in the products.
#include <cmath>
#include <string>
#include <vector>

#include "check.h"
#include "layer_case.h"

namespace {

using namespace attncore;

/// Turns pair `pair` of (a, b) in double, by the definition.
void turn_pair(double& a, double& b, const Rope& rope, Index dims, Index pair, Index position, bool inverse) {
  const double power = -2.0 * static_cast<double>(pair) / static_cast<double>(dims);
  const double frequency = rope.frequencies.empty() ? std::pow(rope.base, power)
                                                    : rope.frequencies[static_cast<std::size_t>(pair)];
  const double angle = static_cast<double>(position) * frequency * (inverse ? -1 : 1);
  const double c = rope.factor * std::cos(angle), s = rope.factor * std::sin(angle);
  const double x = a * c - b * s, y = b * c + a * s;
  a = x, b = y;
}

/// A row of heads, rotated.
void turn_row(double* row, const LayerShape& n, const Rope& rope, Index position, bool inverse) {
  const auto pairs = static_cast<Index>(rope.frequencies.size());
  const Index dims = rope.dims != 0 ? rope.dims : pairs != 0 ? 2 * pairs : n.out_dim;
  for (Index head = 0; head < n.out_heads; ++head) {
    for (Index pair = 0; pair < dims / 2; ++pair) {
      double* const h = row + head * n.out_dim;
      double& a = rope.interleaved ? h[2 * pair] : h[pair];
      double& b = rope.interleaved ? h[2 * pair + 1] : h[pair + dims / 2];
      turn_pair(a, b, rope, dims, pair, position, inverse);
    }
  }
}

bool near(double ours, double exact, Index terms) {
  return std::fabs(ours - exact) <= 4e-7 * std::sqrt(static_cast<double>(terms) + 4) * 4;
}

void check(const Case& c, const Rope* rotary) {
  const Index in = c.n.in(), out = c.n.out(), rows = c.n.rows();
  const auto cell = [](const std::vector<float>& m, Index stride, Index i, Index j) {
    return static_cast<double>(m[static_cast<std::size_t>(i * stride + j)]);
  };
  std::vector<double> d_y(c.d_y.begin(), c.d_y.end());
  for (Index row = 0; row < rows; ++row) {
    std::vector<double> want(static_cast<std::size_t>(out));
    for (Index o = 0; o < out; ++o) {
      double sum = cell(c.bias, 1, o, 0);
      for (Index i = 0; i < in; ++i) sum += cell(c.x, in, row, i) * cell(c.weight, in, o, i);
      want[static_cast<std::size_t>(o)] = sum;
    }
    if (rotary != nullptr) {
      turn_row(want.data(), c.n, *rotary, c.position(row), false);
      turn_row(d_y.data() + row * out, c.n, *rotary, c.position(row), true);
    }
    for (Index o = 0; o < out; ++o)
      CHECK(near(cell(c.y, out, row, o), want[static_cast<std::size_t>(o)], in));
    for (Index i = 0; i < in; ++i) {
      double sum = 0;
      for (Index o = 0; o < out; ++o)
        sum += d_y[static_cast<std::size_t>(row * out + o)] * cell(c.weight, in, o, i);
      CHECK(near(cell(c.d_x, in, row, i), sum, out));
    }
  }
  for (Index o = 0; o < out; ++o) {
    double total = 0;
    for (Index row = 0; row < rows; ++row) total += d_y[static_cast<std::size_t>(row * out + o)];
    CHECK(near(cell(c.d_bias, 1, o, 0), total, rows));
    for (Index i = 0; i < in; ++i) {
      double sum = 0;
      for (Index row = 0; row < rows; ++row) {
        sum += d_y[static_cast<std::size_t>(row * out + o)] * cell(c.x, in, row, i);
      }
      CHECK(near(cell(c.d_weight, in, o, i), sum, rows));
    }
  }
}

void layers() {
  Random random;
  for (const LayerShape& n :
       {LayerShape{1, 1, 1, 8, 1, 4}, LayerShape{2, 5, 3, 7, 2, 10}, LayerShape{2, 40, 2, 24, 3, 20},
        LayerShape{1, 70, 4, 16, 1, 66}, LayerShape{3, 23, 5, 64, 2, 48}}) {
    for (const int rotation : {0, 1, 2, 3, 4}) {
      Case c(n, random);
      c.rope.interleaved = rotation == 2;
      c.rope.dims = rotation == 3 ? 2 : 0;
      if (rotation == 4) c.rope.frequencies = {0.3, -2.5}, c.rope.factor = 1.5;
      if (rotation > 1) c.give_positions();
      const Rope* const rotary = rotation > 0 ? &c.rope : nullptr;
      c.run({.num_threads = 1}, rotary);
      check(c, rotary);
      Case other = c;
      if (rotation > 1) other.give_positions();
      other.run({.num_threads = 3}, rotation > 0 ? &other.rope : nullptr);
      CHECK(same_bits(c.y, other.y) && same_bits(c.d_x, other.d_x) && same_bits(c.d_weight, other.d_weight) &&
            same_bits(c.d_bias, other.d_bias));
    }
  }
}

/// A rotation in the product is a rotation after it, where nothing is rounded between them.
void rotary_is_rope() {
  Random random;
  Case c({2, 30, 2, 12, 3, 16}, random);
  linear(c.xs(), c.weights(), {}, c.ys(), &c.rope);
  const std::vector<float> fused = c.y;
  linear(c.xs(), c.weights(), {}, c.ys());
  rope(c.ys(), c.rope, c.ys());
  CHECK(same_bits(fused, c.y));
}

void errors() {
  Random random;
  Case c({2, 3, 2, 4, 2, 6}, random);
  Tensor y = c.ys();
  y.shape[1] = 3;
  CHECK(refused([&] { linear(c.xs(), c.weights(), {}, y); }, "out: shape is (2, 3, 3, 6), heads · dims"));
  const Tensor square = Tensor::contiguous(c.weight.data(), DType::f32, {1, 1, 12, 12});
  CHECK(refused([&] { linear(c.ys(), square, {}, c.ys()); }, "out: overlaps x"));
  const Rope odd{.dims = 3};
  CHECK(refused([&] { linear(c.xs(), c.weights(), {}, c.ys(), &odd); }, "dims: is 3"));
  CHECK(refused([&] { linear(c.xs(), c.weights(), c.ys(), c.ys()); }, "bias: shape"));
  const Tensor lost = Tensor::contiguous(nullptr, DType::f32, {1, 1, 12, 8});
  CHECK(refused([&] { linear(c.xs(), lost, {}, c.ys()); }, "weight: is not given"));
  Tensor halves = c.xs();
  halves.dtype = DType::f16;
  CHECK(refused([&] { rope(halves, {}, c.xs()); }, "out: dtype is float32, accepted is float16"));
}

void cancellation() {
  Random random;
  Case c({1, 400, 1, 256, 1, 256}, random);
  // On one thread: others might do all of it before the caller's thread asks.
  const Options stops{.num_threads = 1, .cancelled = [] { return true; }};
  CHECK(refused<Cancelled>([&] { linear(c.xs(), c.weights(), {}, c.ys(), nullptr, stops); }, "the call"));
  linear(c.xs(), c.weights(), {}, c.ys());  // nothing is broken
}

}  // namespace

int main() {
  for (const std::string& isa : available_isas()) {
    use_isa(isa);
    layers();
    rotary_is_rope();
  }
  errors();
  cancellation();
  return finish();
}
