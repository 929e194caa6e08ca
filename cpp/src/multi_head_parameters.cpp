// The multi-head layer's settings, parameters and their initial values.
#include <algorithm>
#include <atomic>
#include <attncore/layers.hpp>
#include <cmath>
#include <cstring>
#include <numbers>
#include <random>

#include "number.h"
#include "require.h"

namespace attncore {
namespace {

using std::to_string;

void require_rotary(const MultiHeadAttentionSettings& s) {
  if (!s.rotary) return;
  require_rope(*s.rotary, s.head_dim);
  if (s.rotary->positions.given()) reject("rotary", "has positions, which are given with each call");
}

MultiHeadAttentionSettings resolve(MultiHeadAttentionSettings s) {
  require_float("dtype", {.dtype = s.dtype});
  require_range("embed_dim", s.embed_dim, kMostDims);
  require_range("num_heads", s.num_heads, kMostDims);
  if (s.head_dim == 0 && s.embed_dim % s.num_heads != 0) {
    reject("num_heads", "is " + to_string(s.num_heads) + ", must divide embed_dim, " +
                            to_string(s.embed_dim) + ", unless head_dim is given");
  }
  for (const auto& [width, otherwise] : {std::pair<Index&, Index>{s.num_kv_heads, s.num_heads},
                                         {s.key_dim, s.embed_dim},
                                         {s.value_dim, s.embed_dim},
                                         {s.head_dim, s.embed_dim / s.num_heads}}) {
    if (width == 0) width = otherwise;
  }
  require_range("num_kv_heads", s.num_kv_heads, kMostDims);
  require_range("key_dim", s.key_dim, kMostDims);
  require_range("value_dim", s.value_dim, kMostDims);
  require_range("head_dim", s.head_dim, kMostDims);
  if (s.num_heads % s.num_kv_heads != 0) {
    reject("num_kv_heads",
           "is " + to_string(s.num_kv_heads) + ", must divide num_heads, " + to_string(s.num_heads));
  }
  require_range("num_heads · head_dim", s.num_heads * s.head_dim, kMostDims);
  require_rotary(s);
  if (s.qk_norm && !(std::isfinite(*s.qk_norm) && *s.qk_norm >= 0)) {
    reject("qk_norm", "is " + to_string(*s.qk_norm) + ", must be finite and at least 0");
  }
  return s;
}

enum class Initial : std::uint8_t { zeros, ones, uniform, normal };

struct Sketch {
  const char* name;
  std::vector<Index> shape;
  Initial initial = Initial::zeros;
  double scale = 0;      // the uniform distribution's bound, the normal one's deviation
  bool follows = false;  // in memory, the one before it: without a gap
};

/// Glorot & Bengio 2010, as torch.nn.init has it: weights ~ U(± √(6 / (fan_in + fan_out))).
Sketch xavier(const char* name, Index out_features, Index in_features) {
  return {name,
          {out_features, in_features},
          Initial::uniform,
          std::sqrt(6.0 / static_cast<double>(in_features + out_features))};
}

/// In the order of memory: the three input projections follow each other without gaps, so that those of the same
/// input run as one product.
std::vector<Sketch> sketch(const MultiHeadAttentionSettings& s) {
  const Index queries = s.num_heads * s.head_dim, keys = s.num_kv_heads * s.head_dim;
  const bool packed = s.key_dim == s.embed_dim && s.value_dim == s.embed_dim && s.num_kv_heads == s.num_heads;
  std::vector<Sketch> sketches;
  if (packed) {
    sketches.push_back(xavier("in_proj_weight", 3 * queries, s.embed_dim));
  } else {
    sketches.push_back(xavier("q_proj_weight", queries, s.embed_dim));
    sketches.push_back(xavier("k_proj_weight", keys, s.key_dim));
    sketches.push_back(xavier("v_proj_weight", keys, s.value_dim));
    sketches[1].follows = sketches[2].follows = true;
  }
  if (s.bias) sketches.push_back({"in_proj_bias", {queries + 2 * keys}});
  if (s.bias_kv) {  // xavier_normal_ of (1, 1, n): a deviation of √(2 / (n + n))
    const double deviation = 1 / std::sqrt(static_cast<double>(keys));
    sketches.push_back({"bias_k", {1, 1, keys}, Initial::normal, deviation});
    sketches.push_back({"bias_v", {1, 1, keys}, Initial::normal, deviation});
  }
  if (s.qk_norm) {
    sketches.push_back({"q_norm.weight", {s.head_dim}, Initial::ones});
    sketches.push_back({"k_norm.weight", {s.head_dim}, Initial::ones});
  }
  // torch leaves the output projection as nn.Linear has it: U(± 1 / √fan_in).
  sketches.push_back({"out_proj.weight",
                      {s.embed_dim, queries},
                      Initial::uniform,
                      1 / std::sqrt(static_cast<double>(queries))});
  if (s.bias) sketches.push_back({"out_proj.bias", {s.embed_dim}});
  return sketches;
}

/// Random numbers that are the same with every standard library: the engine is specified, its distributions are not.
class Numbers {
 public:
  explicit Numbers(std::uint64_t seed) : engine_(seed) {}
  double uniform(double bound) { return (2 * unit() - 1) * bound; }
  double normal(double deviation) {  // Box & Muller 1958
    const double radius = std::sqrt(-2 * std::log(1 - unit()));
    return deviation * radius * std::cos(2 * std::numbers::pi * unit());
  }

 private:
  double unit() { return static_cast<double>(engine_() >> 11U) * 0x1p-53; }  // 0 ≤ unit < 1
  std::mt19937_64 engine_;
};

void fill(const Tensor& t, const Sketch& sketch, Numbers& numbers) {
  const Index items = t.shape[1] * t.shape[2] * t.shape[3];
  for (Index i = 0; i < items; ++i) {
    double value = sketch.initial == Initial::ones ? 1 : 0;
    if (sketch.initial == Initial::uniform) value = numbers.uniform(sketch.scale);
    if (sketch.initial == Initial::normal) value = numbers.normal(sketch.scale);
    write_number(value, static_cast<std::byte*>(t.data) + i * item_size(t.dtype), t.dtype);
  }
}

/// No two layers have the same, also one after another at one address.
std::uint64_t next_identity() noexcept {
  static std::atomic<std::uint64_t> made = 0;
  return ++made;
}

}  // namespace

MultiHeadAttention::MultiHeadAttention(const MultiHeadAttentionSettings& settings)
    : settings_(resolve(settings)), identity_(next_identity()) {
  constexpr Index kAlignment = 64;
  const std::vector<Sketch> sketches = sketch(settings_);
  std::vector<Index> offsets;
  Index bytes = 0;
  for (const Sketch& s : sketches) {
    if (!s.follows) bytes = round_up(bytes, kAlignment);
    offsets.push_back(bytes);
    Index items = item_size(settings_.dtype);
    for (const Index extent : s.shape) items *= extent;
    bytes += items;
  }
  std::byte* const values = values_.reserve(static_cast<std::size_t>(bytes));
  std::byte* const gradients = gradients_.reserve(static_cast<std::size_t>(bytes));
  std::memset(gradients, 0, static_cast<std::size_t>(bytes));
  Numbers numbers(settings_.seed);
  for (std::size_t i = 0; i < sketches.size(); ++i) {
    Shape shape{1, 1, 1, 1};
    std::copy_backward(sketches[i].shape.begin(), sketches[i].shape.end(), shape.end());
    parameters_.push_back({sketches[i].name, sketches[i].shape,
                           Tensor::contiguous(values + offsets[i], settings_.dtype, shape),
                           Tensor::contiguous(gradients + offsets[i], settings_.dtype, shape)});
    fill(parameters_.back().value, sketches[i], numbers);
  }
}

}  // namespace attncore
