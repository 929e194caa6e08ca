// NumPy arrays as Tensors, without a copy, and the errors that name an argument.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <atomic>
#include <attncore/attncore.hpp>
#include <bit>

namespace attncore::python {

namespace py = pybind11;

[[noreturn]] inline void reject_type(const char* argument, const std::string& what) {
  throw py::type_error(std::string(argument) + ": " + what);
}
[[noreturn]] inline void reject_value(const char* argument, const std::string& what) {
  throw py::value_error(std::string(argument) + ": " + what);
}
inline std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

/// A dtype of another package's: found by its name, then known by its number, if it has one (newer kinds have −1).
class UserDType {
 public:
  constexpr UserDType(const char* name, py::ssize_t itemsize) : name_(name), itemsize_(itemsize) {}

  [[nodiscard]] bool is(const py::dtype& dtype) {
    const int number = dtype.num();
    if (number >= 0 && number == number_.load(std::memory_order_relaxed)) return true;
    if (dtype.itemsize() != itemsize_ || py::str(dtype.attr("name")).cast<std::string>() != name_)
      return false;
    number_ = number;
    return true;
  }

 private:
  const char* name_;
  py::ssize_t itemsize_;
  std::atomic<int> number_{-1};
};

inline bool is_bfloat16(const py::dtype& dtype) {
  static UserDType bfloat16{"bfloat16", 2};  // of ml_dtypes
  return bfloat16.is(dtype);
}

inline std::string dtype_name(const py::array& array) {
  return py::str(py::handle(array.dtype())).cast<std::string>();
}

inline bool is_native(const py::dtype& dtype) {
  const char order = dtype.byteorder();
  return order == '=' || order == '|' || order == (std::endian::native == std::endian::little ? '<' : '>');
}

inline DType dtype_of(const char* argument, const py::array& array, const char* accepted) {
  const py::dtype dtype = array.dtype();
  const bool native = is_native(dtype);
  switch (native ? dtype.kind() : '?') {
    case 'f':
      if (dtype.itemsize() == 4) return DType::f32;
      if (dtype.itemsize() == 8) return DType::f64;
      if (dtype.itemsize() == 2) return DType::f16;
      break;
    case 'b':
      return DType::boolean;
    case 'i':
      if (dtype.itemsize() == 4) return DType::i32;
      if (dtype.itemsize() == 8) return DType::i64;
      break;
    default:
      if (native && is_bfloat16(dtype)) return DType::bf16;
  }
  reject_type(argument, "dtype is " + dtype_name(array) + ", accepted is " + accepted);
}

inline constexpr auto kFloats = "float32, float64, float16 or bfloat16 (in native byte order)";
inline constexpr auto kInts = "an integer dtype";

/// Axes of an array by where they stand in (batch, head, token, dim); −1: not there.
using Axes = std::array<int, 4>;

inline Tensor tensor_of(const py::array& array, DType dtype, const Axes& axes) {
  Tensor t{const_cast<void*>(array.data()), dtype, {1, 1, 1, 1}, {}};
  for (std::size_t axis = 0; axis < 4; ++axis) {
    if (axes[axis] < 0) continue;
    t.shape[axis] = array.shape(axes[axis]);
    t.stride[axis] = array.strides(axes[axis]);
  }
  return t;
}

inline Tensor tensor(const char* argument, const py::array& array, const Axes& axes, const char* accepted) {
  return tensor_of(array, dtype_of(argument, array, accepted), axes);
}

/// (batch, head, token, dim) and (batch, token, head, dim), with the axes that fewer dimensions leave.
inline Axes axes_of(bool bshd, py::ssize_t rank) {
  if (rank == 2) return {-1, -1, 0, 1};
  if (rank == 3) return bshd ? Axes{-1, 1, 0, 2} : Axes{-1, 0, 1, 2};
  return bshd ? Axes{0, 2, 1, 3} : Axes{0, 1, 2, 3};
}

/// The error of an operand's shape, by the axes of its array.
[[noreturn]] inline void reject_shape(const ShapeError& error, bool bshd, py::ssize_t rank) {
  const Axes axes = axes_of(bshd, rank);
  std::array<std::string, 4> is, must_be, names;
  for (std::size_t axis = 0; axis < 4; ++axis) {
    if (axes[axis] < 0) continue;
    const auto place = static_cast<std::size_t>(axes[axis]);
    is[place] = std::to_string(error.shape[axis]);
    must_be[place] = std::to_string(error.required[axis]);
    names[place] = std::array{"batch", "head", "token", "dim"}[axis];
  }
  const auto tuple = [rank](const std::array<std::string, 4>& items) {
    std::string text = "(" + items[0];
    for (std::size_t i = 1; i < static_cast<std::size_t>(rank); ++i) text += ", " + items[i];
    return text + ")";
  };
  reject_value(error.argument, "shape is " + tuple(is) + ", must be " + tuple(must_be) + " " + tuple(names));
}

/// An ndarray.  A masked array's mask would be ignored without a word: it is refused.
inline py::array require_array(const char* argument, py::handle object) {
  if (!py::isinstance<py::array>(object)) {
    reject_type(argument, "must be a NumPy array, is " + type_name(object));
  }
  const bool plain = Py_TYPE(object.ptr()) == py::detail::npy_api::get().PyArray_Type_;
  if (!plain && py::hasattr(object, "_sharedmask")) {
    reject_type(argument, "is a masked array, must be a plain one (options mask and key_lengths hide keys)");
  }
  return py::reinterpret_borrow<py::array>(object);
}

}  // namespace attncore::python
