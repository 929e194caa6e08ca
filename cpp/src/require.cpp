#include "require.h"

#include <vector>

#include "text.h"

namespace attncore {

void reject(const std::string& argument, const std::string& what) {
  throw std::invalid_argument(argument + ": " + what);
}

void require_dtype(const char* argument, const Tensor& t, std::initializer_list<DType> accepted) {
  std::vector<std::string> names;
  for (const DType dtype : accepted) {
    if (t.dtype == dtype) return;
    names.emplace_back(name(dtype));
  }
  throw DTypeError(std::string(argument) + ": dtype is " + name(t.dtype) + ", accepted is " +
                   joined(names, " or "));
}

void require_float(const char* argument, const Tensor& t) {
  require_dtype(argument, t, {DType::f32, DType::f64, DType::f16, DType::bf16});
}

void require_stored(const char* argument, const Tensor& t) {
  require_dtype(argument, t,
                {DType::f32, DType::f64, DType::f16, DType::bf16, DType::i8, DType::i4, DType::f8});
}

void require_like(const char* argument, const Tensor& t, const char* other, const Tensor& like) {
  if (t.dtype == like.dtype) return;
  throw DTypeError(std::string(argument) + ": dtype is " + name(t.dtype) + ", accepted is " +
                   name(like.dtype) + ", as " + other + "'s");
}

void require_range(const char* argument, Index value, Index most) {
  if (value >= 1 && value <= most) return;
  reject(argument, "is " + std::to_string(value) + ", must be 1 … " + std::to_string(most));
}

namespace {

/// "mask: shape is (1, 3, 5, 5), must broadcast to (2, 4, 5, 5) (batch, head, query, key)", without the axes that
/// are none of the argument's: "key_lengths: shape is (1,), must be (2,) (batch)".
[[noreturn]] void reject_shape(const char* argument, const Shape& is, const char* must, const Shape& shape,
                               const AxisNames& axes) {
  std::vector<std::string> extents, wanted, names;
  for (std::size_t axis = 0; axis < 4; ++axis) {
    if (axes[axis].empty() && is[axis] == 1 && shape[axis] == 1) continue;
    extents.push_back(std::to_string(is[axis]));
    wanted.push_back(std::to_string(shape[axis]));
    names.emplace_back(axes[axis].empty() ? "1" : axes[axis]);
  }
  const auto tuple = [](const std::vector<std::string>& items) {
    return "(" + joined(items, ", ") + (items.size() == 1 ? ",)" : ")");
  };
  const std::string what =
      "shape is " + tuple(extents) + must + tuple(wanted) + " (" + joined(names, ", ") + ")";
  if (axes == kTokenAxes) throw ShapeError(std::string(argument) + ": " + what, argument, is, shape);
  reject(argument, what);
}

}  // namespace

void require_shape(const char* argument, const Tensor& t, const Shape& shape, const AxisNames& axes) {
  if (t.shape != shape) reject_shape(argument, t.shape, ", must be ", shape, axes);
}

void require_data(const char* argument, const Tensor& t) {
  for (const Index extent : t.shape) {
    if (extent < 0) reject(argument, "shape is " + shape_text(t.shape) + ", extents must not be negative");
    if (extent > kFarthest)
      reject(argument, "shape is " + shape_text(t.shape) + ", extents must be at most 2**60");
  }
  if (!is_empty(t) && !t.given()) reject(argument, "is not given, but has the shape " + shape_text(t.shape));
}

void require_given(const char* argument, const Tensor& t) {
  if (is_left_out(t)) reject(argument, "is not given");
  require_data(argument, t);
}

void require_tensor(const char* argument, const Tensor& t, DType dtype, const Shape& shape,
                    const AxisNames& axes) {
  require_given(argument, t);
  require_dtype(argument, t, {dtype});
  require_shape(argument, t, shape, axes);
}

void require_apart(const char* argument, const Tensor& written, std::span<const Named> others) {
  if (may_overlap_itself(written)) reject(argument, "items overlap each other");
  for (const auto& [name, tensor] : others) {
    if (tensor->given() && may_overlap(written, *tensor)) reject(argument, std::string("overlaps ") + name);
  }
}

void broadcast_to(const char* argument, Tensor& t, const Shape& shape, const AxisNames& axes) {
  const Shape given = t.shape;
  for (std::size_t axis = 0; axis < 4; ++axis) {
    if (given[axis] != shape[axis] && given[axis] != 1) {
      reject_shape(argument, given, ", must broadcast to ", shape, axes);
    }
    if (given[axis] == 1) t.stride[axis] = 0;
    t.shape[axis] = shape[axis];
  }
}

void require_ints(const char* argument, const Tensor& t, const Shape& shape, const AxisNames& axes) {
  require_dtype(argument, t, {DType::i32, DType::i64});
  require_shape(argument, t, shape, axes);
}

}  // namespace attncore
