// attention and its gradients on Python's arguments, whatever these describe.
#pragma once

#include "arguments.h"
#include "option_gradients.h"
#include "run.h"

namespace attncore::python {

/// out, or (out, lse), which `run` writes.
template <class Run>
py::object results(Arguments& arguments, const py::object& out_or_none, const py::object& return_lse,
                   Run run) {
  Problem& problem = arguments.problem;
  const bool with_lse = boolean("return_lse", return_lse);
  py::array out = out_or_none.is_none() ? arguments.allocate_out() : require_array("out", out_or_none);
  problem.out = arguments.out_tensor(out);
  if (!with_lse) {
    run_without_gil(arguments.options, run);
    return out;
  }
  py::array lse = arguments.allocate_rows(arguments.compute_dtype(), problem.query.shape[2], std::nullopt);
  problem.lse = arguments.rows_tensor("lse", lse, false);
  run_without_gil(arguments.options, run);
  return py::make_tuple(out, lse);
}

inline py::object call_forward(Arguments& arguments, const py::object& out_or_none,
                               const py::object& return_lse) {
  return results(arguments, out_or_none, return_lse, [&] { forward(arguments.problem, arguments.options); });
}

/// An array of query's rank and layout.
inline Tensor token_tensor(const Arguments& arguments, const char* argument, const py::object& object) {
  return arguments.operand_tensor(argument, require_array(argument, object));
}

/// An array over (batch, head, token) of query's rank.
inline Tensor row_tensor(const Arguments& arguments, const char* argument, const py::object& object) {
  const py::array array = require_array(argument, object);
  if (array.ndim() != arguments.rank() - 1) {
    reject_value(argument, "has " + std::to_string(array.ndim()) + " dimensions, must have " +
                               std::to_string(arguments.rank() - 1));
  }
  return arguments.rows_tensor(argument, array, false);
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
  run_without_gil(arguments.options, [&] { backward(problem, g, arguments.options); });
}

}  // namespace attncore::python
