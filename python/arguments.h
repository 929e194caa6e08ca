// Python's arguments as a Problem and Options.
#pragma once

#include "convert.h"
#include "keywords.h"

namespace attncore::python {

/// Python's arguments as a Problem; converted arrays live as long as this.
class Arguments {
 public:
  /// `keywords`: the options of attncore.attention, by name, as `function` got them.  An array that is not
  /// given (nullptr) leaves the problem's as it is.
  Arguments(const char* function, py::handle query, py::handle key, py::handle value,
            const py::dict& keywords) {
    const Keywords given(function, keywords);
    if (const auto layout = given[Keyword::layout]) bshd_ = is_bshd(layout);
    if (query.ptr() != nullptr) {
      problem.query = operand("query", query);
      dtype_ = py::reinterpret_borrow<py::array>(query).dtype();
    }
    if (key.ptr() != nullptr) problem.key = operand("key", key);
    if (value.ptr() != nullptr) problem.value = operand("value", value);
    read(given);
  }

  /// An array for a result: axes that the inputs lack, it lacks too.
  [[nodiscard]] py::array allocate_out() const {
    const Problem& p = problem;
    std::vector<py::ssize_t> shape{p.query.shape[0], p.query.shape[1], p.query.shape[2], p.value.shape[3]};
    if (bshd_) std::swap(shape[1], shape[2]);
    if (rank_ < 4) shape.erase(shape.begin());
    if (rank_ < 3) shape.erase(bshd_ ? shape.begin() + 1 : shape.begin());
    return {dtype_, shape};
  }

  /// An array over (batch, head, query): it stands so in every layout.
  [[nodiscard]] py::array allocate_rows() const {
    std::vector<py::ssize_t> shape{problem.query.shape[0], problem.query.shape[1], problem.query.shape[2]};
    shape.erase(shape.begin(), shape.begin() + (4 - rank_));
    return {compute_dtype(), shape};
  }

  [[nodiscard]] Tensor rows_tensor(const char* argument, const py::array& array) const {
    const int lacking = static_cast<int>(4 - rank_);
    return tensor(argument, array, {0 - lacking, 1 - lacking, 2 - lacking, -1}, kFloats);
  }

  /// An array with query's axes.
  [[nodiscard]] Tensor operand_tensor(const char* argument, const py::array& array) const {
    if (array.ndim() != rank_) {
      reject_value(argument,
                   "has " + std::to_string(array.ndim()) + " dimensions, query has " + std::to_string(rank_));
    }
    return tensor(argument, array, axes_of(bshd_, rank_), kFloats);
  }

  [[nodiscard]] Tensor out_tensor(const py::array& array) const {
    if (!array.writeable()) reject_value("out", "is read-only");
    return operand_tensor("out", array);
  }

  [[nodiscard]] py::ssize_t rank() const { return rank_; }
  [[nodiscard]] bool bshd() const { return bshd_; }

  static constexpr Axes kTableAxes{-1, 0, -1, 1};  // of the relative bias's table

  [[nodiscard]] py::dtype compute_dtype() const {
    return problem.query.dtype == DType::f64 ? py::dtype::of<double>() : py::dtype::of<float>();
  }

  Problem problem;
  Options options;

  /// (batch), or a scalar; most = 2: (batch, token), or (token)
  Tensor ints(const char* argument, const py::object& object, py::ssize_t most, bool wraps = false) {
    const IntArgument given(argument, object, most, wraps);
    if (!object.is_none()) kept(given.array);
    return given.tensor;
  }

 private:
  void read(const Keywords& given) {
    Score& score = problem.score;
    if (const auto x = given[Keyword::causal]) score.causal = boolean("causal", x);
    if (const auto x = given[Keyword::window]) read_window(x);
    if (const auto x = given[Keyword::query_offset]) score.query_offset = ints("query_offset", x, 1);
    if (const auto x = given[Keyword::mask]) score.mask = scores("mask", x, "bool");
    if (const auto x = given[Keyword::bias]) read_biases(x);
    if (const auto x = given[Keyword::alibi]) score.alibi = by_head("alibi", x, 2);
    if (const auto x = given[Keyword::relative_bias]) read_relative_bias(x);
    if (const auto x = given[Keyword::softcap]) score.softcap = number("softcap", x);
    if (const auto x = given[Keyword::sinks]) score.sinks = by_head("sinks", x, 1);
    if (const auto x = given[Keyword::scale]) score.scale = number("scale", x);
    if (const auto x = given[Keyword::query_segments]) score.query_segments = ints("query_segments", x, 2);
    if (const auto x = given[Keyword::key_segments]) score.key_segments = ints("key_segments", x, 2);
    if (const auto x = given[Keyword::query_lengths]) score.query_lengths = ints("query_lengths", x, 1);
    if (const auto x = given[Keyword::key_lengths]) score.key_lengths = ints("key_lengths", x, 1);
    if (const auto x = given[Keyword::tree_parents]) score.tree_parents = ints("tree_parents", x, 2, true);
    if (const auto x = given[Keyword::precision]) problem.precision = precision(x);
    if (const auto x = given[Keyword::num_threads]) options.num_threads = thread_count(x);
    if (const auto x = given[Keyword::dropout_p])
      problem.dropout.probability = number("dropout_p", x).value_or(0);
    if (const auto x = given[Keyword::seed]) problem.dropout.seed = seed(x);
  }

  Tensor operand(const char* argument, py::handle object) {
    const py::array array = require_array(argument, object);
    if (array.ndim() < 2 || array.ndim() > 4) {
      reject_value(argument, "has " + std::to_string(array.ndim()) + " dimensions, must have 2, 3 or 4");
    }
    if (rank_ != 0 && array.ndim() != rank_) {
      reject_value(argument,
                   "has " + std::to_string(array.ndim()) + " dimensions, query has " + std::to_string(rank_));
    }
    rank_ = array.ndim();
    return tensor(argument, array, axes_of(bshd_, rank_), kFloats);
  }

  void read_window(const py::object& window) {
    if (window.is_none()) return;
    if (!py::isinstance<py::tuple>(window) && !py::isinstance<py::list>(window)) {
      reject_type("window", "must be a pair (left, right) of ints or None, is " + type_name(window));
    }
    const auto pair = py::reinterpret_borrow<py::sequence>(window);
    if (pair.size() != 2)
      reject_value("window", "must be a pair (left, right), has " + std::to_string(pair.size()) + " items");
    const py::object left = pair[0], right = pair[1];
    if (!left.is_none()) problem.score.left = integer("window", left);
    if (!right.is_none()) problem.score.right = integer("window", right);
  }

  /// The array lives as long as the arguments.
  py::array kept(const py::array& array) {
    kept_.push_back(array);
    return array;
  }

  void require_rank(const char* argument, const py::array& array, py::ssize_t most) {
    if (array.ndim() <= most) return;
    reject_value(argument, "has " + std::to_string(array.ndim()) + " dimensions, must have at most " +
                               std::to_string(most));
  }

  /// (batch, head, query, key), right-aligned.
  Tensor scores(const char* argument, const py::object& object, const char* accepted) {
    if (object.is_none()) return {};
    const py::array array = kept(any_array(argument, object));
    require_rank(argument, array, 4);
    const int lacking = static_cast<int>(4 - array.ndim());
    return tensor(argument, array, {0 - lacking, 1 - lacking, 2 - lacking, 3 - lacking}, accepted);
  }

  void read_biases(const py::object& bias) {
    if (bias.is_none()) return;
    if (!py::isinstance<py::tuple>(bias) && !py::isinstance<py::list>(bias)) {
      return problem.score.biases.push_back(scores("bias", bias, kFloats));
    }
    const auto list = py::reinterpret_borrow<py::sequence>(bias);
    if (list.size() > kMaxBiases) {
      reject_value("bias", "has " + std::to_string(list.size()) + " arrays, must have at most " +
                               std::to_string(kMaxBiases));
    }
    for (const py::object item : list) {
      if (!py::isinstance<py::array>(item))
        reject_type("bias", "must be an array or a tuple of arrays, has " + type_name(item));
      problem.score.biases.push_back(scores("bias", item, kFloats));
    }
  }

  /// (table, bidirectional, max_distance)
  void read_relative_bias(const py::object& bias) {
    if (bias.is_none()) return;
    if (!py::isinstance<py::tuple>(bias) || py::len(bias) != 3) {
      reject_type("relative_bias", "must be an attncore.RelativeBias or None, is " + type_name(bias));
    }
    const auto fields = py::reinterpret_borrow<py::tuple>(bias);
    const py::array table = kept(any_array("relative_bias", fields[0]));
    if (table.ndim() != 2) {
      reject_value("relative_bias", "has a table of " + std::to_string(table.ndim()) +
                                        " dimensions, must have 2: (heads, buckets)");
    }
    RelativeBias& relative = problem.score.relative_bias;
    relative.table = tensor("relative_bias", table, kTableAxes, kFloats);
    relative.bidirectional = boolean("bidirectional", fields[1]);
    relative.max_distance = integer("max_distance", fields[2]);
  }

  /// (head) or (batch, head)
  Tensor by_head(const char* argument, const py::object& object, py::ssize_t most) {
    if (object.is_none()) return {};
    const py::array array = kept(float_array(argument, object));
    if (array.ndim() == 0) reject_value(argument, "is a scalar, must have a value a head");
    require_rank(argument, array, most);
    return tensor(argument, array, array.ndim() == 2 ? Axes{0, 1, -1, -1} : Axes{-1, 0, -1, -1}, kFloats);
  }

  bool bshd_ = false;
  py::ssize_t rank_ = 0;  // of query, key and value
  py::dtype dtype_;
  std::vector<py::array> kept_;
};

}  // namespace attncore::python
