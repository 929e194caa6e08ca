// attention_backward: gradients into arrays that Python's side has allocated.
#include "bind.h"
#include "call.h"

namespace attncore::python {
namespace {

void backward_call(py::handle query, py::handle key, py::handle value, const py::object& out,
                   const py::object& lse, const py::object& d_out, const py::object& d_lse,
                   const py::tuple& results, const py::dict& options) {
  Arguments arguments("attention_backward", query, key, value, options);
  call_backward(arguments, out, lse, d_out, d_lse, results);
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
