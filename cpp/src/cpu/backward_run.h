// Backward's plans become threads' work here.
#pragma once

#include "../call.h"

namespace attncore {

void run_backward(const BackwardCall& backward, const Options& options);

}  // namespace attncore
