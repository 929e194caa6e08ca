// The checks that validate.cpp is made of: each says what is wrong with one argument.
#pragma once

#include <array>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>

#include "tensor.h"

namespace attncore {

struct Rope;

inline constexpr Index kMostDims = Index{1} << 24;  // and heads

/// Throws std::invalid_argument, "argument: what".
[[noreturn]] void reject(const std::string& argument, const std::string& what);

/// Throws DTypeError, naming what is accepted.
void require_dtype(const char* argument, const Tensor& t, std::initializer_list<DType> accepted);

/// Of a float dtype.
void require_float(const char* argument, const Tensor& t);

/// Of a dtype in which keys and values are stored.
void require_stored(const char* argument, const Tensor& t);

/// Of `other`'s dtype.
void require_like(const char* argument, const Tensor& t, const char* other, const Tensor& like);

/// 1 … most.
void require_range(const char* argument, Index value, Index most);

/// What the axes of an argument are called; those that are no axes of it have no name and one item.
using AxisNames = std::array<std::string_view, 4>;

inline constexpr AxisNames kTokenAxes{"batch", "head", "token", "dim"};
inline constexpr AxisNames kPageAxes{"page", "head", "slot", "dim"};

void require_shape(const char* argument, const Tensor& t, const Shape& shape, const AxisNames& axes);

/// i32 or i64, of a shape.
void require_ints(const char* argument, const Tensor& t, const Shape& shape, const AxisNames& axes);

/// Memory, unless the tensor is empty; extents in range.
void require_data(const char* argument, const Tensor& t);

/// The same of a tensor that must not be left out.
void require_given(const char* argument, const Tensor& t);

/// The same, and of a dtype and a shape.
void require_tensor(const char* argument, const Tensor& t, DType dtype, const Shape& shape,
                    const AxisNames& axes);

/// Whether an optional tensor is given; one that has a shape but no memory was not left out, and is an error.
inline bool is_given(const char* argument, const Tensor& t) {
  if (!t.given() && t.shape[0] != 0) [[unlikely]]
    require_data(argument, t);  // an empty one may lack memory
  return t.given();
}

/// What a call reads or writes, by its name in messages.
struct Named {
  const char* name;
  const Tensor* tensor;
};

/// Memory that is written: its items are apart from each other, and from all others that are given.
void require_apart(const char* argument, const Tensor& written, std::span<const Named> others);
inline void require_apart(const char* argument, const Tensor& written,
                          std::initializer_list<Named> others = {}) {
  require_apart(argument, written, std::span(others.begin(), others.size()));
}

/// How many dims of a head are rotated.  The positions are left to the caller.
Index require_rope(const Rope& rope, Index dim);

/// Repeats axes of extent 1 by a stride of 0; rejects what does not broadcast.
void broadcast_to(const char* argument, Tensor& t, const Shape& shape, const AxisNames& axes);

}  // namespace attncore
