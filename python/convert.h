// Python's objects as numbers, names and arrays, and what is said when they are something else.
#pragma once

#include <algorithm>
#include <attncore/layers.hpp>
#include <cstring>

#include "arrays.h"

namespace attncore::python {

inline bool is_boolean(const py::object& object) {
  return PyBool_Check(object.ptr()) || type_name(object) == "numpy.bool" ||
         type_name(object) == "numpy.bool_";
}

inline bool boolean(const char* argument, const py::object& object) {
  if (object.ptr() == Py_True || object.ptr() == Py_False) return object.ptr() == Py_True;
  if (!is_boolean(object)) {
    reject_type(argument, "must be a bool, is " + type_name(object));
  }
  return object.cast<bool>();
}

inline bool is_bshd(const py::object& layout, const char* argument = "layout") {
  if (!py::isinstance<py::str>(layout))
    reject_type(argument, "must be 'bhsd' or 'bshd', is " + type_name(layout));
  const auto name = layout.cast<std::string>();
  if (name != "bhsd" && name != "bshd") reject_value(argument, "is '" + name + "', must be 'bhsd' or 'bshd'");
  return name == "bshd";
}

/// Clears the current error if it is of a kind.
inline bool clear(PyObject* kind) {
  if (PyErr_ExceptionMatches(kind) == 0) return false;
  PyErr_Clear();
  return true;
}

/// None is nothing.  What NumPy would make a float of without being asked (bools, text, complex numbers) is refused.
inline std::optional<double> number(const char* argument, const py::object& object) {
  if (object.is_none()) return std::nullopt;
  if (PyFloat_CheckExact(object.ptr())) return PyFloat_AS_DOUBLE(object.ptr());
  const bool array = py::isinstance<py::array>(object);
  const bool real = !array || std::strchr("fiuV", py::reinterpret_borrow<py::array>(object).dtype().kind());
  if (is_boolean(object) || PyComplex_Check(object.ptr()) || !real)
    reject_type(argument, "must be a number or None, is " + type_name(object));
  const double value = PyFloat_AsDouble(object.ptr());
  if (value == -1 && PyErr_Occurred() != nullptr) {
    if (clear(PyExc_OverflowError)) reject_value(argument, "is beyond a float's range");
    if (clear(PyExc_TypeError)) reject_type(argument, "must be a number or None, is " + type_name(object));
    throw py::error_already_set();
  }
  return value;
}

inline Index integer(const char* argument, const py::object& object) {
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(object.ptr()));
  if (!index && !PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
  if (!index || PyBool_Check(object.ptr())) {
    PyErr_Clear();
    reject_type(argument, "must be an int, is " + type_name(object));
  }
  const Index value = PyLong_AsLongLong(index.ptr());
  if (value == -1 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    reject_value(argument, "is " + py::str(index).cast<std::string>() + ", which is out of range");
  }
  return value;
}

/// Anything that NumPy makes an array of; Python floats become float32.
inline py::array any_array(const char* argument, const py::object& object) {
  if (py::isinstance<py::array>(object)) {
    return require_array(argument, object);
  }
  auto array = py::reinterpret_steal<py::array>(
      py::detail::npy_api::get().PyArray_FromAny_(object.ptr(), nullptr, 0, 0, 0, nullptr));
  if (!array) {
    if (clear(PyExc_TypeError) || clear(PyExc_ValueError)) {
      reject_type(argument, "must be an array, is " + type_name(object));
    }
    throw py::error_already_set();
  }
  if (array.dtype().kind() == 'f') array = array.attr("astype")(py::dtype::of<float>());
  return array;
}

/// Floats; Python's numbers become float32.
inline py::array float_array(const char* argument, const py::object& object) {
  py::array array = any_array(argument, object);
  if (!py::isinstance<py::array>(object) && std::strchr("iu", array.dtype().kind()) != nullptr)
    array = array.attr("astype")(py::dtype::of<float>());
  return array;
}

/// Whether these are Python's ints, some of which no integer dtype has.
inline bool has_long_ints(const py::array& array) {
  if (array.dtype().kind() != 'O') return false;
  for (const py::handle item : array.attr("ravel")().attr("tolist")()) {
    if (!PyLong_Check(item.ptr())) return false;
  }
  return true;
}

/// Integers, of a dtype that tensors have.  `wraps`: those beyond 2⁶³ become negative; else they are refused, read or not.
inline py::array int_array(const char* argument, const py::object& object, bool wraps = false) {
  py::array array = any_array(argument, object);
  const char kind = array.size() == 0 ? 'i' : array.dtype().kind();
  if (has_long_ints(array)) reject_value(argument, "has an int that is out of range");
  if (kind != 'i' && kind != 'u') {
    reject_type(argument, "dtype is " + dtype_name(array) + ", accepted is " + kInts);
  }
  if (!wraps && kind == 'u' && array.itemsize() == 8 &&
      array.attr("max")().cast<std::uint64_t>() >> 63U != 0) {
    reject_value(argument,
                 "has " + py::str(array.attr("max")()).cast<std::string>() + ", which is out of range");
  }
  if (array.size() == 0 || kind == 'u' || array.itemsize() < 4 || !is_native(array.dtype())) {
    array = py::array(array.attr("astype")(py::dtype::of<std::int64_t>()));
  }
  return array;
}

/// Ints of a call as (n, 1, 1, 1), or (n, 1, token, 1) if they may have two axes; the array lives as long as this.
struct IntArgument {
  py::array array = py::reinterpret_steal<py::array>(py::handle());
  Tensor tensor;

  IntArgument(const char* argument, const py::object& object, py::ssize_t most, bool wraps = false) {
    if (object.is_none()) return;
    array = int_array(argument, object, wraps);
    const int rank = static_cast<int>(array.ndim());
    if (rank > most) {
      reject_value(argument,
                   "has " + std::to_string(rank) + " dimensions, must have at most " + std::to_string(most));
    }
    if (most > 1 && rank == 0) reject_value(argument, "is a scalar, must have 1 or 2 dimensions");
    const Axes axes = most == 1 ? Axes{rank - 1, -1, -1, -1} : Axes{rank - 2, -1, rank - 1, -1};
    tensor = python::tensor(argument, array, axes, kInts);
  }
};

/// Tokens of several sequences, or of one.
inline Tensor token_operand(const char* argument, const py::object& object, bool bshd) {
  const py::array array = require_array(argument, object);
  if (array.ndim() < 3 || array.ndim() > 4) {
    reject_value(argument, "has " + std::to_string(array.ndim()) + " dimensions, must have 3 or 4");
  }
  return tensor(argument, array, axes_of(bshd, array.ndim()), kFloats);
}

/// By torch's names.
inline Precision precision(const py::object& object) {
  constexpr auto kNames = "'highest', 'high' or 'medium'";
  if (!py::isinstance<py::str>(object))
    reject_type("precision", std::string("must be ") + kNames + ", is " + type_name(object));
  const auto name = object.cast<std::string>();
  if (name == "highest") return Precision::highest;
  if (name == "high") return Precision::high;
  if (name == "medium") return Precision::medium;
  reject_value("precision", "is '" + name + "', must be " + kNames);
}

/// Of a call: 0 is the default.
inline int thread_count(const py::object& threads) {
  if (threads.is_none()) return 0;
  const Index count = integer("num_threads", threads);
  if (count < 1) reject_value("num_threads", "is " + std::to_string(count) + ", must be at least 1");
  return static_cast<int>(std::min<Index>(count, 1 << 16));
}

/// 0 … 2**64 − 1
inline std::uint64_t seed(const py::object& object) {
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(object.ptr()));
  if (!index || PyBool_Check(object.ptr())) {
    if (!index && !clear(PyExc_TypeError)) throw py::error_already_set();
    reject_type("seed", "must be an int, is " + type_name(object));
  }
  const std::uint64_t value = PyLong_AsUnsignedLongLong(index.ptr());
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    reject_value("seed", "is " + py::str(index).cast<std::string>() + ", must be 0 … 2**64 - 1");
  }
  return value;
}

/// Of (base, dims or None, interleaved, frequencies or None, factor): a Rotary's fields.
inline Rope rope_of(const py::tuple& fields) {
  const auto required = [&](const char* field, std::size_t i) {
    const std::optional<double> given = number(field, fields[i]);
    if (!given) reject_type(field, "must be a number, is None");
    return *given;
  };
  Rope rope{.base = required("base", 0), .interleaved = boolean("interleaved", fields[2])};
  if (!fields[1].is_none()) {
    rope.dims = integer("dims", fields[1]);
    if (rope.dims == 0) reject_value("dims", "is 0, must be even and at least 2, or None for all");
  }
  for (const py::handle frequency : fields[3].is_none() ? py::tuple() : py::tuple(fields[3]))
    rope.frequencies.push_back(frequency.cast<double>());
  rope.factor = required("factor", 4);
  return rope;
}

}  // namespace attncore::python
