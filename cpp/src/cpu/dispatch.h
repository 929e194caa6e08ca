// The ISAs of this build, and the one that calls use.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace attncore {

/// Those that this machine can run, best first.
[[nodiscard]] const std::vector<const IsaTable*>& available_tables();

/// Throws std::invalid_argument, naming what is available.
[[nodiscard]] const IsaTable& table_named(const std::string& name);

/// The one in use: use_isa(), else ATTNCORE_ISA, else the best.
[[nodiscard]] const IsaTable& current_table();

}  // namespace attncore
