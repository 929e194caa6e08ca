// attention and its gradients on Python's arguments, whatever these describe.
#pragma once

#include "arguments.h"
#include "option_gradients.h"
#include "run.h"

namespace attncore::python {

/// A call of the library on the arguments.
template <class Run>
void run_call(Arguments& arguments, Run run) {
  run_without_gil(arguments.options, arguments.bshd(), arguments.rank(), run);
}

/// out, or (out, lse), which `run` writes.
template <class Run>
py::object results(Arguments& arguments, const py::object& out_or_none, const py::object& return_lse,
                   Run run) {
  Problem& problem = arguments.problem;
  const bool with_lse = boolean("return_lse", return_lse);
  py::array out = out_or_none.is_none() ? arguments.allocate_out() : require_array("out", out_or_none);
  problem.out = arguments.out_tensor(out);
  if (!with_lse) {
    run_call(arguments, run);
    return out;
  }
  py::array lse = arguments.allocate_rows();
  problem.lse = arguments.rows_tensor("lse", lse);
  run_call(arguments, run);
  return py::make_tuple(out, lse);
}

inline py::object call_forward(Arguments& arguments, const py::object& out_or_none,
                               const py::object& return_lse) {
  return results(arguments, out_or_none, return_lse, [&] { forward(arguments.problem, arguments.options); });
}

/// The probabilities of a batch (batch, queries, keys), in arrays of `rank` axes.  `rows`: int64 indices in 0 … queries − 1,
/// (rows) or (batch, rows), or None for all.
inline py::object call_weights(Arguments& arguments, const std::array<Index, 3>& extents, py::ssize_t rank,
                               const py::object& rows, std::optional<Index> top_k) {
  const auto [batch, queries, keys] = extents;
  Weights w;
  Index count = queries;
  if (!rows.is_none()) {
    const auto array = rows.cast<py::array>();
    const int axes = static_cast<int>(array.ndim());
    w.rows = tensor("rows", array, {axes - 2, -1, axes - 1, -1}, kInts);
    count = w.rows.shape[2];
  }
  if (top_k && (*top_k < 1 || *top_k > keys)) {
    reject_value("top_k", "is " + std::to_string(*top_k) + ", must be 1 … " + std::to_string(keys) +
                              ", the number of keys");
  }
  std::vector<py::ssize_t> shape{batch, arguments.problem.query.shape[1], count, top_k.value_or(keys)};
  shape.erase(shape.begin(), shape.begin() + (4 - rank));
  const int lacking = static_cast<int>(4 - rank);
  const Axes axes{0 - lacking, 1 - lacking, 2 - lacking, 3 - lacking};
  const py::array probabilities(arguments.compute_dtype(), shape);
  w.probabilities = tensor("probabilities", probabilities, axes, kFloats);
  py::array indices;
  if (top_k) {
    indices = py::array(py::dtype::of<std::int64_t>(), shape);
    w.indices = tensor("indices", indices, axes, kInts);
  }
  run_call(arguments, [&] { attention_weights(arguments.problem, w, arguments.options); });
  if (top_k) return py::make_tuple(indices, probabilities);
  return probabilities;
}

/// How that call would run: the fields of Python's Plan.
inline py::dict call_explain(Arguments& arguments) {
  const py::array out = arguments.allocate_out();
  arguments.problem.out = arguments.out_tensor(out);
  Explanation e;
  run_call(arguments, [&] { e = explain(arguments.problem, arguments.options); });
  using py::operator""_a;
  return py::dict("text"_a = e.text, "isa"_a = e.isa, "kernel"_a = e.kernel, "threads"_a = e.threads,
                  "query_tile"_a = e.query_tile, "key_tile"_a = e.key_tile, "tasks"_a = e.tasks,
                  "key_splits"_a = e.key_splits, "workspace_bytes"_a = e.workspace_bytes, "flops"_a = e.flops,
                  "bytes"_a = e.bytes, "floor_seconds"_a = e.floor_seconds,
                  "estimated_seconds"_a = e.estimated_seconds);
}

/// An array of query's rank and layout.
inline Tensor token_tensor(const Arguments& arguments, const char* argument, const py::object& object) {
  return arguments.operand_tensor(argument, require_array(argument, object));
}

/// An array (batch, head, token), with query's axes but dim.
inline Tensor row_tensor(const Arguments& arguments, const char* argument, const py::object& object) {
  const py::array array = require_array(argument, object);
  if (array.ndim() != arguments.rank() - 1) {
    reject_value(argument, "has " + std::to_string(array.ndim()) + " dimensions, must have " +
                               std::to_string(arguments.rank() - 1));
  }
  return arguments.rows_tensor(argument, array);
}

/// Gradients into arrays that Python's side has allocated: `results` are (d_query, d_key, d_value, d_biases or None,
/// d_alibi, d_sinks, d_relative_bias), each may be None.
inline void call_backward(Arguments& arguments, const py::object& out, const py::object& lse,
                          const py::object& d_out, const py::object& d_lse, const py::tuple& results) {
  Problem& problem = arguments.problem;
  problem.out = token_tensor(arguments, "out", out);
  problem.lse = row_tensor(arguments, "lse", lse);
  Gradients g;
  g.d_out = token_tensor(arguments, "d_out", d_out);
  if (!d_lse.is_none()) g.d_lse = row_tensor(arguments, "d_lse", d_lse);
  const auto tokens = [&](const char* argument, std::size_t i, Tensor& t) {
    if (!results[i].is_none()) t = token_tensor(arguments, argument, writable(argument, results[i]));
  };
  tokens("d_query", 0, g.d_query);
  tokens("d_key", 1, g.d_key);
  tokens("d_value", 2, g.d_value);
  read_option_gradients(g, results[3], results[4], results[5], results[6]);
  run_call(arguments, [&] { backward(problem, g, arguments.options); });
}

}  // namespace attncore::python
