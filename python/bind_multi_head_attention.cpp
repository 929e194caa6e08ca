#include <pybind11/stl.h>

#include <attncore/layers.hpp>
#include <mutex>

#include "bind.h"
#include "option_gradients.h"
#include "run.h"

namespace attncore::python {

/// The C++ layer, and the last call that it kept for backward.
class MultiHeadLayer {
 public:
  /// `sizes`: embed_dim, num_heads, num_kv_heads, key_dim, value_dim, head_dim; None is the default.  `rotary`: None or
  /// (base, dims or None, interleaved).
  MultiHeadLayer(const py::tuple& sizes, const py::object& bias, const py::object& bias_kv,
                 const py::object& add_zero_attn, const py::object& rotary, const py::object& qk_norm,
                 const py::dtype& dtype, const py::object& seed, const py::object& batch_first)
      : layer_(settings(sizes, bias, bias_kv, add_zero_attn, rotary, qk_norm, dtype, seed)),
        dtype_(dtype),
        batch_first_(boolean("batch_first", batch_first)) {}

  /// (name, value, gradient) of each parameter: views of the layer's memory, which they keep alive.
  static py::list parameters(const py::object& self) {
    const auto& layer = self.cast<const MultiHeadLayer&>();
    py::list list;
    for (const auto& [name, shape, value, gradient] : layer.layer_.parameters()) {
      list.append(py::make_tuple(name, py::array(layer.dtype_, shape, value.data, self),
                                 py::array(layer.dtype_, shape, gradient.data, self)));
    }
    return list;
  }

  py::object forward(const py::object& x, const py::object& context, const py::object& value_context,
                     const py::object& positions, const py::object& key_positions, bool keep,
                     const std::optional<bool>& weights_by_head, const py::dict& options) {
    std::shared_ptr<Call> call = take();
    if (!call) call = std::make_shared<Call>();
    call->read(*this, {x, context, value_context, positions, key_positions}, options);
    const py::array y(dtype_, shape_of(call->x));
    const Tensor y_tensor = tokens("y", y);
    py::object weights = py::none();
    Tensor weights_tensor;
    if (weights_by_head) std::tie(weights, weights_tensor) = allocate_weights(*call, *weights_by_head);
    Options& run = call->arguments->options;
    run_without_gil(run, [&] {
      layer_.forward(call->inputs, y_tensor, keep || weights_by_head ? &call->activations : nullptr, run);
      if (weights_by_head) layer_.weights(call->activations, weights_tensor, run);
    });
    if (keep) put(call);
    if (weights_by_head) return py::make_tuple(y, weights);
    return y;
  }

  /// The options of the call that backward goes through.
  py::dict kept_options() { return kept()->options; }

  /// The gradients by x, context and value_context, None for what was not given or is not wanted, and how many of them
  /// were given.  `options`: arrays for (d_biases, d_alibi, d_sinks, d_relative_bias), each may be None.
  py::tuple backward(const py::object& d_y, const std::array<bool, 3>& wanted, const py::tuple& options,
                     const py::object& accumulate, const py::object& num_threads) {
    const bool add = boolean("accumulate", accumulate);
    const std::shared_ptr<Call> call = kept();
    MultiHeadAttention::InputGradients gradients;
    gradients.d_y = tokens("d_y", require_rank(require_array("d_y", d_y), "d_y", call->x.ndim()));
    py::tuple results(4);
    Index given = 0;
    const std::array<py::array*, 3> inputs{&call->x, &call->context, &call->value_context};
    const std::array<Tensor*, 3> to{&gradients.d_x, &gradients.d_context, &gradients.d_value_context};
    for (std::size_t i = 0; i < 3; ++i) {
      results[i] = py::none();
      if (inputs[i]->ptr() == nullptr) continue;
      ++given;
      if (!wanted[i]) continue;
      const py::array d(dtype_, shape_of(*inputs[i]));
      *to[i] = tokens("d_x", d);
      results[i] = d;
    }
    results[3] = given;
    read_option_gradients(gradients, options[0], options[1], options[2], options[3]);
    Options run;
    run.num_threads = thread_count(num_threads);
    run_without_gil(run, [&] { layer_.backward(call->activations, gradients, add, run); });
    return results;
  }

  void forget() { (void)take(); }

 private:
  /// A call's arguments, which live as long as what backward needs of them.
  struct Call {
    py::array x = no_array(), context = no_array(), value_context = no_array();
    py::dict options;
    std::unique_ptr<Arguments> arguments;
    MultiHeadAttention::Inputs inputs;
    MultiHeadAttention::Activations activations;

    static py::array no_array() { return py::reinterpret_steal<py::array>(py::handle()); }

    void read(const MultiHeadLayer& layer, const std::array<py::object, 5>& given,
              const py::dict& all_options) {
      options = all_options;
      arguments = std::make_unique<Arguments>("MultiHeadAttention", py::handle(), py::handle(), py::handle(),
                                              options);
      x = require_array("x", given[0]);
      if (x.ndim() != 2 && x.ndim() != 3) {
        reject_value("x", "has " + std::to_string(x.ndim()) + " dimensions, must have 2 or 3");
      }
      inputs = {};
      inputs.x = layer.tokens("x", x);
      const auto read_context = [&](const char* argument, const py::object& object,
                                    py::array& array) -> Tensor {
        array = no_array();
        if (object.is_none()) return {};
        array = require_rank(require_array(argument, object), argument, x.ndim());
        return layer.tokens(argument, array);
      };
      inputs.context = read_context("context", given[1], context);
      inputs.value_context = read_context("value_context", given[2], value_context);
      inputs.positions = arguments->ints("positions", given[3], 2);
      inputs.key_positions = arguments->ints("key_positions", given[4], 2);
      inputs.score = arguments->problem.score;
      inputs.dropout = arguments->problem.dropout;
      inputs.precision = arguments->problem.precision;
    }
  };

  static Index width(const char* argument, const py::object& object) {
    if (object.is_none()) return 0;
    const Index value = integer(argument, object);
    if (value < 1) reject_value(argument, "is " + std::to_string(value) + ", must be at least 1");
    return value;
  }

  static MultiHeadAttentionSettings settings(const py::tuple& sizes, const py::object& bias,
                                             const py::object& bias_kv, const py::object& add_zero_attn,
                                             const py::object& rotary, const py::object& qk_norm,
                                             const py::dtype& dtype, const py::object& seed) {
    MultiHeadAttentionSettings s;
    const std::array<std::pair<const char*, Index*>, 6> names{{{"embed_dim", &s.embed_dim},
                                                               {"num_heads", &s.num_heads},
                                                               {"num_kv_heads", &s.num_kv_heads},
                                                               {"key_dim", &s.key_dim},
                                                               {"value_dim", &s.value_dim},
                                                               {"head_dim", &s.head_dim}}};
    for (std::size_t i = 0; i < names.size(); ++i) *names[i].second = width(names[i].first, sizes[i]);
    s.bias = boolean("bias", bias);
    s.bias_kv = boolean("add_bias_kv", bias_kv);
    s.add_zero_attn = boolean("add_zero_attn", add_zero_attn);
    if (!rotary.is_none()) s.rotary = rope_of(py::tuple(rotary));
    s.qk_norm = number("qk_norm", qk_norm);
    s.dtype = dtype_of("dtype", py::array(dtype, 0), kFloats);
    s.seed = python::seed(seed);
    return s;
  }

  /// (batch, 1, token, width) of an array (batch, token, width), (token, batch, width) or (token, width).
  [[nodiscard]] Tensor tokens(const char* argument, const py::array& array) const {
    const Axes axes = array.ndim() == 2 ? Axes{-1, -1, 0, 1}
                      : batch_first_    ? Axes{0, -1, 1, 2}
                                        : Axes{1, -1, 0, 2};
    return tensor(argument, array, axes, kFloats);
  }

  static py::array require_rank(const py::array& array, const char* argument, py::ssize_t rank) {
    if (array.ndim() == rank) return array;
    reject_value(argument,
                 "has " + std::to_string(array.ndim()) + " dimensions, x has " + std::to_string(rank));
  }

  static std::vector<py::ssize_t> shape_of(const py::array& array) {
    return {array.shape(), array.shape() + array.ndim()};
  }

  [[nodiscard]] std::pair<py::array, Tensor> allocate_weights(const Call& call, bool by_head) const {
    const MultiHeadAttentionSettings& s = layer_.settings();
    const Tensor& x = call.inputs.x;
    const Index keys = (call.inputs.context.given() ? call.inputs.context : x).shape[2];
    std::vector<py::ssize_t> shape{x.shape[0], by_head ? s.num_heads : 1, x.shape[2],
                                   keys + s.bias_kv + s.add_zero_attn};
    const DType dtype = s.dtype == DType::f64 ? DType::f64 : DType::f32;
    py::array weights(dtype == DType::f64 ? py::dtype::of<double>() : py::dtype::of<float>(), shape);
    const Tensor t = tensor("weights", weights, {0, 1, 2, 3}, kFloats);
    if (!by_head) shape.erase(shape.begin() + 1);
    if (call.x.ndim() == 2) shape.erase(shape.begin());
    return {weights.reshape(shape), t};
  }

  // The calls that are kept are handed over under a lock: threads may use the layer at once.
  /// The last call, to be used again; none if a backward pass is still going through it.
  std::shared_ptr<Call> take() {
    const std::lock_guard lock(mutex_);
    std::shared_ptr<Call> call = std::exchange(kept_, nullptr);
    return call.use_count() == 1 ? call : nullptr;
  }
  std::shared_ptr<Call> kept() {
    const std::lock_guard lock(mutex_);
    if (kept_) return kept_;
    reject_value(
        "backward",
        "there is no call to go back through: none was made, the last one failed, or training was False");
  }
  void put(std::shared_ptr<Call> call) {
    const std::lock_guard lock(mutex_);
    kept_.swap(call);
  }

  MultiHeadAttention layer_;
  py::dtype dtype_;
  bool batch_first_;
  std::mutex mutex_;
  std::shared_ptr<Call> kept_;
};

void bind_multi_head_attention(py::module_& m) {
  py::class_<MultiHeadLayer>(m, "MultiHeadAttention")
      .def(py::init<const py::tuple&, const py::object&, const py::object&, const py::object&,
                    const py::object&, const py::object&, const py::dtype&, const py::object&,
                    const py::object&>())
      .def("parameters", &MultiHeadLayer::parameters)
      .def("forward", &MultiHeadLayer::forward)
      .def("kept_options", &MultiHeadLayer::kept_options)
      .def("backward", &MultiHeadLayer::backward)
      .def("forget", &MultiHeadLayer::forget);
}

}  // namespace attncore::python
