#include "resolve.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include "distance_bias.h"
#include "require.h"

namespace attncore {
namespace {

using std::to_string;

constexpr Index kFarthest = Index{1} << 60;  // as far as positions reach: sums of two stay in range
constexpr Index kMostDims = Index{1} << 24;

/// What is added to scores: float32, or query's dtype.
void require_addend_dtype(const char* argument, const Tensor& t, const Call& call) {
  if (t.dtype == call.query.dtype) return;
  if (call.query.dtype == DType::f32) return require_dtype(argument, t, {DType::f32});
  require_dtype(argument, t, {DType::f32, call.query.dtype});
}

void require_dim(const char* argument, const Tensor& t) {
  if (t.shape[3] >= 1 && t.shape[3] <= kMostDims) return;
  reject(argument, "shape is " + shape_text(t.shape) + ", dim must be 1 … " + to_string(kMostDims));
}

void require_operands(Call& call, bool with_value) {
  constexpr auto kAxes = "(batch, head, token, dim)";
  require_data("query", call.query);
  require_data("key", call.key);
  require_dtype("query", call.query, {DType::f32, DType::f64, DType::f16, DType::bf16});
  require_query_dtype("key", call.key, call);
  call.batch = call.query.shape[0];
  call.heads = call.query.shape[1];
  call.queries = call.query.shape[2];
  call.dim = call.query.shape[3];
  call.kv_heads = call.key.shape[1];
  call.keys = call.key.shape[2];
  require_dim("query", call.query);
  if (call.heads < 1)
    reject("query", "shape is " + shape_text(call.query.shape) + ", there must be at least 1 head");
  require_shape("key", call.key, {call.batch, call.kv_heads, call.keys, call.dim}, kAxes);
  if (call.kv_heads < 1 || call.heads % call.kv_heads != 0) {
    reject("key", "has " + to_string(call.kv_heads) + " heads, query's " + to_string(call.heads) +
                      " must be a multiple of it");
  }
  call.group = call.heads / call.kv_heads;
  if (!with_value) return;
  require_data("value", call.value);
  require_query_dtype("value", call.value, call);
  call.value_dim = call.value.shape[3];
  require_shape("value", call.value, {call.batch, call.kv_heads, call.keys, call.value_dim}, kAxes);
  require_dim("value", call.value);
}

std::string number(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", x);
  return text;
}

void require_scalars(Call& call) {
  const Score& score = call.score;
  const bool f64 = call.compute() == DType::f64;
  const double largest = f64 ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  const double smallest = f64 ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
  const std::string in = std::string(" in ") + name(call.compute());
  call.scale = score.scale.value_or(1 / std::sqrt(static_cast<double>(call.dim)));
  if (!(std::abs(call.scale) <= largest))
    reject("scale", "is " + number(call.scale) + ", must be finite" + in);
  call.softcap = score.softcap.value_or(0);
  if (score.softcap && !(std::isfinite(call.softcap) && call.softcap >= smallest)) {
    reject("softcap", "is " + number(call.softcap) + ", must be finite and greater than 0" + in);
  }
  if (call.softcap > largest) call.softcap = 0;  // no score is near it
  for (const Index bound : {score.left, score.right}) {
    if (bound < 0) reject("window", "has the bound " + to_string(bound) + ", bounds must be at least 0");
  }
  if (score.causal) call.score.right = 0;
  if (score.left > 2 * kFarthest) call.score.left = kUnbounded;
  if (call.score.right > 2 * kFarthest) call.score.right = kUnbounded;
}

void require_mask_and_biases(Call& call) {
  const Shape scores{call.batch, call.heads, call.queries, call.keys};
  constexpr auto kAxes = "(batch, head, query, key)";
  if (Tensor& mask = call.score.mask; mask.given()) {
    require_dtype("mask", mask, {DType::boolean});
    broadcast_to("mask", mask, scores, kAxes);
  }
  for (std::size_t i = 0; i < call.score.biases.size; ++i) {
    Tensor& bias = call.score.biases.items[i];
    require_data("bias", bias);
    require_addend_dtype("bias", bias, call);
    broadcast_to("bias", bias, scores, kAxes);
  }
}

void require_head_parameters(Call& call) {
  if (Tensor& alibi = call.score.alibi; alibi.given()) {
    require_addend_dtype("alibi", alibi, call);
    if (alibi.shape[1] != call.heads) {
      reject("alibi",
             "has " + to_string(alibi.shape[1]) + " slopes, query has " + to_string(call.heads) + " heads");
    }
    broadcast_to("alibi", alibi, {call.batch, call.heads, 1, 1}, "(batch, head)");
  }
  if (const Tensor& sinks = call.score.sinks; sinks.given()) {
    require_addend_dtype("sinks", sinks, call);
    require_shape("sinks", sinks, {1, call.heads, 1, 1}, "(1, head, 1, 1)");
  }
}

Index read_length(const char* argument, const Tensor& lengths, Index entry, Index tokens) {
  if (!lengths.given()) return tokens;
  const Index length = read_int(at(lengths, entry, 0), lengths.dtype);
  if (length < 0 || length > tokens) {
    reject(argument,
           "entry " + to_string(entry) + " is " + to_string(length) + ", must be 0 … " + to_string(tokens));
  }
  return length;
}

/// Lengths and offsets, read once.
void read_sequences(Call& call) {
  Score& score = call.score;
  for (const auto& [argument, lengths] :
       {std::pair<const char*, const Tensor&>{"query_lengths", score.query_lengths},
        {"key_lengths", score.key_lengths}}) {
    if (lengths.given()) require_ints(argument, lengths, {call.batch, 1, 1, 1}, "(batch)");
  }
  Tensor& offset = score.query_offset;
  if (offset.given()) {
    require_dtype("query_offset", offset, {DType::i32, DType::i64});
    broadcast_to("query_offset", offset, {call.batch, 1, 1, 1}, "(batch)");
  }
  if (!score.query_lengths.given() && !score.key_lengths.given() && !offset.given()) return;
  call.sequences.reserve(static_cast<std::size_t>(call.batch));
  for (Index entry = 0; entry < call.batch; ++entry) {
    const Index queries = read_length("query_lengths", score.query_lengths, entry, call.queries);
    const Index keys = read_length("key_lengths", score.key_lengths, entry, call.keys);
    const Index first = offset.given() ? read_int(at(offset, entry, 0), offset.dtype) : keys - queries;
    if (first < -kFarthest || first > kFarthest) {
      reject("query_offset", "is " + to_string(first) + ", must be within ± 2**60");
    }
    call.sequences.push_back({entry, queries, keys, first});
  }
}

void require_relative_bias(Call& call) {
  RelativeBias& bias = call.score.relative_bias;
  if (!bias.table.given()) return;
  require_addend_dtype("relative_bias", bias.table, call);
  const Index buckets = bias.table.shape[3], least = bias.bidirectional ? 4 : 2;
  require_shape("relative_bias", bias.table, {1, call.heads, 1, buckets}, "(1, head, 1, bucket)");
  if (buckets < least || (bias.bidirectional && buckets % 2 != 0)) {
    reject("relative_bias", "has " + to_string(buckets) + " buckets, must have at least " + to_string(least) +
                                (bias.bidirectional ? ", an even number" : ""));
  }
  const Index exact = buckets / (bias.bidirectional ? 4 : 2);
  if (bias.max_distance <= exact || bias.max_distance > kFarthestDistance) {
    reject("max_distance", "is " + to_string(bias.max_distance) + ", must be " + to_string(exact + 1) +
                               " … " + to_string(kFarthestDistance) + " for " + to_string(buckets) +
                               " buckets");
  }
}

void require_token_parameters(Call& call) {
  Score& score = call.score;
  if (score.query_segments.given() != score.key_segments.given()) {
    reject(score.query_segments.given() ? "key_segments" : "query_segments",
           "is not given, query_segments and key_segments come together");
  }
  if (score.query_segments.given()) {
    require_ints("query_segments", score.query_segments, {call.batch, 1, call.queries, 1}, "(batch, token)");
    require_ints("key_segments", score.key_segments, {call.batch, 1, call.keys, 1}, "(batch, token)");
  }
  read_sequences(call);
}

}  // namespace

void require_query_dtype(const char* argument, const Tensor& t, const Call& call) {
  if (t.dtype == call.query.dtype) return;
  throw DTypeError(std::string(argument) + ": dtype is " + name(t.dtype) + ", accepted is " +
                   name(call.query.dtype) + ", as query's");
}

Coins coins_of(const Dropout& dropout) {
  constexpr double kCoins = 65536;
  if (!(dropout.probability >= 0 && dropout.probability < 1)) {
    reject("dropout_p", "is " + number(dropout.probability) + ", must be at least 0 and less than 1");
  }
  const double dropped = std::min(std::round(dropout.probability * kCoins), kCoins - 1);
  return {dropout.seed, static_cast<std::uint32_t>(dropped)};
}

Call resolve(const Problem& problem, bool with_value) {
  Call call;
  call.query = problem.query;
  call.key = problem.key;
  if (with_value) call.value = problem.value;
  call.score = problem.score;
  require_operands(call, with_value);
  require_scalars(call);
  require_mask_and_biases(call);
  require_head_parameters(call);
  require_relative_bias(call);
  call.dropout = coins_of(problem.dropout);
  require_token_parameters(call);
  if (call.score.relative_bias.table.given()) call.distance_bias = lay_out(call);
  return call;
}

}  // namespace attncore
