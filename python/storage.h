// Arrays of keys and values as they may be stored: floats, or small numbers that float32 factors multiply.
#pragma once

#include "convert.h"

namespace attncore::python {

inline constexpr auto kStored =
    "float32, float64, float16, bfloat16, int8, float8_e4m3fn, or uint8 for int4, two in a byte";

inline bool is_float8(const py::dtype& dtype) {
  static UserDType float8{"float8_e4m3fn", 1};  // of ml_dtypes
  return float8.is(dtype);
}

/// A uint8's bytes are int4: the first number is in the low half.
inline DType storage_dtype_of(const char* argument, const py::array& array) {
  const py::dtype dtype = array.dtype();
  if (dtype.itemsize() == 1) {
    if (dtype.kind() == 'i') return DType::i8;
    if (dtype.kind() == 'u') return DType::i4;
    if (is_float8(dtype)) return DType::f8;
  } else if (dtype.kind() == 'f' || (is_native(dtype) && is_bfloat16(dtype))) {
    return dtype_of(argument, array, kStored);
  }
  reject_type(argument, "dtype is " + dtype_name(array) + ", accepted is " + kStored);
}

/// A tensor of stored numbers.
inline Tensor stored(const char* argument, const py::array& array, const Axes& axes) {
  Tensor t = tensor_of(array, storage_dtype_of(argument, array), axes);
  if (t.dtype == DType::i4) t.shape[3] = 2 * std::min(t.shape[3], kUnbounded / 2);
  return t;
}

}  // namespace attncore::python
