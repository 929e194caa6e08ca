// Single numbers of any floating dtype, outside kernels.
#pragma once

#include "call.h"

namespace attncore {

[[nodiscard]] double read_number(const std::byte* from, DType dtype) noexcept;
void write_number(double value, std::byte* to, DType dtype) noexcept;

}  // namespace attncore
