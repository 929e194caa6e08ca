#include "resolve.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "distance_bias.h"
#include "require.h"
#include "sequences.h"
#include "text.h"

namespace attncore {
namespace {

using std::to_string;

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

/// Keys and values as they are stored: of query's dtype, or whatever float32 holds.
void require_storage(const char* argument, const Tensor& t, const Call& call, Use use) {
  if (use != Use::forward || call.compute() == DType::f64)
    return require_like(argument, t, "query", call.query);
  require_dtype(argument, t, {DType::f32, DType::f16, DType::bf16, DType::i8, DType::f8, DType::i4});
  if (t.dtype == DType::i4 && (t.shape[3] % 2 != 0 || (t.stride[3] != 1 && t.shape[3] > 2))) {
    reject(argument, "has a dim of " + to_string(t.shape[3]) + " numbers at a stride of " +
                         to_string(t.stride[3]) + " bytes, int4 must have an even dim without gaps");
  }
}

/// One factor a token, where they are given.
void require_scale(const char* argument, const Tensor& scale, const Tensor& of) {
  if (!is_given(argument, scale)) return;
  require_dtype(argument, scale, {DType::f32});
  require_shape(argument, scale, {of.shape[0], of.shape[1], of.shape[2], 1},
                {"batch or page", "head", "token"});
}

void require_query(Call& call, const Problem& problem) {
  require_given("query", call.query);
  require_float("query", call.query);
  const Tensor& packed = problem.packing.query_tokens;
  call.batch = is_given("cu_query_lengths", packed) ? packed.shape[0] - 1 : call.query.shape[0];
  if (packed.given() && packed.shape[0] < 1) reject("cu_query_lengths", "is empty, must begin with 0");
  if (packed.given() && call.query.shape[0] != 1) {
    reject("query", "shape is " + shape_text(call.query.shape) + ", packed sequences have a batch axis of 1");
  }
  call.heads = call.query.shape[1];
  call.dim = call.query.shape[3];
  require_dim("query", call.query);
  if (call.heads < 1)
    reject("query", "shape is " + shape_text(call.query.shape) + ", there must be at least 1 head");
}

void require_operands(Call& call, const Problem& problem, Use use) {
  const bool paged = is_given("block_table", problem.paging.block_table);
  const bool packed = is_given("cu_key_lengths", problem.packing.key_tokens);
  const AxisNames& axes = paged ? kPageAxes : kTokenAxes;
  const char *const key = paged ? "key_pages" : "key", *const value = paged ? "value_pages" : "value";
  require_query(call, problem);
  require_given(key, call.key);
  require_storage(key, call.key, call, use);
  call.kv_heads = call.key.shape[1];
  if (paged && packed) reject("cu_key_lengths", "comes with a block_table");
  const Index entries = paged ? call.key.shape[0] : packed ? 1 : call.batch;
  const Index tokens = call.key.shape[2];
  require_shape(key, call.key, {entries, call.kv_heads, tokens, call.dim}, axes);
  if (call.kv_heads < 1 || call.heads % call.kv_heads != 0) {
    reject(key, "has " + to_string(call.kv_heads) + " heads, query's " + to_string(call.heads) +
                    " must be a multiple of it");
  }
  call.group = call.heads / call.kv_heads;
  require_scale("key_scale", call.key_scale, call.key);
  if (use == Use::weights) return;
  require_given(value, call.value);
  require_storage(value, call.value, call, use);
  call.value_dim = call.value.shape[3];
  require_shape(value, call.value, {entries, call.kv_heads, tokens, call.value_dim}, axes);
  require_dim(value, call.value);
  require_scale("value_scale", call.value_scale, call.value);
}

void require_scalars(Call& call) {
  const Score& score = call.score;
  const bool f64 = call.compute() == DType::f64;
  const double largest = f64 ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  const double smallest = f64 ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
  const std::string in = std::string(" in ") + name(call.compute());
  call.scale = score.scale.value_or(1 / std::sqrt(static_cast<double>(call.dim)));
  if (!(std::abs(call.scale) <= largest))
    reject("scale", "is " + short_text(call.scale) + ", must be finite" + in);
  call.softcap = score.softcap.value_or(0);
  if (score.softcap && !(std::isfinite(call.softcap) && call.softcap >= smallest)) {
    reject("softcap", "is " + short_text(call.softcap) + ", must be finite and greater than 0" + in);
  }
  if (call.softcap > largest) call.softcap = 0;  // no score is near it
  for (const Index bound : {score.left, score.right}) {
    if (bound < 0) reject("window", "has the bound " + to_string(bound) + ", bounds must be at least 0");
  }
  if (score.causal) call.score.right = 0;
  if (score.left > 2 * kFarthest) call.score.left = kUnbounded;
  if (call.score.right > 2 * kFarthest) call.score.right = kUnbounded;
}

/// What masks and biases broadcast to.  Where keys are paged, they may end with the longest sequence or with the table.
Shape scores_of(const Call& call, const Tensor& t) {
  Index longest = 0;
  for (const Sequence& sequence : call.sequences) longest = max(longest, sequence.keys);
  const bool as_table = !call.pages.given() || t.shape[3] == call.keys;
  return {call.batch, call.heads, call.queries, as_table ? call.keys : longest};
}

void require_mask_and_biases(Call& call) {
  static constexpr AxisNames kAxes{"batch", "head", "query", "key"};
  if (Tensor& mask = call.score.mask; is_given("mask", mask)) {
    require_dtype("mask", mask, {DType::boolean});
    broadcast_to("mask", mask, scores_of(call, mask), kAxes);
  }
  for (std::size_t i = 0; i < call.score.biases.size; ++i) {
    Tensor& bias = call.score.biases.items[i];
    require_given("bias", bias);
    require_addend_dtype("bias", bias, call);
    broadcast_to("bias", bias, scores_of(call, bias), kAxes);
  }
}

void require_head_parameters(Call& call) {
  if (Tensor& alibi = call.score.alibi; is_given("alibi", alibi)) {
    require_addend_dtype("alibi", alibi, call);
    if (alibi.shape[1] != call.heads) {
      reject("alibi",
             "has " + to_string(alibi.shape[1]) + " slopes, query has " + to_string(call.heads) + " heads");
    }
    broadcast_to("alibi", alibi, {call.batch, call.heads, 1, 1}, {"batch", "head"});
  }
  if (const Tensor& sinks = call.score.sinks; is_given("sinks", sinks)) {
    require_addend_dtype("sinks", sinks, call);
    require_shape("sinks", sinks, {1, call.heads, 1, 1}, {"", "head"});
  }
}

void require_relative_bias(Call& call) {
  RelativeBias& bias = call.score.relative_bias;
  if (!is_given("relative_bias", bias.table)) return;
  require_addend_dtype("relative_bias", bias.table, call);
  const Index buckets = bias.table.shape[3], least = bias.bidirectional ? 4 : 2;
  require_shape("relative_bias", bias.table, {1, call.heads, 1, buckets}, {"", "head", "", "bucket"});
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

/// What only forward can do, and backward or weights cannot.
void require_known(const Problem& problem, Use use) {
  const auto unknown = [](const char* argument, const char* to) {
    throw NotImplemented(std::string(argument) + ": " + to + " does not support it");
  };
  if (use == Use::forward) return;
  const char* const to = use == Use::backward ? "backward" : "attention_weights";
  if (problem.paging.block_table.given()) unknown("block_table", to);
  if (is_given("key_scale", problem.key_scale)) unknown("key_scale", to);
  if (is_given("value_scale", problem.value_scale)) unknown("value_scale", to);
}

/// What a lower precision is for: forward of float32.
Precision precision_of(const Call& call, Precision given, Use use) {
  if (given > Precision::medium) {
    reject("precision", "is " + to_string(static_cast<int>(given)) + ", must be highest, high or medium");
  }
  const bool f32 =
      call.query.dtype == DType::f32 && call.key.dtype == DType::f32 && call.value.dtype == DType::f32;
  return use == Use::forward && f32 ? given : Precision::highest;
}

void require_segments(const Call& call, const Problem& problem) {
  const Score& score = call.score;
  const bool given = is_given("query_segments", score.query_segments);
  if (given != is_given("key_segments", score.key_segments)) {
    reject(given ? "key_segments" : "query_segments",
           "is not given, query_segments and key_segments come together");
  }
  if (!given) return;
  const Index entries = problem.paging.block_table.given() ? call.batch : call.key.shape[0];
  const Index keys = problem.paging.block_table.given() ? call.keys : call.key.shape[2];
  require_ints("query_segments", score.query_segments, {call.query.shape[0], 1, call.query.shape[2], 1},
               {"batch", "", "token"});
  require_ints("key_segments", score.key_segments, {entries, 1, keys, 1}, {"batch", "", "token"});
}

}  // namespace

Coins coins_of(const Dropout& dropout) {
  constexpr double kCoins = 65536;
  if (!(dropout.probability >= 0 && dropout.probability < 1)) {
    reject("dropout_p", "is " + short_text(dropout.probability) + ", must be at least 0 and less than 1");
  }
  const double dropped = std::min(std::round(dropout.probability * kCoins), kCoins - 1);
  return {dropout.seed, static_cast<std::uint32_t>(dropped)};
}

Call resolve(const Problem& problem, Use use) {
  const bool with_value = use != Use::weights;
  require_known(problem, use);
  Call call{.query = problem.query,
            .key = problem.key,
            .value = with_value ? problem.value : Tensor{},
            .key_scale = problem.key_scale,
            .value_scale = with_value ? problem.value_scale : Tensor{},
            .score = problem.score};
  require_operands(call, problem, use);
  require_scalars(call);
  resolve_sequences(call, problem);
  require_mask_and_biases(call);
  require_head_parameters(call);
  require_relative_bias(call);
  call.dropout = coins_of(problem.dropout);
  call.precision = precision_of(call, problem.precision, use);
  require_segments(call, problem);
  resolve_tree(call);
  if (call.score.relative_bias.table.given()) call.distance_bias = lay_out(call);
  return call;
}

}  // namespace attncore
