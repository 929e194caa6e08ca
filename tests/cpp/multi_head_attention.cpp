// The multi-head layer from C++: against the textbook, central differences, threads, what is refused.
#include <attncore/layers.hpp>
#include <cmath>
#include <string>
#include <vector>

#include "check.h"
#include "kit.h"

namespace {

using namespace attncore;
using Settings = MultiHeadAttentionSettings;
using Numbers = std::vector<double>;

Tensor tokens(const Numbers& numbers, Index batch, Index count) {
  return Tensor::contiguous(numbers.data(), DType::f64,
                            {batch, 1, count, Index(numbers.size()) / (batch * count)});
}

double* data(const Tensor& t) { return static_cast<double*>(t.data); }
Index items(const Tensor& t) { return t.shape[0] * t.shape[1] * t.shape[2] * t.shape[3]; }

double dot(const double* a, const double* b, Index count) {
  double sum = 0;
  for (Index i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

/// Self-attention of one head and one sequence without masks, x (tokens, width): y at the last token.
Numbers textbook(const MultiHeadAttention& layer, const Numbers& x, Index count, Index width) {
  const double *const w = data(layer.parameters()[0].value), *const b = data(layer.parameters()[1].value);
  const double *const out_w = data(layer.parameters()[2].value), *const out_b =
                                                                     data(layer.parameters()[3].value);
  const auto project = [&](Index token, Index feature) {
    return dot(&x[std::size_t(token * width)], w + feature * width, width) + b[feature];
  };
  Numbers weights, mixed(std::size_t(width), 0.0), y;
  double sum = 0;
  for (Index key = 0; key < count; ++key) {
    double score = 0;
    for (Index i = 0; i < width; ++i) score += project(count - 1, i) * project(key, width + i);
    weights.push_back(std::exp(score / std::sqrt(double(width))));
    sum += weights.back();
  }
  for (Index key = 0; key < count; ++key) {
    for (Index i = 0; i < width; ++i)
      mixed[std::size_t(i)] += weights[std::size_t(key)] / sum * project(key, 2 * width + i);
  }
  for (Index i = 0; i < width; ++i) y.push_back(dot(mixed.data(), out_w + i * width, width) + out_b[i]);
  return y;
}

void plain() {
  constexpr Index kTokens = 9, kWidth = 6;
  MultiHeadAttention layer({.embed_dim = kWidth, .num_heads = 1, .dtype = DType::f64, .seed = 3});
  Random random;
  for (const auto& parameter : layer.parameters()) {
    for (Index i = 0; i < items(parameter.value); ++i) data(parameter.value)[i] += double(random.number());
  }
  const Numbers x = noise<double>(kTokens * kWidth, random);
  Numbers y(x.size());
  layer.forward({.x = tokens(x, 1, kTokens)}, tokens(y, 1, kTokens));
  const Numbers expected = textbook(layer, x, kTokens, kWidth);
  for (Index i = 0; i < kWidth; ++i)
    CHECK(std::fabs(y[std::size_t((kTokens - 1) * kWidth + i)] - expected[std::size_t(i)]) < 1e-12);
}

/// A layer with everything, and a call of it.
struct Full {
  static constexpr Index kBatch = 2, kQueries = 5, kKeys = 7, kWidth = 12, kKeyWidth = 5, kValueWidth = 4;
  Random random;
  Numbers x = noise<double>(kBatch * kQueries * kWidth, random),
          context = noise<double>(kBatch * kKeys * kKeyWidth, random),
          value_context = noise<double>(kBatch * kKeys * kValueWidth, random),
          d_y = noise<double>(kBatch * kQueries * kWidth, random), y = Numbers(x.size());
  MultiHeadAttention layer{Settings{.embed_dim = kWidth,
                                    .num_heads = 4,
                                    .num_kv_heads = 2,
                                    .key_dim = kKeyWidth,
                                    .value_dim = kValueWidth,
                                    .head_dim = 6,
                                    .bias_kv = true,
                                    .add_zero_attn = true,
                                    .rotary = Rope{.base = 100, .dims = 4},
                                    .qk_norm = 1e-4,
                                    .dtype = DType::f64,
                                    .seed = 11}};
  MultiHeadAttention::Activations activations;
  MultiHeadAttention::Inputs inputs{.x = tokens(x, kBatch, kQueries),
                                    .context = tokens(context, kBatch, kKeys),
                                    .value_context = tokens(value_context, kBatch, kKeys)};

  Full() {
    inputs.score.causal = true;
    inputs.dropout = {0.25, 9};
  }

  double loss() {
    layer.forward(inputs, tokens(y, kBatch, kQueries));
    return dot(y.data(), d_y.data(), Index(y.size()));
  }
};

/// The layer by its two ends and attention in between; only what is wanted is made.
void projections() {
  Full full;
  full.layer.forward(full.inputs, tokens(full.y, Full::kBatch, Full::kQueries));
  Settings apart = full.layer.settings();
  apart.bias_kv = apart.add_zero_attn = false;
  MultiHeadAttention layer(apart);
  const auto heads = [](Numbers& memory, Index count, Index length) {
    memory.resize(std::size_t(Full::kBatch * count * length * 6));
    return Tensor::contiguous(memory.data(), DType::f64, {Full::kBatch, count, length, 6});
  };
  Numbers q, k, v, o, y(full.y.size()), by_hand(full.y.size()), only(std::size_t(2 * 2 * 7 * 6));
  const MultiHeadAttention::HeadTensors made{heads(q, 4, 5), heads(k, 2, 7), heads(v, 2, 7)};
  layer.forward(full.inputs, tokens(y, Full::kBatch, Full::kQueries));
  layer.in_proj(full.inputs, made);
  layer.in_proj({.context = full.inputs.context}, {.key = heads(only, 2, 7)});
  CHECK(only == k);
  for (const Tensor& t : {made.query, made.key}) rope(t, *apart.rotary, t);
  const Tensor out = heads(o, 4, 5);
  forward({.query = made.query,
           .key = made.key,
           .value = made.value,
           .out = out,
           .score = full.inputs.score,
           .dropout = full.inputs.dropout});
  layer.out_proj(out, tokens(by_hand, Full::kBatch, Full::kQueries));
  CHECK(by_hand == y);
}

void gradients() {
  Full full;
  Numbers d_x(full.x.size()), d_context(full.context.size()), d_value_context(full.value_context.size());
  const MultiHeadAttention::InputGradients wanted{
      .d_y = tokens(full.d_y, Full::kBatch, Full::kQueries),
      .d_x = tokens(d_x, Full::kBatch, Full::kQueries),
      .d_context = tokens(d_context, Full::kBatch, Full::kKeys),
      .d_value_context = tokens(d_value_context, Full::kBatch, Full::kKeys)};
  full.layer.forward(full.inputs, tokens(full.y, Full::kBatch, Full::kQueries), &full.activations);
  CHECK(full.activations.bytes() > 0);
  full.layer.backward(full.activations, wanted);

  std::vector<std::pair<Tensor, Tensor>> pairs{{full.inputs.x, wanted.d_x},
                                               {full.inputs.context, wanted.d_context},
                                               {full.inputs.value_context, wanted.d_value_context}};
  for (const auto& parameter : full.layer.parameters())
    pairs.emplace_back(parameter.value, parameter.gradient);
  CHECK(pairs.size() == 3 + 10);
  constexpr double kStep = 1e-5;
  for (const auto& [variable, gradient] : pairs) {
    const Index i = items(variable) / 2;
    const double kept = data(variable)[i];
    data(variable)[i] = kept + kStep;
    const double more = full.loss();
    data(variable)[i] = kept - kStep;
    const double less = full.loss();
    data(variable)[i] = kept;
    CHECK(std::fabs((more - less) / (2 * kStep) - data(gradient)[i]) < 1e-7);
  }

  // What is not wanted is not written, sums are made of what is there, and threads change nothing.
  const auto& weight = full.layer.parameters().front();
  const double once = data(weight.gradient)[0];
  const Numbers d_x_before = d_x;
  for (const int threads : {1, 3}) {
    full.layer.backward(full.activations, {.d_y = wanted.d_y, .d_x = wanted.d_x}, false,
                        {.num_threads = threads});
    CHECK(d_x == d_x_before && data(weight.gradient)[0] == once);
  }
  full.layer.backward(full.activations, {.d_y = wanted.d_y}, true);
  CHECK(data(weight.gradient)[0] == 2 * once);
}

void weights() {
  Full full;
  constexpr Index kAll = Full::kKeys + 2;
  full.layer.forward(full.inputs, tokens(full.y, Full::kBatch, Full::kQueries), &full.activations);
  Numbers by_head(Full::kBatch * 4 * Full::kQueries * kAll), mean(Full::kBatch * Full::kQueries * kAll);
  full.layer.weights(full.activations,
                     Tensor::contiguous(by_head.data(), DType::f64, {Full::kBatch, 4, Full::kQueries, kAll}));
  full.layer.weights(full.activations,
                     Tensor::contiguous(mean.data(), DType::f64, {Full::kBatch, 1, Full::kQueries, kAll}));
  for (Index row = 0; row < Index(by_head.size()) / kAll; ++row) {
    double sum = 0;
    for (Index key = 0; key < kAll; ++key) sum += by_head[std::size_t(row * kAll + key)];
    CHECK(std::fabs(sum - 1) < 1e-12);
  }
  double sum = 0;
  for (Index head = 0; head < 4; ++head) sum += by_head[std::size_t(head * Full::kQueries * kAll)];
  CHECK(std::fabs(sum / 4 - mean[0]) < 1e-15);
}

/// A backward pass that adds to the gradients, cancelled anywhere: it has added nothing.
void cancelled() {
  Full full;
  const Tensor d_y = tokens(full.d_y, Full::kBatch, Full::kQueries);
  full.layer.forward(full.inputs, tokens(full.y, Full::kBatch, Full::kQueries), &full.activations);
  const auto all = [&] {
    Numbers numbers;
    for (const auto& p : full.layer.parameters()) {
      numbers.insert(numbers.end(), data(p.gradient), data(p.gradient) + items(p.gradient));
    }
    return numbers;
  };
  int polls = 0;
  full.layer.backward(full.activations, {.d_y = d_y}, true,
                      {.num_threads = 1, .cancelled = [&] { return ++polls < 0; }});
  const Numbers before = all();
  CHECK(polls > 1);
  for (int place = 0; place < polls; ++place) {
    int left = place;
    try {
      full.layer.backward(full.activations, {.d_y = d_y}, true,
                          {.num_threads = 1, .cancelled = [&] { return left-- == 0; }});
      CHECK(false);
    } catch (const Cancelled&) {
    }
    CHECK(all() == before);
  }
}

void errors() {
  Full full;
  const Tensor y = tokens(full.y, Full::kBatch, Full::kQueries),
               d_y = tokens(full.d_y, Full::kBatch, Full::kQueries);
  CHECK(refused([] { MultiHeadAttention layer({.embed_dim = 6, .num_heads = 4}); }, "num_heads: "));
  CHECK(refused([] { MultiHeadAttention layer({.embed_dim = 6, .num_heads = 2, .dtype = DType::i32}); },
                "dtype: "));
  CHECK(refused([&] { full.layer.backward(full.activations, {.d_y = d_y}); }, "activations: "));
  CHECK(refused([&] { full.layer.forward(full.inputs, full.inputs.x); }, "y: overlaps x"));
  full.layer.forward(full.inputs, y, &full.activations);
  MultiHeadAttention other({.embed_dim = Full::kWidth, .num_heads = 4, .dtype = DType::f64});
  CHECK(refused([&] { other.backward(full.activations, {.d_y = d_y}); }, "activations: "));
  CHECK(
      refused([&] { full.layer.backward(full.activations, {.d_y = d_y, .d_x = d_y}); }, "d_x: overlaps d_y"));
  CHECK(refused([&] { full.layer.backward(full.activations, {.d_y = d_y, .d_alibi = y}); }, "d_alibi: "));
  Numbers slopes(4, 0.5), d_x(full.y.size());
  const auto four = [](double* data) { return Tensor::contiguous(data, DType::f64, {1, 4, 1, 1}); };
  MultiHeadAttention::Inputs sloping = full.inputs;
  sloping.score.alibi = four(slopes.data());
  full.layer.forward(sloping, y, &full.activations);
  const Tensor over = tokens(d_x, Full::kBatch, Full::kQueries);
  const auto both = [&] {
    full.layer.backward(full.activations, {.d_y = d_y, .d_x = over, .d_alibi = four(d_x.data() + 1)});
  };
  CHECK(refused(both, "d_alibi: overlaps d_x"));
  full.layer.forward(full.inputs, y, &full.activations);
  MultiHeadAttention moved = std::move(full.layer);  // its activations stay good
  moved.backward(full.activations, {.d_y = d_y});
  full.inputs.context = {};
  CHECK(refused([&] { moved.forward(full.inputs, y, &full.activations); }, "value_context: "));
  CHECK(refused([&] { moved.backward(full.activations, {.d_y = d_y}); }, "activations: "));
}

}  // namespace

int main() {
  for (const std::string& name : available_isas()) {
    use_isa(name);
    plain();
    projections();
    gradients();
    weights();
  }
  cancelled();
  errors();
  return finish();
}
