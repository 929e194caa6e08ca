#include "multi_head.h"

#include <string>

namespace attncore {

using std::to_string;

namespace {

void require_positions(const char* argument, const Tensor& positions, const Extents& e, Index tokens,
                       bool rotary) {
  if (!is_given(argument, positions)) return;
  if (!rotary) reject(argument, "is given, but the layer has no rotary embedding");
  const Index entries = positions.shape[0] == 1 ? 1 : e.batch;
  require_ints(argument, positions, {entries, 1, tokens, 1}, {"1 or batch", "", "token"});
}

void require_contexts(const MultiHeadAttentionSettings& s, const MultiHeadAttention::Inputs& inputs,
                      const Extents& e) {
  if (e.self) {
    for (const auto& [argument, t] :
         {std::pair<const char*, const Tensor&>{"value_context", inputs.value_context},
          {"key_positions", inputs.key_positions}}) {
      if (t.given()) reject(argument, "is given without context");
    }
    if (s.key_dim != s.embed_dim || s.value_dim != s.embed_dim) {
      reject("context", "is not given, but keys and values are made from widths " + to_string(s.key_dim) +
                            " and " + to_string(s.value_dim) + ", not x's " + to_string(s.embed_dim));
    }
    return;
  }
  require_tensor("context", inputs.context, s.dtype, {e.batch, 1, e.keys, s.key_dim}, kWidthAxes);
  if (inputs.value_context.given()) {
    require_tensor("value_context", inputs.value_context, s.dtype, {e.batch, 1, e.keys, s.value_dim},
                   kWidthAxes);
  } else if (s.key_dim != s.value_dim) {
    reject("value_context", "is not given, but values are made from width " + to_string(s.value_dim) +
                                ", not context's " + to_string(s.key_dim));
  }
}

}  // namespace

Extents require_inputs(const MultiHeadAttentionSettings& s, const MultiHeadAttention::Inputs& inputs) {
  Extents e;
  (void)is_given("value_context", inputs.value_context);
  e.self = !is_given("context", inputs.context);
  e.batch = inputs.x.shape[0];
  e.queries = inputs.x.shape[2];
  e.keys = e.self ? e.queries : inputs.context.shape[2];
  require_tensor("x", inputs.x, s.dtype, {e.batch, 1, e.queries, s.embed_dim}, kWidthAxes);
  require_contexts(s, inputs, e);
  require_positions("positions", inputs.positions, e, e.queries, s.rotary.has_value());
  require_positions("key_positions", inputs.key_positions, e, e.keys, s.rotary.has_value());
  return e;
}

void require_result(const char* argument, const Tensor& result, const Shape& shape, DType dtype,
                    const MultiHeadAttention::Inputs& inputs, const AxisNames& axes) {
  require_tensor(argument, result, dtype, shape, axes);
  const Score& score = inputs.score;
  BoundedArray<Named, 4 + kMaxBiases> read{{"x", &inputs.x},
                                           {"context", &inputs.context},
                                           {"value_context", &inputs.value_context},
                                           {"mask", &score.mask}};
  for (std::size_t i = 0; i < score.biases.size; ++i) read.push_back({"bias", &score.biases.items[i]});
  require_apart(argument, result, std::span(read.items, read.size));
}

void require_filled(const MultiHeadState& state, std::uint64_t layer) {
  if (state.layer == layer) return;
  reject("activations",
         state.layer == 0 ? "no forward has filled them, or it failed" : "are those of another layer");
}

namespace {

bool same(const Tensor& a, const Tensor& b) noexcept {
  return a.data == b.data && a.shape == b.shape && a.stride == b.stride;
}

bool joins(const Projection& a, const Projection& b) noexcept {
  const auto follows = [](const Tensor& first, const Tensor& next, std::size_t axis) {
    return static_cast<std::byte*>(first.data) + first.shape[axis] * first.stride[axis] == next.data &&
           first.stride[2] == next.stride[2] && first.stride[3] == next.stride[3];
  };
  return same(a.input, b.input) && same(a.d_input, b.d_input) && a.rotary == b.rotary &&
         a.heads.shape[2] == b.heads.shape[2] && a.heads.stride == b.heads.stride &&
         follows(a.heads, b.heads, 1) && follows(a.weight, b.weight, 2);
}

void join(Projection& a, const Projection& b) noexcept {
  a.heads.shape[1] += b.heads.shape[1];
  for (Tensor* const weight : {&a.weight, &a.d_weight}) weight->shape[2] += b.weight.shape[2];
  for (Tensor* const bias : {&a.bias, &a.d_bias}) bias->shape[3] += b.weight.shape[2];
}

}  // namespace

std::vector<Projection> joined(const std::array<Projection, 3>& projections) {
  std::vector<Projection> result{projections[0]};
  for (const Projection& next : {projections[1], projections[2]}) {
    if (joins(result.back(), next)) {
      join(result.back(), next);
    } else {
      result.push_back(next);
    }
  }
  return result;
}

Tensor Parameters::operator()(const char* name) const noexcept {
  for (const Parameter& parameter : parameters_) {
    if (parameter.name == name) return parameter.*which_;
  }
  return {};
}

std::pair<Tensor, Tensor> Parameters::in_projection(const MultiHeadAttentionSettings& s,
                                                    int index) const noexcept {
  const Index queries = s.num_heads * s.head_dim, keys = s.num_kv_heads * s.head_dim;
  const Index first = index == 0 ? 0 : queries + (index - 1) * keys, features = index == 0 ? queries : keys;
  constexpr std::array<const char*, 3> kSeparate{"q_proj_weight", "k_proj_weight", "v_proj_weight"};
  Tensor weight = (*this)("in_proj_weight"), bias = (*this)("in_proj_bias");
  if (weight.given()) {
    weight.data = at(weight, 0, 0, first);
  } else {
    weight = (*this)(kSeparate[static_cast<std::size_t>(index)]);
  }
  weight.shape[2] = features;
  if (bias.given()) bias.data = at(bias, 0, 0, 0, first);
  bias.shape[3] = features;
  return {weight, bias};
}

Tensor Parameters::by_head(const char* name, const MultiHeadAttentionSettings& s) const noexcept {
  const Tensor t = (*this)(name);
  return Tensor::contiguous(t.data, s.dtype, {1, s.num_kv_heads, 1, s.head_dim});
}

void Heads::add_to(Tensors& memory, const MultiHeadAttentionSettings& s, const Extents& e) {
  const Index first = e.self ? s.num_heads + 2 * s.num_kv_heads : s.num_heads;
  memory.add(first_, s.dtype, {e.batch, first, e.queries, s.head_dim});
  if (!e.self) memory.add(second_, s.dtype, {e.batch, 2 * s.num_kv_heads, e.keys, s.head_dim});
}

void Heads::split(const MultiHeadAttentionSettings& s, const Extents& e) {
  query = part_of(first_, 1, 0, s.num_heads);
  const Tensor& others = e.self ? first_ : second_;
  const Index first = e.self ? s.num_heads : 0;
  key = part_of(others, 1, first, s.num_kv_heads);
  value = part_of(others, 1, first + s.num_kv_heads, s.num_kv_heads);
}

Rotations::Rotations(const MultiHeadAttentionSettings& settings, const MultiHeadAttention::Inputs& inputs)
    : given(settings.rotary.has_value()) {
  query = key = settings.rotary.value_or(Rope{});
  query.positions = inputs.positions;
  key.positions = inputs.context.given() ? inputs.key_positions : inputs.positions;
}

std::array<Projection, 3> projections(const MultiHeadAttentionSettings& settings,
                                      const Parameters& parameters, const MultiHeadState& state) {
  const MultiHeadAttention::Inputs& inputs = state.inputs;
  const Tensor& context = state.extents.self ? inputs.x : inputs.context;
  const std::array<Tensor, 3> read{inputs.x, context,
                                   inputs.value_context.given() ? inputs.value_context : context};
  const std::array<Tensor, 3> heads{state.projected.query, state.projected.key, state.projected.value};
  std::array<Projection, 3> result;
  for (std::size_t i = 0; i < 3; ++i) {
    const auto [weight, bias] = parameters.in_projection(settings, static_cast<int>(i));
    result[i].input = read[i];
    result[i].heads = heads[i];
    result[i].weight = weight;
    result[i].bias = bias;
  }
  return result;
}

}  // namespace attncore
