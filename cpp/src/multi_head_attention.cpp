// The multi-head layer forward: project, normalise and rotate, attend, project.
#include <algorithm>

#include "multi_head.h"

namespace attncore {
namespace {

using Settings = MultiHeadAttentionSettings;

/// Gives the call its memory, and says what attention will read and write there.
void prepare(const Settings& s, MultiHeadState& state) {
  const Extents& e = state.extents;
  const DType compute = accumulation(s.dtype);
  const Shape queries{e.batch, s.num_heads, e.queries, s.head_dim}, rows{e.batch, s.num_heads, e.queries, 1};
  Problem &attention = state.attention = {}, &appended = state.appended = {};
  Tensors memory;
  state.projected.add_to(memory, s, e);
  if (s.qk_norm) {
    memory.add(attention.query, s.dtype, queries);
    memory.add(attention.key, s.dtype, {e.batch, s.num_kv_heads, e.keys, s.head_dim});
  }
  memory.add(attention.out, s.dtype, queries);
  memory.add(attention.lse, compute, rows);
  if (const Index count = appended_keys(s); count > 0) {
    for (Tensor* const t : {&appended.key, &appended.value}) {
      memory.add(*t, s.dtype, {1, s.num_kv_heads, count, s.head_dim});
    }
    for (Tensor* const t : {&appended.out, &state.merged.out}) memory.add(*t, s.dtype, queries);
    for (Tensor* const t : {&appended.lse, &state.merged.lse}) memory.add(*t, compute, rows);
  }
  memory.reserve(state.memory);

  state.projected.split(s, e);
  if (!s.qk_norm) {
    attention.query = state.projected.query;
    attention.key = state.projected.key;
  }
  attention.value = state.projected.value;
  attention.score = state.inputs.score;
  attention.dropout = state.inputs.dropout;
  attention.precision = state.inputs.precision;
  if (e.self && !attention.score.query_offset.given()) {
    static constexpr Index kZero = 0;
    attention.score.query_offset = Tensor::contiguous(&kZero, DType::i64, {1, 1, 1, 1});
  }
  if (appended_keys(s) == 0) state.merged = {attention.out, attention.lse};
}

/// Attention over the appended keys is a problem of its own, of the same queries: no option that speaks of keys or
/// positions holds there.  Its dropout has a seed of its own, since key 0 there is another one.
void prepare_appended(const Settings& s, const Parameters& values, MultiHeadState& state) {
  Problem& appended = state.appended;
  const std::size_t row = static_cast<std::size_t>(s.head_dim * item_size(s.dtype));
  for (const auto& [t, name] :
       {std::pair<Tensor&, const char*>{appended.key, "bias_k"}, {appended.value, "bias_v"}}) {
    const Tensor learned = values.by_head(name, s);
    for (Index head = 0; head < s.num_kv_heads; ++head) {
      if (s.bias_kv) std::copy_n(at(learned, 0, head), row, at(t, 0, head));
      if (s.add_zero_attn) std::fill_n(at(t, 0, head, s.bias_kv ? 1 : 0), row, std::byte{0});
    }
    t.shape[0] = state.extents.batch;  // the same for every batch entry
    t.stride[0] = 0;
  }
  constexpr std::uint64_t kOtherSeed = 0x9E3779B97F4A7C15;
  appended.query = state.attention.query;
  appended.score.scale = state.attention.score.scale;
  appended.score.softcap = state.attention.score.softcap;
  appended.score.query_lengths = state.attention.score.query_lengths;
  appended.dropout = state.attention.dropout;
  appended.precision = state.attention.precision;
  appended.dropout.seed ^= kOtherSeed;
}

void project(const Settings& s, const Parameters& values, const MultiHeadState& state,
             const Options& options) {
  const Rotations rotations(s, state.inputs);
  auto parts = projections(s, values, state);
  if (rotations.given && !s.qk_norm) {
    parts[0].rotary = &rotations.query;
    parts[1].rotary = state.extents.self ? &rotations.query : &rotations.key;
  }
  for (const Projection& p : joined(parts)) linear(p.input, p.weight, p.bias, p.heads, p.rotary, options);
  if (!s.qk_norm) return;
  const Tensor &query = state.attention.query, &key = state.attention.key;
  rms_norm(state.projected.query, values("q_norm.weight"), *s.qk_norm, query, options);
  rms_norm(state.projected.key, values("k_norm.weight"), *s.qk_norm, key, options);
  if (!rotations.given) return;
  rope(query, rotations.query, query, false, options);
  rope(key, rotations.key, key, false, options);
}

/// The probabilities of some rows, over the keys and what is appended to them.
void weights_of_rows(const MultiHeadState& state, Index first_row, const Tensor& probabilities,
                     const Options& options) {
  const Index rows = probabilities.shape[2], keys = state.extents.keys, all = probabilities.shape[3];
  std::vector<Index> indices(static_cast<std::size_t>(rows));
  for (Index i = 0; i < rows; ++i) indices[static_cast<std::size_t>(i)] = first_row + i;
  const Tensor chosen = Tensor::contiguous(indices.data(), DType::i64, {1, 1, rows, 1});
  const auto of = [&](const Problem& problem, Index begin, Index end) {
    Tensor part = probabilities;
    part.data = at(probabilities, 0, 0, 0, begin);
    part.shape[3] = end - begin;
    if (rows > 0) attention_weights(problem, {chosen, part, {}}, options);
    if (all == keys) return;
    Tensor part_lse = problem.lse, lse = state.merged.lse;
    for (Tensor* const t : {&part_lse, &lse}) {
      t->data = at(*t, 0, 0, first_row);
      t->shape[2] = rows;
    }
    scale_by_part(part, part_lse, lse, options);
  };
  of(state.attention, 0, keys);
  if (all > keys) of(state.appended, keys, all);
}

}  // namespace

MultiHeadAttention::Activations::Activations() : state_(std::make_unique<MultiHeadState>()) {}
MultiHeadAttention::Activations::~Activations() = default;
MultiHeadAttention::Activations::Activations(Activations&&) noexcept = default;
MultiHeadAttention::Activations& MultiHeadAttention::Activations::operator=(Activations&&) noexcept = default;

std::size_t MultiHeadAttention::Activations::bytes() const noexcept { return state_->memory.bytes(); }

void MultiHeadAttention::forward(const Inputs& inputs, const Tensor& y, Activations* activations,
                                 const Options& options) const {
  Activations own;
  MultiHeadState& state = *(activations != nullptr ? activations : &own)->state_;
  state.layer = 0;
  state.extents = require_inputs(settings_, inputs);
  require_result("y", y, {state.extents.batch, 1, state.extents.queries, settings_.embed_dim},
                 settings_.dtype, inputs, kWidthAxes);
  state.inputs = inputs;
  prepare(settings_, state);
  (void)validate(state.attention);  // the options too are checked before any work

  const Parameters values(parameters_, &Parameter::value);
  project(settings_, values, state, options);
  attncore::forward(state.attention, options);
  if (appended_keys(settings_) > 0) {
    prepare_appended(settings_, values, state);
    attncore::forward(state.appended, options);
    merge_states({state.attention.out, state.attention.lse}, {state.appended.out, state.appended.lse},
                 state.merged, options);
  }
  linear(state.merged.out, values("out_proj.weight"), values("out_proj.bias"), y, nullptr, options);
  state.layer = identity_;
}

void MultiHeadAttention::weights(const Activations& activations, const Tensor& probabilities,
                                 const Options& options) const {
  const MultiHeadState& state = *activations.state_;
  require_filled(state, identity_);
  const Extents& e = state.extents;
  const bool mean = probabilities.shape[1] == 1 && settings_.num_heads > 1;
  const Index keys = e.keys + appended_keys(settings_), heads = mean ? 1 : settings_.num_heads;
  require_result("probabilities", probabilities, {e.batch, heads, e.queries, keys}, state.attention.lse.dtype,
                 state.inputs, {"batch", "heads or 1", "query", "key"});
  if (!mean) return weights_of_rows(state, 0, probabilities, options);

  // A block of rows of all heads at a time.
  constexpr Index kBlockItems = Index{1} << 20;
  const Index a_row = max(1, e.batch * settings_.num_heads * keys), block = max(1, kBlockItems / a_row);
  Workspace memory;
  for (Index row = 0; row < e.queries; row += block) {
    Tensor by_head, to = probabilities;
    to.data = at(probabilities, 0, 0, row);
    to.shape[2] = min(block, e.queries - row);
    Tensors tensors;
    tensors.add(by_head, to.dtype, {e.batch, settings_.num_heads, to.shape[2], keys});
    tensors.reserve(memory);
    weights_of_rows(state, row, by_head, options);
    mean_over_heads(by_head, to, options);
  }
}

}  // namespace attncore
