// attention_varlen and its gradients: sequences packed one after another.
#include <pybind11/stl.h>

#include "bind.h"
#include "call.h"

namespace attncore::python {
namespace {

void require_packed(const char* argument, py::handle object) {
  const py::array array = require_array(argument, object);
  if (array.ndim() == 3) return;
  reject_value(argument,
               "has " + std::to_string(array.ndim()) + " dimensions, must have 3: (token, head, dim)");
}

Tensor cumulative(Arguments& arguments, const char* argument, const py::object& object) {
  if (object.is_none()) reject_type(argument, "must be an array of ints, is NoneType");
  const Tensor lengths = arguments.ints(argument, object, 1);
  if (any_array(argument, object).ndim() == 0) reject_value(argument, "is a scalar, must be (batch + 1,)");
  return lengths;
}

/// Their layout is "bshd": with three axes (token, head, dim).  Without a value (nullptr) for the probabilities.
Arguments packed(const char* function, py::handle query, py::handle key, py::handle value,
                 const py::object& query_tokens, const py::object& key_tokens, const py::dict& options) {
  require_packed("query", query);
  require_packed("key", key);
  if (value.ptr() != nullptr) require_packed("value", value);
  Arguments arguments(function, query, key, value, options);
  arguments.problem.packing = {cumulative(arguments, "cu_query_lengths", query_tokens),
                               cumulative(arguments, "cu_key_lengths", key_tokens)};
  return arguments;
}

py::object attention(py::handle query, py::handle key, py::handle value, const py::object& query_tokens,
                     const py::object& key_tokens, const py::object& out_or_none,
                     const py::object& return_lse, const py::dict& options) {
  Arguments arguments = packed("attention_varlen", query, key, value, query_tokens, key_tokens, options);
  return call_forward(arguments, out_or_none, return_lse);
}

py::dict explain_packed(py::handle query, py::handle key, py::handle value, const py::object& query_tokens,
                        const py::object& key_tokens, const py::dict& options) {
  Arguments arguments = packed("explain_varlen", query, key, value, query_tokens, key_tokens, options);
  return call_explain(arguments);
}

/// `longest`: the queries and keys of the longest sequences.
py::object weights(py::handle query, py::handle key, const py::object& query_tokens,
                   const py::object& key_tokens, const std::array<Index, 2>& longest, const py::object& rows,
                   std::optional<Index> top_k, const py::dict& options) {
  Arguments arguments =
      packed("attention_weights_varlen", query, key, py::handle(), query_tokens, key_tokens, options);
  const Index batch = std::max<Index>(arguments.problem.packing.query_tokens.shape[0] - 1, 0);
  return call_weights(arguments, {batch, longest[0], longest[1]}, 4, rows, top_k);
}

void backward(py::handle query, py::handle key, py::handle value, const py::object& query_tokens,
              const py::object& key_tokens, const py::object& out, const py::object& lse,
              const py::object& d_out, const py::object& d_lse, const py::tuple& results,
              const py::dict& options) {
  Arguments arguments =
      packed("attention_varlen_backward", query, key, value, query_tokens, key_tokens, options);
  call_backward(arguments, out, lse, d_out, d_lse, results);
}

}  // namespace

void bind_varlen(py::module_& m) {
  m.def("attention_varlen", attention);
  m.def("attention_varlen_backward", backward);
  m.def("attention_weights_varlen", weights);
  m.def("explain_varlen", explain_packed);
}

}  // namespace attncore::python
