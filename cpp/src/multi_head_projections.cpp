// The two ends of the multi-head layer, for those who attend in between by themselves: to a cache, say.
#include <string>
#include <vector>

#include "multi_head.h"

namespace attncore {
namespace {

using Settings = MultiHeadAttentionSettings;

/// A result of in_proj, and what it is made from.
struct Made {
  const char *argument, *from;
  Tensor heads, input;
  Index count, width;  // of heads; of the input
};

void require_made(const Settings& s, const Made& made, std::vector<Named>& others) {
  const Tensor &heads = made.heads, &input = made.input;
  require_tensor(made.from, input, s.dtype, {input.shape[0], 1, input.shape[2], made.width}, kWidthAxes);
  require_tensor(made.argument, heads, s.dtype, {input.shape[0], made.count, input.shape[2], s.head_dim},
                 kTokenAxes);
  if (!is_empty(heads) && heads.stride[3] != item_size(s.dtype) && s.head_dim > 1)
    reject(made.argument, "has gaps along its last axis");
  others.push_back({made.from, &input});
}

}  // namespace

void MultiHeadAttention::in_proj(const Inputs& inputs, const HeadTensors& heads,
                                 const Options& options) const {
  const Settings& s = settings_;
  const bool self = !is_given("context", inputs.context);
  const Tensor& context = self ? inputs.x : inputs.context;
  const char* const context_name = self ? "x" : "context";
  const bool apart = is_given("value_context", inputs.value_context);
  const std::array<Made, 3> all{Made{"query", "x", heads.query, inputs.x, s.num_heads, s.embed_dim},
                                Made{"key", context_name, heads.key, context, s.num_kv_heads, s.key_dim},
                                Made{"value", apart ? "value_context" : context_name, heads.value,
                                     apart ? inputs.value_context : context, s.num_kv_heads, s.value_dim}};
  if (apart && self && !is_left_out(heads.key)) reject("value_context", "is given without context");
  std::vector<Named> others;
  for (const Made& made : all) {
    if (is_left_out(made.heads)) continue;
    require_made(s, made, others);
    if (made.input.shape[0] != others.front().tensor->shape[0]) {
      reject(made.from, "is of " + std::to_string(made.input.shape[0]) + " entries, " + others.front().name +
                            " of " + std::to_string(others.front().tensor->shape[0]));
    }
  }
  for (const Made& made : all) {
    if (!made.heads.given()) continue;
    require_apart(made.argument, made.heads, others);
    others.push_back({made.argument, &made.heads});
  }

  MultiHeadState state;
  state.inputs = inputs;
  state.extents.self = self;
  state.projected.query = heads.query;
  state.projected.key = heads.key;
  state.projected.value = heads.value;
  const Parameters values(parameters_, &Parameter::value);
  for (const Projection& p : joined(projections(s, values, state))) {
    if (p.heads.given()) linear(p.input, p.weight, p.bias, p.heads, nullptr, options);
  }
  if (!s.qk_norm) return;
  for (const auto& [gain, t] : {Named{"q_norm.weight", &heads.query}, {"k_norm.weight", &heads.key}}) {
    if (t->given()) rms_norm(*t, values(gain), *s.qk_norm, *t, options);
  }
}

void MultiHeadAttention::out_proj(const Tensor& out, const Tensor& y, const Options& options) const {
  const Settings& s = settings_;
  require_tensor("out", out, s.dtype, {out.shape[0], s.num_heads, out.shape[2], s.head_dim}, kTokenAxes);
  require_tensor("y", y, s.dtype, {out.shape[0], 1, out.shape[2], s.embed_dim}, kWidthAxes);
  require_apart("y", y, {{"out", &out}});
  const Parameters values(parameters_, &Parameter::value);
  linear(out, values("out_proj.weight"), values("out_proj.bias"), y, nullptr, options);
}

}  // namespace attncore
