// attention_varlen and its gradients: sequences packed one after another.
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

/// Their layout is "bshd": with three axes (token, head, dim).
Arguments packed(const char* function, py::handle query, py::handle key, py::handle value,
                 const py::object& query_tokens, const py::object& key_tokens, const py::dict& options) {
  require_packed("query", query);
  require_packed("key", key);
  require_packed("value", value);
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
}

}  // namespace attncore::python
