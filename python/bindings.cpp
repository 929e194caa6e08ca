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

py::object weights(py::handle query, py::handle key, const py::object& rows, std::optional<Index> top_k,
                   const py::dict& options) {
  Arguments arguments("attention_weights", query, key, py::handle(), options);
  const Problem& p = arguments.problem;
  return call_weights(arguments, {p.query.shape[0], p.query.shape[2], p.key.shape[2]}, arguments.rank(), rows,
                      top_k);
}

py::dict explain_attention(py::handle query, py::handle key, py::handle value, const py::dict& options) {
  Arguments arguments("explain", query, key, value, options);
  return call_explain(arguments);
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
  m.def("explain", explain_attention);
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
  m.def("set_num_threads", [](const py::object& threads) { set_num_threads(thread_count(threads)); });
  m.def("config", config);
  m.def(
      "fma_peak",
      [](const std::string& name, int threads, bool bfloat16) {
        return fma_peak(name, bfloat16 ? DType::bf16 : DType::f32, threads);
      },
      py::arg(), py::arg(), py::arg() = false, py::call_guard<WithoutGil>());
  m.def("read_bandwidth", read_bandwidth, py::call_guard<WithoutGil>());
}

}  // namespace attncore::python
