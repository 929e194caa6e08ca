#include <pybind11/stl.h>

#include <attncore/state.hpp>

#include "arguments.h"
#include "bind.h"
#include "run.h"
#include "storage.h"

namespace attncore::python {

/// The C++ state, with the axes that its query came in.
class State {
 public:
  /// `options` are those of attncore.attention, as Arguments has them.
  State(py::handle query, const py::dtype& dtype, const py::object& value_dim, const py::dict& options)
      : State(Arguments("AttentionState", query, py::handle(), py::handle(), options), dtype, value_dim) {}

  /// `arrays`: key, value, key_scale, value_scale, the last two may be None.  `mapped`: arrays of bytes, each a file's
  /// mapping.
  void update(const std::array<py::object, 4>& arrays, const py::object& first_key, const py::list& mapped,
              const py::dict& options) {
    Arguments arguments("update", py::handle(), py::handle(), py::handle(), options);
    const Score& score = arguments.problem.score;
    AttentionState::Piece piece{.key = stored_tokens("key", arrays[0]),
                                .value = stored_tokens("value", arrays[1]),
                                .key_scale = scale("key_scale", arrays[2]),
                                .value_scale = scale("value_scale", arrays[3]),
                                .mask = score.mask,
                                .biases = score.biases,
                                .key_segments = score.key_segments,
                                .key_lengths = score.key_lengths,
                                .first_key = arguments.ints("first_key", first_key, 1)};
    for (const py::handle item : mapped) {
      const auto bytes = item.cast<py::array>();
      piece.mappings.push_back({bytes.data(), static_cast<std::size_t>(bytes.nbytes())});
    }
    run_without_gil(arguments.options, [&] { state_.update(piece, arguments.options); });
  }

  void merge(const State& other, const py::object& num_threads) {
    Options options;
    options.num_threads = thread_count(num_threads);
    run_without_gil(options, [&] { state_.merge(other.state_, options); });
  }

  [[nodiscard]] py::tuple result(const py::object& num_threads) const {
    Options options;
    options.num_threads = thread_count(num_threads);
    const Tensor& query = state_.query();
    std::vector<py::ssize_t> shape{query.shape[0], query.shape[1], query.shape[2]};
    shape.erase(shape.begin(), shape.begin() + (4 - rank_));
    const py::array lse(dtype_, shape);
    shape = {query.shape[0], query.shape[1], query.shape[2], state_.settings().value_dim};
    if (bshd_) std::swap(shape[1], shape[2]);
    if (rank_ < 4) shape.erase(shape.begin());
    if (rank_ < 3) shape.erase(bshd_ ? shape.begin() + 1 : shape.begin());
    const py::array out(dtype_, shape);
    const int lacking = static_cast<int>(4 - rank_);
    const Tensor out_tensor = tensor("out", out, axes_of(bshd_, rank_), kFloats),
                 lse_tensor = tensor("lse", lse, {0 - lacking, 1 - lacking, 2 - lacking, -1}, kFloats);
    run_without_gil(options, [&] { state_.result(out_tensor, lse_tensor, options); });
    return py::make_tuple(out, lse);
  }

  /// The query as it is held, (batch, head, query, dim).
  [[nodiscard]] py::array query() const { return copy_of(state_.query()); }

  [[nodiscard]] py::dict parts() const {
    py::dict parts;
    state_.read_parts([&](const AttentionState::Part& part) { parts[part.name] = copy_of(part.tensor); });
    return parts;
  }

  /// Takes over what parts() gave, if all of it is there.
  void set_parts(const py::dict& parts) {
    std::vector<py::array> arrays;
    state_.read_parts([&](const AttentionState::Part& part) { arrays.push_back(given(parts, part)); });
    auto next = arrays.begin();
    state_.write_parts([&](const AttentionState::Part& part) {
      const py::array& array = *next++;
      __builtin_memcpy(part.tensor.data, array.data(), static_cast<std::size_t>(array.nbytes()));
    });
  }

  [[nodiscard]] Index value_dim() const { return state_.settings().value_dim; }
  [[nodiscard]] py::ssize_t rank() const { return rank_; }

 private:
  State(const Arguments& arguments, const py::dtype& dtype, const py::object& value_dim)
      : state_(arguments.problem.query, settings(arguments, dtype, value_dim)),
        dtype_(dtype),
        rank_(arguments.rank()),
        bshd_(arguments.bshd()) {}

  static AttentionStateSettings settings(const Arguments& arguments, const py::dtype& dtype,
                                         const py::object& value_dim) {
    AttentionStateSettings s;
    s.dtype = dtype_of("dtype", py::array(dtype, 0), "float32 or float64");
    if (!value_dim.is_none()) {
      s.value_dim = integer("value_dim", value_dim);
      if (s.value_dim < 1) {
        reject_value("value_dim", "is " + std::to_string(s.value_dim) + ", must be at least 1");
      }
    }
    s.score = arguments.problem.score;
    s.precision = arguments.problem.precision;
    return s;
  }

  /// Keys or values, with query's axes.
  Tensor stored_tokens(const char* argument, const py::object& object) const {
    const py::array array = require_array(argument, object);
    if (array.ndim() != rank_) {
      reject_value(argument,
                   "has " + std::to_string(array.ndim()) + " dimensions, query has " + std::to_string(rank_));
    }
    return stored(argument, array, axes_of(bshd_, rank_));
  }

  /// One number a token and head, or nothing.
  Tensor scale(const char* argument, const py::object& object) const {
    if (object.is_none()) return {};
    const py::array array = require_array(argument, object);
    if (array.ndim() != rank_ - 1) {
      reject_value(argument, "has " + std::to_string(array.ndim()) + " dimensions, must have " +
                                 std::to_string(rank_ - 1) + ", as key without dim");
    }
    Axes axes = axes_of(bshd_, rank_);
    axes[3] = -1;
    return tensor(argument, array, axes, "float32");
  }

  static py::dtype dtype_of_tensor(const Tensor& t) {
    return t.dtype == DType::i64   ? py::dtype::of<std::int64_t>()
           : t.dtype == DType::f64 ? py::dtype::of<double>()
                                   : py::dtype::of<float>();
  }

  static py::array copy_of(const Tensor& t) {
    return {dtype_of_tensor(t), std::vector<py::ssize_t>(t.shape.begin(), t.shape.end()), t.data};
  }

  /// The array for a part, without gaps.
  static py::array given(const py::dict& parts, const AttentionState::Part& part) {
    if (!parts.contains(part.name)) reject_value("state", std::string("has no ") + part.name);
    const auto array = py::module_::import("numpy")
                           .attr("ascontiguousarray")(parts[part.name], dtype_of_tensor(part.tensor))
                           .cast<py::array>();
    const std::vector<py::ssize_t> shape(part.tensor.shape.begin(), part.tensor.shape.end());
    if (std::vector<py::ssize_t>(array.shape(), array.shape() + array.ndim()) != shape) {
      reject_value("state", std::string(part.name) + " is of another shape");
    }
    return array;
  }

  AttentionState state_;
  py::dtype dtype_;  // of results
  py::ssize_t rank_;
  bool bshd_;
};

void bind_state(py::module_& m) {
  py::class_<State>(m, "AttentionState")
      .def(py::init<py::handle, const py::dtype&, const py::object&, const py::dict&>())
      .def("update", &State::update)
      .def("merge", &State::merge)
      .def("result", &State::result)
      .def("query", &State::query)
      .def("parts", &State::parts)
      .def("set_parts", &State::set_parts)
      .def("value_dim", &State::value_dim)
      .def("rank", &State::rank);
}

}  // namespace attncore::python
