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

/// The one in use: use_isa(), else ATTNCORE_ISA, else the best, by choose().
[[nodiscard]] const IsaTable& current_table();

/// Why it is the one in use, in words.
[[nodiscard]] std::string isa_reason();

}  // namespace attncore
