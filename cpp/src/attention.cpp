// The spine: validate → plan → run.
#include "backend.h"

namespace attncore {

const Backend& backend(Device device) {
  if (device == Device::cpu) return cpu_backend;
  throw NotImplemented("device: the CUDA back end is not built");
}

void forward(const Problem& problem, const Options& options) {
  const Call call = validate(problem);
  const Backend& device = backend(options.device);
  const Plan plan = device.plan(call, options);
  device.forward(call, plan, options);
}

void attention_weights(const Problem& problem, const Weights& weights, const Options& options) {
  const Call call = validate(problem, weights);
  backend(options.device).weights(call, weights, options);
}

void backward(const Problem& problem, const Gradients& gradients, const Options& options) {
  const BackwardCall call = validate(problem, gradients);
  backend(options.device).backward(call, options);
}

}  // namespace attncore
