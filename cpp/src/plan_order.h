// The order of a plan's tasks.
#pragma once

#include "plan.h"

namespace attncore {

/// Batches in the order of their sections; each batch of packing moves before the one that comes ahead of its use.
void order_batches(Plan& plan);

}  // namespace attncore
