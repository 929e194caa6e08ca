// The order of a plan's tasks.
#pragma once

#include "plan.h"

namespace attncore {

/// Batches in the order of their sections; super-block i + 1 is packed before the row tiles meet super-block i.
void order_batches(Plan& plan);

}  // namespace attncore
