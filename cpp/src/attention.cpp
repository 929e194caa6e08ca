// The spine: validate → plan → run.
#include "backend.h"
#include "tensor.h"

namespace attncore {

const Backend& backend(Device device) {
  if (device == Device::cpu) return cpu_backend;
  throw NotImplemented("device: the CUDA back end is not built");
}

void forward(const Problem& problem, const Options& options) {
  const Call call = validate(problem);
  if (is_empty(call.out)) return;  // a batch of any size: nothing to plan
  const Backend& device = backend(options.device);
  const Plan plan = device.plan(call, options);
  device.forward(call, plan, options);
}

void attention_weights(const Problem& problem, const Weights& weights, const Options& options) {
  backend(options.device).weights(validate(problem, weights), options);
}

void backward(const Problem& problem, const Gradients& gradients, const Options& options) {
  backend(options.device).backward(validate(problem, gradients), options);
}

}  // namespace attncore
