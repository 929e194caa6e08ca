// attention_backward: gradients into arrays that Python's side has allocated.
#include "arguments.h"
#include "bind.h"
#include "option_gradients.h"
#include "run.h"

namespace attncore::python {
namespace {

/// An array of query's rank and layout.
Tensor token_tensor(const Arguments& arguments, const char* argument, const py::object& object) {
  return arguments.operand_tensor(argument, require_array(argument, object));
}

/// An array over (batch, head, token) of query's rank.
Tensor row_tensor(const Arguments& arguments, const char* argument, const py::object& object) {
  const py::array array = require_array(argument, object);
  if (array.ndim() != arguments.rank() - 1) {
    reject_value(argument, "has " + std::to_string(array.ndim()) + " dimensions, must have " +
                               std::to_string(arguments.rank() - 1));
  }
  return arguments.rows_tensor(argument, array, false);
}

/// `results`: (d_query, d_key, d_value, d_biases or None, d_alibi, d_sinks, d_relative_bias), each may be None.
void backward_call(py::handle query, py::handle key, py::handle value, const py::object& out,
                   const py::object& lse, const py::object& d_out, const py::object& d_lse,
                   const py::tuple& results, const py::args& options) {
  Arguments arguments(query, key, value, options);
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

/// keep: booleans (batch, heads, rows, keys), written.
void dropout_mask_call(const py::object& seed_object, double probability, const py::object& rows,
                       const py::array& keep) {
  const Dropout dropout{probability, seed(seed_object)};
  Tensor which;
  if (!rows.is_none()) which = tensor("rows", rows.cast<py::array>(), {-1, -1, 0, -1}, kInts);
  const Tensor booleans = tensor("keep", keep, {0, 1, 2, 3}, "bool");
  Options options;
  run_without_gil(options, [&] { dropout_mask(dropout, which, booleans, options); });
}

}  // namespace

void bind_backward(py::module_& m) {
  m.def("attention_backward", backward_call);
  m.def("dropout_mask", dropout_mask_call);
}

}  // namespace attncore::python
