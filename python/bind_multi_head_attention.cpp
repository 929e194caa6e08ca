#include <pybind11/stl.h>

#include <atomic>
#include <attncore/layers.hpp>

#include "bind.h"
#include "layer_call.h"
#include "option_gradients.h"
#include "run.h"

namespace attncore::python {

/// Writes a layer's gradients from here to the end of the scope.
class OneAtATime {
 public:
  explicit OneAtATime(std::atomic<bool>& writing) : writing_(writing) {
    if (writing_.exchange(true)) throw InUse("MultiHeadAttention: another backward is writing its gradients");
  }
  OneAtATime(const OneAtATime&) = delete;
  OneAtATime& operator=(const OneAtATime&) = delete;
  ~OneAtATime() { writing_ = false; }

 private:
  std::atomic<bool>& writing_;
};

/// The C++ layer, and its own last call.
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

  /// `given`: x, context, value_context, positions, key_positions.  `own`: where the call is kept, or null: here, with `keep`.
  py::object forward(const std::array<py::object, 5>& given, bool keep, KeptCall* own,
                     const std::optional<bool>& weights_by_head, const py::dict& options) {
    KeptCall& kept = kept_in(own);
    keep |= own != nullptr;
    std::shared_ptr<LayerCall> call = kept.take();
    if (!call) call = std::make_shared<LayerCall>();
    call->read(given, batch_first_, options);
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
    if (keep) kept.put(call);
    if (weights_by_head) return py::make_tuple(y, weights);
    return y;
  }

  /// The options of the call that backward goes through.
  py::dict kept_options(KeptCall* own) { return kept_in(own).get()->options; }

  /// The gradients by x, context and value_context, None for what was not given or is not wanted, and how many of them
  /// were given.  `options`: arrays for (d_biases, d_alibi, d_sinks, d_relative_bias), each may be None.
  py::tuple backward(const py::object& d_y, const std::array<bool, 3>& wanted, const py::tuple& options,
                     const py::object& accumulate, KeptCall* own, const py::object& num_threads) {
    const bool add = boolean("accumulate", accumulate);
    const std::shared_ptr<LayerCall> call = kept_in(own).get();
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
    const OneAtATime writing(writing_gradients_);
    run_without_gil(run, [&] { layer_.backward(call->activations, gradients, add, run); });
    return results;
  }

  /// (query, key, value) of x and the contexts, None for what is not wanted: (batch, head, token, head_dim), or without a batch
  /// axis where inputs have none.
  py::tuple in_proj(const std::array<py::object, 3>& given, const std::array<bool, 3>& wanted,
                    const py::object& num_threads) {
    std::array<py::array, 3> arrays;
    MultiHeadAttention::Inputs inputs;
    const std::array<std::pair<const char*, Tensor*>, 3> names{
        {{"x", &inputs.x}, {"context", &inputs.context}, {"value_context", &inputs.value_context}}};
    const char* first_given = nullptr;
    py::ssize_t rank = 0;
    for (std::size_t i = 0; i < 3; ++i) {
      const auto& [name, input] = names[i];
      if (given[i].is_none()) continue;
      arrays[i] = require_array(name, given[i]);
      if (first_given == nullptr) rank = require_token_rank(first_given = name, arrays[i]);
      *input = tokens(name, require_rank(arrays[i], name, rank, first_given));
    }
    const MultiHeadAttentionSettings& s = layer_.settings();
    const Tensor& context = inputs.context.given() ? inputs.context : inputs.x;
    const Tensor& value_context = inputs.value_context.given() ? inputs.value_context : context;
    const std::array<const Tensor*, 3> from{&inputs.x, &context, &value_context};
    MultiHeadAttention::HeadTensors heads;
    const std::array<Tensor*, 3> to{&heads.query, &heads.key, &heads.value};
    py::tuple results = py::make_tuple(py::none(), py::none(), py::none());
    // What is made from one input lies together, so that it is one product.
    const auto count_of = [&](std::size_t i) {
      return !wanted[i] ? 0 : i == 0 ? s.num_heads : s.num_kv_heads;
    };
    for (std::size_t first = 0, end = 0; first < 3; first = end) {
      Index count = 0;
      for (end = first; end < 3 && from[end] == from[first]; ++end) count += count_of(end);
      const auto [entries, unused, length, width] = from[first]->shape;
      const std::vector<py::ssize_t> shape{entries, count, length, s.head_dim};
      const py::array all(dtype_, shape);
      Index head = 0;
      for (std::size_t i = first; i < end; head += count_of(i++)) {
        if (!wanted[i]) continue;
        const py::slice heads_of{head, head + count_of(i), 1}, every{py::none(), py::none(), py::none()};
        const py::array part = all[py::make_tuple(every, heads_of)];
        *to[i] = tensor("heads", part, {0, 1, 2, 3}, kFloats);
        results[i] = rank == 2 ? py::object(part[py::int_(0)]) : py::object(part);
      }
    }
    Options run;
    run.num_threads = thread_count(num_threads);
    run_without_gil(run, [&] { layer_.in_proj(inputs, heads, run); });
    return results;
  }

  py::array out_proj(const py::object& out, const py::object& num_threads) {
    const py::array heads = require_array("out", out);
    const bool batched = heads.ndim() == 4;
    if (!batched && heads.ndim() != 3) {
      reject_value("out", "has " + std::to_string(heads.ndim()) + " dimensions, must have 3 or 4");
    }
    const Tensor from = tensor("out", heads, batched ? Axes{0, 1, 2, 3} : Axes{-1, 0, 1, 2}, kFloats);
    const auto [batch, queries] = std::pair{from.shape[0], from.shape[2]};
    const Index width = layer_.settings().embed_dim;
    const py::array y(dtype_, !batched       ? std::vector<py::ssize_t>{queries, width}
                              : batch_first_ ? std::vector<py::ssize_t>{batch, queries, width}
                                             : std::vector<py::ssize_t>{queries, batch, width});
    const Tensor to = tokens("y", y);
    Options run;
    run.num_threads = thread_count(num_threads);
    run_without_gil(run, [&] { layer_.out_proj(from, to, run); });
    return y;
  }

  void forget() { (void)last_.take(); }

 private:
  /// Where a call is kept: by the user, or here.
  KeptCall& kept_in(KeptCall* own) noexcept { return own != nullptr ? *own : last_; }

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

  [[nodiscard]] Tensor tokens(const char* argument, const py::array& array) const {
    return token_tensor(argument, array, batch_first_);
  }

  static std::vector<py::ssize_t> shape_of(const py::array& array) {
    return {array.shape(), array.shape() + array.ndim()};
  }

  [[nodiscard]] std::pair<py::array, Tensor> allocate_weights(const LayerCall& call, bool by_head) const {
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

  MultiHeadAttention layer_;
  py::dtype dtype_;
  bool batch_first_;
  KeptCall last_;
  std::atomic<bool> writing_gradients_ = false;
};

void bind_multi_head_attention(py::module_& m) {
  py::class_<KeptCall>(m, "Activations").def(py::init<>()).def_property_readonly("bytes", &KeptCall::bytes);
  py::class_<MultiHeadLayer>(m, "MultiHeadAttention")
      .def(py::init<const py::tuple&, const py::object&, const py::object&, const py::object&,
                    const py::object&, const py::object&, const py::dtype&, const py::object&,
                    const py::object&>())
      .def("parameters", &MultiHeadLayer::parameters)
      .def("forward", &MultiHeadLayer::forward)
      .def("kept_options", &MultiHeadLayer::kept_options)
      .def("backward", &MultiHeadLayer::backward)
      .def("in_proj", &MultiHeadLayer::in_proj)
      .def("out_proj", &MultiHeadLayer::out_proj)
      .def("forget", &MultiHeadLayer::forget);
}

}  // namespace attncore::python
