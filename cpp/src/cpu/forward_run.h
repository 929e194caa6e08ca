// Forward's plans become threads' work here: claiming tasks, packing super-blocks for all who need them, merging split keys.
#pragma once

#include "../plan.h"

namespace attncore {

void run_forward(const Call& call, const Plan& plan, const Options& options);

}  // namespace attncore
