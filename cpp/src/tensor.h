// What tensors are asked for outside kernels.
#pragma once

#include <string>

#include "call.h"

namespace attncore {

[[nodiscard]] bool is_empty(const Tensor& t) noexcept;

/// "(2, 8, 16, 64)"
[[nodiscard]] std::string shape_text(const std::array<Index, 4>& shape);

/// Whether an item of `a` may lie on one of `b`: false is certain.
[[nodiscard]] bool may_overlap(const Tensor& a, const Tensor& b) noexcept;

/// Whether two items of `t` may lie on each other: false is certain.
[[nodiscard]] bool may_overlap_itself(const Tensor& t) noexcept;

}  // namespace attncore
