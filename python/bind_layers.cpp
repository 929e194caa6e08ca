// linear, linear_backward and rope: arrays of any rank as (batch, head, token, dim).
#include <pybind11/stl.h>

#include <attncore/layers.hpp>

#include "bind.h"
#include "convert.h"
#include "run.h"

namespace attncore::python {
namespace {

/// Arrays (…, features) of the same leading axes as tensors (batch, 1, token, dim): a cut of these axes in two, the
/// same for all arrays, whose halves have one stride each in every array.
class Rows {
 public:
  explicit Rows(const py::array& like) : leading_(like.ndim() - 1), like_(like) {}

  void add(const char* argument, const py::array& array) {
    if (array.ndim() != like_.ndim() || !std::equal(array.shape(), array.shape() + leading_, like_.shape())) {
      reject_value(argument, "shape is " + shape_text(array) + ", all axes but the last must be " +
                                 shape_text(like_) + "'s");
    }
    arrays_.push_back(array);
  }

  /// Whether there is a cut for all arrays.
  bool cut() {
    for (cut_ = 0; cut_ <= leading_; ++cut_) {
      const auto fits = [this](const py::array& a) {
        return one_stride(a, 0, cut_) && one_stride(a, cut_, leading_);
      };
      if (std::all_of(arrays_.begin(), arrays_.end(), fits)) return true;
    }
    return false;
  }

  [[nodiscard]] Tensor tensor_of(const char* argument, const py::array& array) const {
    Tensor t{const_cast<void*>(array.data()), dtype_of(argument, array, kFloats), {1, 1, 1, 1}, {}};
    merge(array, 0, cut_, t.shape[0], t.stride[0]);
    merge(array, cut_, leading_, t.shape[2], t.stride[2]);
    merge(array, leading_, leading_ + 1, t.shape[3], t.stride[3]);
    return t;
  }

  static std::string shape_text(const py::array& array) {
    return py::str(array.attr("shape")).cast<std::string>();
  }

 private:
  static void merge(const py::array& array, py::ssize_t begin, py::ssize_t end, Index& extent,
                    Index& stride) {
    for (py::ssize_t axis = begin; axis < end; ++axis) {
      extent *= array.shape(axis);
      if (array.shape(axis) != 1) stride = array.strides(axis);
    }
  }

  static bool one_stride(const py::array& array, py::ssize_t begin, py::ssize_t end) {
    if (array.size() == 0) return true;
    Index inner = -1;
    for (py::ssize_t axis = end - 1; axis >= begin; --axis) {
      if (array.shape(axis) == 1) continue;
      if (inner >= 0 && array.strides(axis) != array.shape(inner) * array.strides(inner)) return false;
      inner = axis;
    }
    return true;
  }

  py::ssize_t leading_, cut_ = 0;
  py::array like_;
  std::vector<py::array> arrays_;
};

py::array require_features(const char* argument, py::handle object) {
  py::array array = require_array(argument, object);
  if (array.ndim() < 1) reject_value(argument, "is a scalar, must have at least 1 dimension");
  return array;
}

py::array require_rank(const char* argument, py::handle object, py::ssize_t rank, const char* axes) {
  py::array array = require_array(argument, object);
  if (array.ndim() != rank) {
    reject_value(argument, "has " + std::to_string(array.ndim()) + " dimensions, must have " +
                               std::to_string(rank) + " " + axes);
  }
  return array;
}

Tensor weight_tensor(const char* argument, py::handle object) {
  return tensor(argument, require_rank(argument, object, 2, "(out_features, in_features)"), {-1, -1, 0, 1},
                kFloats);
}

Tensor bias_tensor(const char* argument, py::handle object) {
  return tensor(argument, require_rank(argument, object, 1, "(out_features)"), {-1, -1, -1, 0}, kFloats);
}

std::vector<py::ssize_t> shape_like(const py::array& array, py::ssize_t last) {
  std::vector<py::ssize_t> shape(array.shape(), array.shape() + array.ndim());
  shape.back() = last;
  return shape;
}

/// A result: what is given, or a new array.
py::array result(const char* argument, const py::object& given, const py::dtype& dtype,
                 const std::vector<py::ssize_t>& shape) {
  if (given.is_none()) return {dtype, shape};
  py::array array = require_array(argument, given);
  if (!array.writeable()) reject_value(argument, "is read-only");
  return array;
}

py::array contiguous(const py::array& array) { return array.attr("copy")("C"); }

py::array linear_call(py::handle x_object, py::handle weight, const py::object& bias, const py::object& out,
                      const py::object& threads) {
  py::array x = require_features("x", x_object);
  const Tensor w = weight_tensor("weight", weight);
  const Tensor b = bias.is_none() ? Tensor{} : bias_tensor("bias", bias);
  const py::array y = result("out", out, x.dtype(), shape_like(x, w.shape[2]));
  Rows rows(x);
  rows.add("out", y);
  const bool y_fits = rows.cut();
  rows.add("x", x);
  if (!y_fits) reject_value("out", "its leading axes cannot be put as two axes of one stride each");
  if (!rows.cut()) {
    x = contiguous(x);
    rows = Rows(x);
    rows.add("out", y);
    rows.cut();
  }
  Options options{.num_threads = thread_count(threads)};
  const Tensor xs = rows.tensor_of("x", x), ys = rows.tensor_of("out", y);
  run_without_gil(options, [&] { linear(xs, w, b, ys, nullptr, options); });
  return y;
}

/// wanted: which of d_x, d_weight, d_bias; into: where, or None each.
py::tuple linear_backward_call(py::handle d_y_object, py::handle x_object, py::handle weight_object,
                               const std::array<bool, 3>& wanted, const std::array<py::object, 3>& into,
                               const py::object& threads) {
  py::array d_y = require_features("d_y", d_y_object), x = require_features("x", x_object);
  const Tensor weight = weight_tensor("weight", weight_object);
  const py::dtype dtype = x.dtype();
  LinearGradients gradients;
  std::array<py::object, 3> results{py::none(), py::none(), py::none()};
  py::array d_x;
  Rows rows(x);
  if (wanted[0]) {
    d_x = result("into.x", into[0], dtype, shape_like(x, x.shape(x.ndim() - 1)));
    results[0] = d_x;
    rows.add("into.x", d_x);
    if (!rows.cut()) reject_value("into.x", "its leading axes cannot be put as two axes of one stride each");
  }
  rows.add("d_y", d_y);
  rows.add("x", x);
  if (!rows.cut()) {
    x = contiguous(x);
    d_y = contiguous(d_y);
    rows = Rows(x);
    rows.add("x", x);
    rows.add("d_y", d_y);
    if (wanted[0]) rows.add("into.x", d_x);
    rows.cut();
  }
  if (wanted[0]) gradients.d_x = rows.tensor_of("into.x", d_x);
  if (wanted[1]) {
    results[1] = result("into.weight", into[1], dtype, {weight.shape[2], weight.shape[3]});
    gradients.d_weight = weight_tensor("into.weight", results[1]);
  }
  if (wanted[2]) {
    results[2] = result("into.bias", into[2], dtype, {weight.shape[2]});
    gradients.d_bias = bias_tensor("into.bias", results[2]);
  }
  Options options{.num_threads = thread_count(threads)};
  const Tensor ys = rows.tensor_of("d_y", d_y), xs = rows.tensor_of("x", x);
  run_without_gil(options, [&] { linear_backward(ys, xs, weight, gradients, nullptr, options); });
  return py::make_tuple(results[0], results[1], results[2]);
}

py::array rope_call(py::handle x_object, const py::object& positions, const py::tuple& rotary,
                    const py::object& inverse, const py::object& layout, const py::object& out,
                    const py::object& threads) {
  const bool bshd = is_bshd(layout);
  const py::array x = require_array("x", x_object);
  if (x.ndim() < 2 || x.ndim() > 4) {
    reject_value("x", "has " + std::to_string(x.ndim()) + " dimensions, must have 2, 3 or 4");
  }
  const std::vector<py::ssize_t> shape(x.shape(), x.shape() + x.ndim());
  const py::array y = result("out", out, x.dtype(), shape);
  if (y.ndim() != x.ndim()) {
    reject_value("out", "has " + std::to_string(y.ndim()) + " dimensions, x has " + std::to_string(x.ndim()));
  }
  Rope rope_options = rope_of(rotary);
  const IntArgument at("positions", positions, 2);
  rope_options.positions = at.tensor;
  const bool back = boolean("inverse", inverse);
  const Tensor xs = tensor("x", x, axes_of(bshd, x.ndim()), kFloats);
  const Tensor ys = tensor("out", y, axes_of(bshd, y.ndim()), kFloats);
  Options options{.num_threads = thread_count(threads)};
  run_without_gil(options, bshd, x.ndim(), [&] { rope(xs, rope_options, ys, back, options); });
  return y;
}

}  // namespace

void bind_layers(py::module_& m) {
  m.def("linear", linear_call);
  m.def("linear_backward", linear_backward_call);
  m.def("rope", rope_call);
}

}  // namespace attncore::python
