// Where the gradients of attention's options go: arrays that Python's side has allocated.
#pragma once

#include "arguments.h"

namespace attncore::python {

inline py::array writable(const char* argument, const py::object& object) {
  const py::array array = require_array(argument, object);
  if (!array.writeable()) reject_value(argument, "is read-only");
  return array;
}

/// Right-aligned axes, as masks and biases have them.
inline Tensor score_tensor(const char* argument, const py::array& array) {
  const int lacking = static_cast<int>(4 - array.ndim());
  if (lacking < 0)
    reject_value(argument, "has " + std::to_string(array.ndim()) + " dimensions, must have at most 4");
  return tensor(argument, array, {0 - lacking, 1 - lacking, 2 - lacking, 3 - lacking}, kFloats);
}

/// Sets d_biases, d_alibi, d_sinks and d_relative_bias of what has them; `biases` is a tuple; each may be None.
template <class Results>
void read_option_gradients(Results& gradients, const py::object& biases, const py::object& alibi,
                           const py::object& sinks, const py::object& relative_bias) {
  const auto parameter = [](const char* argument, const py::object& object, Tensor& t, auto axes_of_rank) {
    if (object.is_none()) return;
    const py::array array = writable(argument, object);
    t = tensor(argument, array, axes_of_rank(array.ndim()), kFloats);
  };
  const auto by_head = [](py::ssize_t rank) { return rank == 2 ? Axes{0, 1, -1, -1} : Axes{-1, 0, -1, -1}; };
  parameter("d_alibi", alibi, gradients.d_alibi, by_head);
  parameter("d_sinks", sinks, gradients.d_sinks, by_head);
  parameter("d_relative_bias", relative_bias, gradients.d_relative_bias,
            [](py::ssize_t) { return Arguments::kTableAxes; });
  if (biases.is_none()) return;
  for (const py::handle item : biases.cast<py::tuple>()) {
    Tensor d_bias;
    if (!item.is_none())
      d_bias = score_tensor("d_bias", writable("d_bias", py::reinterpret_borrow<py::object>(item)));
    gradients.d_biases.push_back(d_bias);
  }
}

}  // namespace attncore::python
