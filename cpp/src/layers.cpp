// rope, linear and linear_backward: validate, then products and rotations on the device.
#include <cmath>
#include <utility>

#include "backend.h"
#include "require.h"
#include "text.h"

namespace attncore {
namespace {

using std::to_string;

constexpr double kSmallestBase = 1e-100;  // its powers times any position are finite
constexpr double kHighestFrequency = 1e100;
constexpr double kLargestFactor = 1e30;  // and one over it: both are float32's

void require_operand(const char* argument, const Tensor& t) {
  require_given(argument, t);
  require_float(argument, t);
  if (t.shape[3] > kMostDims || t.shape[1] > kMostDims) {
    reject(argument,
           "shape is " + shape_text(t.shape) + ", heads and dims must be at most " + to_string(kMostDims));
  }
}

/// Of x's dtype.
void require_like_x(const char* argument, const Tensor& t, const Tensor& x) {
  require_given(argument, t);
  require_like(argument, t, "x", x);
}

/// What rotates x, (batch, head, token, dim).
Rotation rotation_of(const Rope& rope, const Tensor& x, bool inverse) {
  Rotation rotation{.positions = rope.positions,
                    .base = rope.base,
                    .factor = rope.factor,
                    .dims = require_rope(rope, x.shape[3]),
                    .interleaved = rope.interleaved,
                    .inverse = inverse,
                    .frequency = rope.frequencies.empty() ? nullptr : rope.frequencies.data()};
  if (is_given("positions", rope.positions)) {
    require_dtype("positions", rope.positions, {DType::i32, DType::i64});
    require_shape("positions", rope.positions,
                  {rope.positions.shape[0] == 1 ? 1 : x.shape[0], 1, x.shape[2], 1},
                  {"1 or batch", "", "token"});
    if (rope.positions.shape[0] == 1) rotation.positions.stride[0] = 0;
  }
  return rotation;
}

/// Axes that lie as one become one, so that rows and columns have one stride each where that is possible.
Tensor merged(Tensor t) noexcept {
  const auto merge = [&](std::size_t outer, std::size_t inner) {
    const bool as_one =
        t.shape[outer] == 1 || t.shape[inner] == 1 || t.stride[outer] == t.shape[inner] * t.stride[inner];
    if (!as_one) return;
    if (t.shape[inner] == 1) t.stride[inner] = t.stride[outer];
    t.shape[inner] *= t.shape[outer];
    t.shape[outer] = 1;
  };
  merge(0, 2);
  merge(1, 3);
  return t;
}

/// The same numbers, rows as columns.
Tensor turned(Tensor t) noexcept {
  std::swap(t.shape[2], t.shape[3]);
  std::swap(t.stride[2], t.stride[3]);
  return t;
}

Product product(const Tensor& a, const Tensor& b, const Tensor& c, Index depth) {
  Product p{.a = a, .b = merged(b), .c = c, .rows = rows_of(c), .columns = columns_of(c), .depth = depth};
  p.b_in_place = p.b.shape[0] == 1 && p.b.shape[1] == 1;
  return p;
}

/// x (…, in_heads, …, in_dim), weight (1, 1, out, in) and y (…, out_heads, …, out_dim) belong together.
void require_linear(const Tensor& x, const Tensor& weight, const char* y_name, const Tensor& y) {
  require_operand("x", x);
  require_like_x("weight", weight, x);
  const Index out_features = weight.shape[2];
  require_shape("weight", weight, {1, 1, out_features, columns_of(x)},
                {"", "", "out_features", "in_features"});
  require_like_x(y_name, y, x);
  const Index heads = y.shape[1], dim = y.shape[3];
  if (heads > kMostDims || dim > kMostDims || heads * dim != out_features) {
    reject(y_name, "shape is " + shape_text(y.shape) + ", heads · dims must be weight's out_features, " +
                       to_string(out_features));
  }
  require_shape(y_name, y, {x.shape[0], heads, x.shape[2], dim}, kTokenAxes);
}

}  // namespace

Index require_rope(const Rope& rope, Index dim) {
  if (!(std::isfinite(rope.base) && rope.base >= kSmallestBase)) {
    reject("base",
           "is " + short_text(rope.base) + ", must be finite and at least " + short_text(kSmallestBase));
  }
  if (!(rope.factor >= 1 / kLargestFactor && rope.factor <= kLargestFactor)) {
    reject("factor", "is " + short_text(rope.factor) + ", must be " + short_text(1 / kLargestFactor) + " … " +
                         short_text(kLargestFactor));
  }
  const auto pairs = static_cast<Index>(rope.frequencies.size());
  if (rope.dims == 0 && 2 * pairs > dim) {
    reject("frequencies", "has " + to_string(pairs) + ", must have at most " + to_string(dim / 2) +
                              ", one for each pair of dims");
  }
  const Index dims = rope.dims != 0 ? rope.dims : pairs != 0 ? 2 * pairs : dim;
  if (dims < 0 || dims > dim || dims % 2 != 0) {
    const std::string given = rope.dims == 0 && pairs == 0 ? ", all of a head's" : "";
    reject("dims", "is " + to_string(dims) + given + ", must be even and at most " + to_string(dim));
  }
  if (pairs != 0 && 2 * pairs != dims) {
    reject("frequencies",
           "has " + to_string(pairs) + ", must have " + to_string(dims / 2) + ", one for each pair of dims");
  }
  for (const double frequency : rope.frequencies) {
    if (std::fabs(frequency) <= kHighestFrequency) continue;
    reject("frequencies",
           "has " + short_text(frequency) + ", must be within ± " + short_text(kHighestFrequency));
  }
  return dims;
}

void rope(const Tensor& x, const Rope& options_of_rope, const Tensor& out, bool inverse,
          const Options& options) {
  require_operand("x", x);
  const Rotation rotation = rotation_of(options_of_rope, x, inverse);
  require_like_x("out", out, x);
  require_shape("out", out, x.shape, kTokenAxes);
  const bool in_place = out.data == x.data && out.stride == x.stride;
  require_apart("out", out, {{"positions", &rotation.positions}});
  if (!in_place) require_apart("out", out, {{"x", &x}});
  backend(options.device).rope({x, out, rotation}, options);
}

void linear(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& out, const Rope* rotary,
            const Options& options) {
  require_linear(x, weight, "out", out);
  if (is_given("bias", bias)) {
    require_like_x("bias", bias, x);
    require_shape("bias", bias, {1, 1, 1, weight.shape[2]}, {"", "", "", "out_features"});
  }
  const Rotation rotation = rotary != nullptr ? rotation_of(*rotary, out, false) : Rotation{};
  require_apart("out", out,
                {{"x", &x}, {"weight", &weight}, {"bias", &bias}, {"positions", &rotation.positions}});
  // A weight that lies as (in_features, out_features) is what a product takes as it is.
  const Index item = item_size(weight.dtype);
  const bool lies_turned = weight.stride[2] == item && weight.stride[3] != item;
  const Tensor right = lies_turned ? turned(weight) : weight;
  Product p = product(merged(x), right, rotation.given() ? out : merged(out), columns_of(x));
  p.b_transposed = !lies_turned;
  p.bias = bias;
  p.rotate_c = rotation;
  backend(options.device).multiply(p, options);
}

void linear_backward(const Tensor& d_y, const Tensor& x, const Tensor& weight,
                     const LinearGradients& gradients, const Rope* rotary, const Options& options) {
  require_linear(x, weight, "d_y", d_y);
  const Rotation rotation = rotary != nullptr ? rotation_of(*rotary, d_y, true) : Rotation{};
  const auto& [d_x, d_weight, d_bias] = gradients;
  const Index out_features = weight.shape[2];
  const auto require_gradient = [&](const char* argument, const Tensor& t, const Shape& shape,
                                    const AxisNames& axes) {
    if (!t.given()) return;
    require_like_x(argument, t, x);
    require_shape(argument, t, shape, axes);
    require_apart(argument, t,
                  {{"d_y", &d_y}, {"x", &x}, {"weight", &weight}, {"positions", &rotation.positions}});
  };
  require_gradient("d_x", d_x, x.shape, kTokenAxes);
  require_gradient("d_weight", d_weight, weight.shape, {"", "", "out_features", "in_features"});
  require_gradient("d_bias", d_bias, {1, 1, 1, out_features}, {"", "", "", "out_features"});
  if (d_weight.given()) require_apart("d_weight", d_weight, {{"d_x", &d_x}});
  if (d_bias.given()) require_apart("d_bias", d_bias, {{"d_x", &d_x}, {"d_weight", &d_weight}});

  const Backend& device = backend(options.device);
  const Tensor given = rotation.given() ? d_y : merged(d_y);
  if (d_x.given()) {
    Product p = product(given, weight, merged(d_x), out_features);
    p.rotate_a = rotation;
    device.multiply(p, options);
  }
  if (d_weight.given()) {
    Product p = product(given, x, d_weight, rows_of(x));
    p.a_transposed = true;
    p.rotate_a = rotation;
    device.multiply(p, options);
  }
  if (d_bias.given()) {
    Product p = product(given, Tensor{}, d_bias, rows_of(d_y));
    p.rotate_a = rotation;
    device.sum_rows(p, options);
  }
}

}  // namespace attncore
