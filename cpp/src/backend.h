// A back end runs calls on one kind of device.
#pragma once

#include "plan.h"

namespace attncore {

struct Backend {
  const char* name;
  Plan (*plan)(const Call&, const Options&);
  void (*forward)(const Call&, const Plan&, const Options&);
  void (*weights)(const Call&, const Weights&, const Options&);
};

extern const Backend cpu_backend;

/// Throws NotImplemented for a device that this build lacks.
const Backend& backend(Device device);

}  // namespace attncore
