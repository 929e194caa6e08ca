// The Python module attncore._core; arguments.h turns Python's arguments into a Problem.
#include <pybind11/stl.h>

#include "bind.h"
#include "call.h"

namespace attncore::python {
namespace {

py::object attention(py::handle query, py::handle key, py::handle value, const py::object& out_or_none,
                     const py::object& return_lse, const py::dict& options) {
  Arguments arguments("attention", query, key, value, options);
  return call_forward(arguments, out_or_none, return_lse);
}

/// rows: int64 indices in 0 … queries − 1, or None for all.
py::object weights(py::handle query, py::handle key, const py::object& rows, std::optional<Index> top_k,
                   const py::dict& options) {
  Arguments arguments("attention_weights", query, key, py::handle(), options);
  const Problem& p = arguments.problem;
  Weights w;
  Index count = p.query.shape[2];
  if (!rows.is_none()) {
    w.rows = tensor("rows", rows.cast<py::array>(), {-1, -1, 0, -1}, kInts);
    count = w.rows.shape[2];
  }
  if (top_k && (*top_k < 1 || *top_k > p.key.shape[2])) {
    reject_value("top_k", "is " + std::to_string(*top_k) + ", must be 1 … " + std::to_string(p.key.shape[2]) +
                              ", the number of keys");
  }
  const Index columns = top_k.value_or(p.key.shape[2]);
  const py::array probabilities = arguments.allocate_rows(arguments.compute_dtype(), count, columns);
  w.probabilities = arguments.rows_tensor("probabilities", probabilities, true);
  py::array indices;
  if (top_k) {
    indices = arguments.allocate_rows(py::dtype::of<std::int64_t>(), count, columns);
    w.indices = arguments.rows_tensor("indices", indices, true);
  }
  run_without_gil(arguments.options, [&] { attention_weights(p, w, arguments.options); });
  if (top_k) return py::make_tuple(indices, probabilities);
  return probabilities;
}

py::dict explain_call(py::handle query, py::handle key, py::handle value, const py::dict& options) {
  Arguments arguments("explain", query, key, value, options);
  const py::array out = arguments.allocate_out();
  arguments.problem.out = arguments.out_tensor(out);
  Explanation e;
  run_without_gil(arguments.options, [&] { e = explain(arguments.problem, arguments.options); });
  using py::operator""_a;
  return py::dict("text"_a = e.text, "isa"_a = e.isa, "kernel"_a = e.kernel, "threads"_a = e.threads,
                  "query_tile"_a = e.query_tile, "key_tile"_a = e.key_tile, "tasks"_a = e.tasks,
                  "key_splits"_a = e.key_splits, "workspace_bytes"_a = e.workspace_bytes, "flops"_a = e.flops,
                  "bytes"_a = e.bytes, "floor_seconds"_a = e.floor_seconds,
                  "estimated_seconds"_a = e.estimated_seconds);
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  m.doc() = "attncore's C++ core; the public functions are in attncore.";
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      std::rethrow_exception(error);
    } catch (const DTypeError& e) {
      PyErr_SetString(PyExc_TypeError, e.what());
    } catch (const NotImplemented& e) {
      PyErr_SetString(PyExc_NotImplementedError, e.what());
    }
  });
  m.def("attention", attention);
  m.def("attention_weights", weights);
  m.def("explain", explain_call);
  bind_backward(m);
  bind_cache(m);
  bind_layers(m);
  bind_multi_head_attention(m);
  bind_paged(m);
  bind_varlen(m);
  bind_state(m);
  m.def("version", version);
  m.def("isa", isa);
  m.def("available_isas", available_isas);
  m.def("use_isa", use_isa);
  m.def("get_num_threads", get_num_threads);
  m.def("set_num_threads", set_num_threads);
  m.def("config", config);
  m.def(
      "fma_peak", [](const std::string& name, int threads) { return fma_peak(name, DType::f32, threads); },
      py::call_guard<py::gil_scoped_release>());
  m.def("read_bandwidth", read_bandwidth, py::call_guard<py::gil_scoped_release>());
}

}  // namespace attncore::python
