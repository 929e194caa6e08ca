// The layers' products and rotations on a CPU: what cpu_backend's table points to.
#pragma once

#include "../layer_call.h"

namespace attncore {

void multiply(const Product& product, const Options& options);
void sum_rows(const Product& product, const Options& options);
void rope(const RopeCall& given, const Options& options);

}  // namespace attncore
