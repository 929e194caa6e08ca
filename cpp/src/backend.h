// A back end runs calls on one kind of device.
#pragma once

#include "layer_call.h"
#include "plan.h"

namespace attncore {

struct Backend {
  Plan (*plan)(const Call&, const Options&);
  void (*forward)(const Call&, const Plan&, const Options&);
  void (*weights)(const WeightsCall&, const Options&);
  void (*backward)(const BackwardCall&, const Options&);
  void (*multiply)(const Product&, const Options&);
  void (*sum_rows)(const Product&, const Options&);  // of a; c has one row
  void (*rope)(const RopeCall&, const Options&);
};

extern const Backend cpu_backend;

/// Throws NotImplemented for a device that this build lacks.
const Backend& backend(Device device);

}  // namespace attncore
