// The multi-head layer backward: each step of the forward, from the last to the first.
#include <algorithm>
#include <cassert>
#include <string>

#include "multi_head.h"
#include "row_tasks.h"

namespace attncore {
namespace {

using Settings = MultiHeadAttentionSettings;

/// The gradients between the steps.
struct Between {
  Workspace memory;
  Tensor d_out, d_lse;  // of attention over the keys
  Heads d_heads;
  State d_appended;  // the same for what is appended
  Tensor d_query, d_keys, d_values;

  Between(const Settings& s, const MultiHeadState& state) {
    const Extents& e = state.extents;
    const auto add_like = [](Tensors& tensors, Tensor& t, const Tensor& like) {
      tensors.add(t, like.dtype, like.shape);
    };
    Tensors tensors;
    add_like(tensors, d_out, state.merged.out);
    d_heads.add_to(tensors, s, e);
    if (appended_keys(s) > 0) add_like(tensors, d_lse, state.merged.lse);
    if (s.bias_kv) {
      add_like(tensors, d_appended.out, state.appended.out);
      add_like(tensors, d_appended.lse, state.appended.lse);
      add_like(tensors, d_query, state.attention.query);
      add_like(tensors, d_keys, state.appended.key);
      add_like(tensors, d_values, state.appended.value);
    }
    tensors.reserve(memory);
    d_heads.split(s, e);
  }
};

Gradients attention_gradients(const Between& between, const MultiHeadAttention::InputGradients& wanted) {
  Gradients g;
  g.d_out = between.d_out;
  g.d_lse = between.d_lse;
  g.d_query = between.d_heads.query;
  g.d_key = between.d_heads.key;
  g.d_value = between.d_heads.value;
  g.d_biases = wanted.d_biases;
  g.d_alibi = wanted.d_alibi;
  g.d_relative_bias = wanted.d_relative_bias;
  g.d_sinks = wanted.d_sinks;
  return g;
}

void attention_backward(const Settings& s, const MultiHeadState& state, const Parameters& gradients,
                        const Gradients& attention, const Between& between, const Options& options) {
  const State over_keys{state.attention.out, state.attention.lse};
  if (appended_keys(s) == 0) return backward(state.attention, attention, options);
  if (s.bias_kv) {  // zeros have no gradient, and give none to queries
    split_gradient(between.d_out, state.merged, {state.appended.out, state.appended.lse}, between.d_appended,
                   options);
    Gradients appended;
    appended.d_out = between.d_appended.out;
    appended.d_lse = between.d_appended.lse;
    appended.d_query = between.d_query;
    appended.d_key = between.d_keys;
    appended.d_value = between.d_values;
    backward(state.appended, appended, options);
    sum_over_batch(between.d_keys, gradients.by_head("bias_k", s));
    sum_over_batch(between.d_values, gradients.by_head("bias_v", s));
  }
  split_gradient(between.d_out, state.merged, over_keys, {between.d_out, between.d_lse}, options);
  backward(state.attention, attention, options);
  if (s.bias_kv) add_rows(between.d_query, between.d_heads.query, options);
}

void unproject(const Settings& s, const MultiHeadState& state, const Parameters& values,
               const Parameters& gradients, const Heads& d, const MultiHeadAttention::InputGradients& wanted,
               const Options& options) {
  const Rotations rotations(s, state.inputs);
  if (rotations.given) {
    rope(d.query, rotations.query, d.query, true, options);
    rope(d.key, rotations.key, d.key, true, options);
  }
  if (s.qk_norm) {
    rms_norm_backward(d.query, state.projected.query, values("q_norm.weight"), *s.qk_norm,
                      gradients("q_norm.weight"), options);
    rms_norm_backward(d.key, state.projected.key, values("k_norm.weight"), *s.qk_norm,
                      gradients("k_norm.weight"), options);
  }
  auto parts = projections(s, values, state);
  const std::array<Tensor, 3> d_heads{d.query, d.key, d.value};
  const Tensor& d_context = state.extents.self ? wanted.d_x : wanted.d_context;
  const std::array<Tensor, 3> d_inputs{
      wanted.d_x, d_context, state.inputs.value_context.given() ? wanted.d_value_context : d_context};
  for (std::size_t i = 0; i < 3; ++i) {
    parts[i].heads = d_heads[i];
    parts[i].d_input = d_inputs[i];
    const auto [d_weight, d_bias] = gradients.in_projection(s, static_cast<int>(i));
    parts[i].d_weight = d_weight;
    parts[i].d_bias = d_bias;
  }
  const std::vector<Projection> products =
      joined(parts);  // those with the same input are one: it writes their sum
  for (const Projection& p : products) {
    assert(std::count_if(products.begin(), products.end(), [&](const Projection& other) {
             return p.d_input.given() && other.d_input.data == p.d_input.data;
           }) <= 1);
    linear_backward(p.heads, p.input, p.weight, {p.d_input, p.d_weight, p.d_bias}, nullptr, options);
  }
}

void require_gradient(const char* argument, const Tensor& d, const char* of, const Tensor& input,
                      const MultiHeadAttention::Inputs& inputs) {
  if (!d.given()) return;
  if (!input.given()) reject(argument, std::string("is given, but the call had no ") + of);
  require_result(argument, d, input.shape, input.dtype, inputs, kWidthAxes);
}

/// The gradients of options are apart from each other and from the inputs of attention: validate() looks.
void require_all_apart(const MultiHeadAttention::InputGradients& g) {
  std::vector<Named> others{{"d_y", &g.d_y}};
  const auto add = [&](const char* argument, const Tensor& t) {
    if (!t.given()) return;
    require_apart(argument, t, others);
    others.push_back({argument, &t});
  };
  add("d_x", g.d_x);
  add("d_context", g.d_context);
  add("d_value_context", g.d_value_context);
  for (std::size_t i = 0; i < g.d_biases.size; ++i) add("d_bias", g.d_biases.items[i]);
  add("d_alibi", g.d_alibi);
  add("d_relative_bias", g.d_relative_bias);
  add("d_sinks", g.d_sinks);
}

}  // namespace

void MultiHeadAttention::backward(const Activations& activations, const InputGradients& gradients,
                                  bool accumulate, const Options& options) {
  const MultiHeadState& state = *activations.state_;
  const Inputs& inputs = state.inputs;
  const Extents& e = state.extents;
  require_filled(state, identity_);
  require_tensor("d_y", gradients.d_y, settings_.dtype, {e.batch, 1, e.queries, settings_.embed_dim},
                 kWidthAxes);
  require_gradient("d_x", gradients.d_x, "x", inputs.x, inputs);
  require_gradient("d_context", gradients.d_context, "context", inputs.context, inputs);
  require_gradient("d_value_context", gradients.d_value_context, "value_context", inputs.value_context,
                   inputs);
  require_all_apart(gradients);

  // Sums of gradients are made at the end, so that a call that fails adds nothing.
  std::vector<Parameter> targets = parameters_;
  Workspace fresh;
  if (accumulate) {
    const auto* const first = static_cast<const std::byte*>(parameters_.front().gradient.data);
    std::byte* const memory = fresh.reserve(gradients_.bytes());
    for (Parameter& target : targets) {
      target.gradient.data = memory + (static_cast<const std::byte*>(target.gradient.data) - first);
    }
  }
  const Parameters values(parameters_, &Parameter::value), d_parameters(targets, &Parameter::gradient);
  const Between between(settings_, state);
  const Gradients attention = attention_gradients(between, gradients);
  (void)validate(state.attention, attention);  // the gradients of options too are checked before any work
  linear_backward(gradients.d_y, state.merged.out, values("out_proj.weight"),
                  {between.d_out, d_parameters("out_proj.weight"), d_parameters("out_proj.bias")}, nullptr,
                  options);
  attention_backward(settings_, state, d_parameters, attention, between, options);
  unproject(settings_, state, values, d_parameters, between.d_heads, gradients, options);
  if (!accumulate) return;
  for (std::size_t i = 0; i < targets.size(); ++i) {
    add_rows(targets[i].gradient, parameters_[i].gradient, uninterrupted(options));
  }
}

}  // namespace attncore
