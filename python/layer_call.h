// A call of a layer, and where it is kept until backward goes through it.
#pragma once

#include <atomic>
#include <attncore/layers.hpp>
#include <memory>
#include <mutex>

#include "arguments.h"

namespace attncore::python {

/// (batch, 1, token, width) of an array (batch, token, width), (token, batch, width) or (token, width).
inline Tensor token_tensor(const char* argument, const py::array& array, bool batch_first) {
  const Axes axes = array.ndim() == 2 ? Axes{-1, -1, 0, 1}
                    : batch_first     ? Axes{0, -1, 1, 2}
                                      : Axes{1, -1, 0, 2};
  return tensor(argument, array, axes, kFloats);
}

inline py::array require_rank(const py::array& array, const char* argument, py::ssize_t rank,
                              const char* other = "x") {
  if (array.ndim() == rank) return array;
  reject_value(argument, "has " + std::to_string(array.ndim()) + " dimensions, " + other + " has " +
                             std::to_string(rank));
}

inline py::ssize_t require_token_rank(const char* argument, const py::array& array) {
  if (array.ndim() == 2 || array.ndim() == 3) return array.ndim();
  reject_value(argument, "has " + std::to_string(array.ndim()) + " dimensions, must have 2 or 3");
}

/// A call's arguments, which live as long as what backward needs of them.
struct LayerCall {
  py::array x = no_array(), context = no_array(), value_context = no_array();
  py::dict options;
  std::unique_ptr<Arguments> arguments;
  MultiHeadAttention::Inputs inputs;
  MultiHeadAttention::Activations activations;

  static py::array no_array() { return py::reinterpret_steal<py::array>(py::handle()); }

  /// `given`: x, context, value_context, positions, key_positions.
  void read(const std::array<py::object, 5>& given, bool batch_first, const py::dict& all_options) {
    options = all_options;
    arguments =
        std::make_unique<Arguments>("MultiHeadAttention", py::handle(), py::handle(), py::handle(), options);
    x = require_array("x", given[0]);
    (void)require_token_rank("x", x);
    inputs = {};
    inputs.x = token_tensor("x", x, batch_first);
    const auto read_context = [&](const char* argument, const py::object& object,
                                  py::array& array) -> Tensor {
      array = no_array();
      if (object.is_none()) return {};
      array = require_rank(require_array(argument, object), argument, x.ndim());
      return token_tensor(argument, array, batch_first);
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

/// The last call that was kept for backward: a layer's own, or one that a user keeps apart.  It is handed over under a lock: threads may use
/// it at once.
class KeptCall {
 public:
  /// The call, to be used again; none if a backward pass is still going through it.
  std::shared_ptr<LayerCall> take() {
    std::shared_ptr<LayerCall> call;
    put(call);
    if (call.use_count() != 1) return nullptr;
    std::atomic_thread_fence(std::memory_order_acquire);  // after all that the last other user did
    return call;
  }
  std::shared_ptr<LayerCall> get() {
    const std::lock_guard lock(mutex_);
    if (call_) return call_;
    reject_value(
        "backward",
        "there is no call to go back through: none was made, the last one failed, or training was False");
  }
  /// `call` becomes the one that was there: it must not end under the lock, since what it holds may call the layer.
  void put(std::shared_ptr<LayerCall>& call) {
    const std::lock_guard lock(mutex_);
    call_.swap(call);
  }
  [[nodiscard]] std::size_t bytes() {
    const std::lock_guard lock(mutex_);
    return call_ ? call_->activations.bytes() : 0;
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<LayerCall> call_;
};

}  // namespace attncore::python
