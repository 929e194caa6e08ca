// Every precondition, before any work.  Messages name the argument, what came and what is accepted.
#include "require.h"
#include "resolve.h"
#include "segment_ranges.h"

namespace attncore {
namespace {

using std::to_string;

constexpr AxisNames kRowAxes{"batch", "head", "token"};

using Inputs = BoundedArray<Named, 32 + 2 * kMaxBiases>;  // backward's results too, as they are added

std::span<const Named> all(const Inputs& inputs) noexcept { return {inputs.items, inputs.size}; }

/// What a call reads; backward reads out and lse too, and more.
Inputs inputs_of(const Call& call, const Problem& problem) {
  const Score& score = call.score;
  const bool paged = call.pages.given();
  Inputs inputs{{"query", &call.query},
                {paged ? "key_pages" : "key", &call.key},
                {paged ? "value_pages" : "value", &call.value},
                {"mask", &score.mask},
                {"alibi", &score.alibi},
                {"relative_bias", &score.relative_bias.table},
                {"sinks", &score.sinks},
                {"query_segments", &score.query_segments},
                {"key_segments", &score.key_segments},
                {"query_offset", &score.query_offset},
                {"query_lengths", &score.query_lengths},
                {"key_lengths", &score.key_lengths},
                {"tree_parents", &score.tree_parents},
                {"key_scale", &call.key_scale},
                {"value_scale", &call.value_scale},
                {"cu_query_lengths", &problem.packing.query_tokens},
                {"cu_key_lengths", &problem.packing.key_tokens},
                {"block_table", &problem.paging.block_table}};
  for (std::size_t i = 0; i < score.biases.size; ++i) inputs.push_back({"bias", &score.biases.items[i]});
  return inputs;
}

/// An output: memory of its own, apart from every input.
void require_output(const char* argument, const Tensor& out, const Inputs& inputs) {
  require_apart(argument, out, all(inputs));
}

void require_out(const char* argument, const Tensor& out, const Call& call) {
  require_given(argument, out);
  require_like(argument, out, "query", call.query);
  require_shape(argument, out, {call.query.shape[0], call.heads, call.query.shape[2], call.value_dim},
                kTokenAxes);
}

void require_lse(const char* argument, const Tensor& lse, const Call& call) {
  require_tensor(argument, lse, call.compute(), {call.query.shape[0], call.heads, call.query.shape[2], 1},
                 kRowAxes);
}

/// Backward's results: each like what it is the gradient of, and apart from all else.
class Results {
 public:
  explicit Results(const Inputs& inputs) : apart_from_(inputs) {}

  /// `t` if it is wanted; `of`: what it is the gradient of.
  void add(const char* argument, const Tensor& t, const char* name_of, const Tensor& of) {
    if (!t.given()) return;
    if (!of.given()) reject(argument, std::string("is asked for, but ") + name_of + " is not given");
    require_like(argument, t, name_of, of);
    if (t.shape != of.shape) {
      reject(argument,
             "shape is " + shape_text(t.shape) + ", must be " + name_of + "'s, " + shape_text(of.shape));
    }
    require_output(argument, t, apart_from_);
    apart_from_.push_back({argument, &t});
  }

 private:
  Inputs apart_from_;
};

void require_results(const Call& call, const Problem& problem, const Gradients& g) {
  Inputs inputs = inputs_of(call, problem);
  for (const auto& read : {Named{"out", &call.out}, Named{"lse", &call.lse}, Named{"d_out", &g.d_out},
                           Named{"d_lse", &g.d_lse}}) {
    inputs.push_back(read);
  }
  const std::size_t biases = problem.score.biases.size;
  if (g.d_biases.size != 0 && g.d_biases.size != biases) {
    reject("d_bias", "has " + to_string(g.d_biases.size) + " arrays, bias has " + to_string(biases));
  }
  Results results(inputs);
  results.add("d_query", g.d_query, "query", problem.query);
  results.add("d_key", g.d_key, "key", problem.key);
  results.add("d_value", g.d_value, "value", problem.value);
  for (std::size_t i = 0; i < g.d_biases.size; ++i) {
    results.add("d_bias", g.d_biases.items[i], "bias", problem.score.biases.items[i]);
  }
  results.add("d_alibi", g.d_alibi, "alibi", problem.score.alibi);
  results.add("d_relative_bias", g.d_relative_bias, "relative_bias", problem.score.relative_bias.table);
  results.add("d_sinks", g.d_sinks, "sinks", problem.score.sinks);
}

}  // namespace

Call validate(const Problem& problem) {
  Call call = resolve(problem, Use::forward);
  call.out = problem.out;
  call.lse = problem.lse;
  const Inputs inputs = inputs_of(call, problem);
  require_out("out", call.out, call);
  require_output("out", call.out, inputs);
  if (is_given("lse", call.lse)) {
    require_lse("lse", call.lse, call);
    require_output("lse", call.lse, inputs);
    if (may_overlap(call.lse, call.out)) reject("lse", "overlaps out");
  }
  resolve_segments(call);
  return call;
}

BackwardCall validate(const Problem& problem, const Gradients& gradients) {
  BackwardCall backward{resolve(problem, Use::backward), gradients};
  Call& call = backward.call;
  call.out = problem.out;
  call.lse = problem.lse;
  require_out("out", call.out, call);
  require_out("d_out", gradients.d_out, call);
  require_lse("lse", call.lse, call);
  if (is_given("d_lse", gradients.d_lse)) require_lse("d_lse", gradients.d_lse, call);
  require_results(call, problem, gradients);
  Gradients& g = backward.gradients;
  const Shape scores{call.batch, call.heads, call.queries, call.keys};
  for (std::size_t i = 0; i < g.d_biases.size; ++i) {
    if (g.d_biases.items[i].given())
      broadcast_to("d_bias", g.d_biases.items[i], scores, {"batch", "head", "query", "key"});
  }
  if (g.d_alibi.given())
    broadcast_to("d_alibi", g.d_alibi, {call.batch, call.heads, 1, 1}, {"batch", "head"});
  if (Tensor& d_table = g.d_relative_bias; d_table.given()) {
    broadcast_to("d_relative_bias", d_table, {call.batch, call.heads, 1, d_table.shape[3]},
                 {"", "head", "", "bucket"});
  }
  resolve_segments(call);
  return backward;
}

WeightsCall validate(const Problem& problem, const Weights& weights) {
  WeightsCall checked{resolve(problem, Use::weights), weights, {}};
  Call& call = checked.call;
  Index rows = call.queries;
  if (is_given("rows", weights.rows)) {
    rows = weights.rows.shape[2];
    const Index entries = weights.rows.shape[0] == 1 ? 1 : call.batch;
    require_ints("rows", weights.rows, {entries, 1, rows, 1}, {"1 or batch", "", "rows"});
    checked.rows.resize(static_cast<std::size_t>(entries * rows));
    for (Index i = 0; i < entries * rows; ++i) {
      const Index row = read_int(at(weights.rows, i / rows, 0, i % rows), weights.rows.dtype);
      checked.rows[static_cast<std::size_t>(i)] = row;
      if (row < 0 || row >= call.queries) {
        reject("rows",
               "has the index " + to_string(row) + ", query has " + to_string(call.queries) + " rows");
      }
    }
  }
  const Index columns = is_given("indices", weights.indices) ? weights.probabilities.shape[3] : call.keys;
  if (columns > call.keys || (weights.indices.given() && columns < 1)) {
    reject("top_k",
           "is " + to_string(columns) + ", must be 1 … " + to_string(call.keys) + ", the number of keys");
  }
  static constexpr AxisNames kAxes{"batch", "head", "row", "key"};
  require_tensor("probabilities", weights.probabilities, call.compute(),
                 {call.batch, call.heads, rows, columns}, kAxes);
  Inputs inputs = inputs_of(call, problem);
  inputs.push_back({"rows", &weights.rows});
  require_output("probabilities", weights.probabilities, inputs);
  if (weights.indices.given()) {
    require_dtype("indices", weights.indices, {DType::i64});
    require_shape("indices", weights.indices, weights.probabilities.shape, kAxes);
    inputs.push_back({"probabilities", &weights.probabilities});
    require_output("indices", weights.indices, inputs);
  }
  resolve_segments(call);
  return checked;
}

}  // namespace attncore
