// What tensors are asked for outside kernels.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "call.h"

namespace attncore {

using Shape = std::array<Index, 4>;

[[nodiscard]] bool is_empty(const Tensor& t) noexcept;
/// As far as positions reach and as many items or bytes as there may be: sums of two stay in range.
inline constexpr Index kFarthest = Index{1} << 60;

/// An optional one that the caller left as it was.  An empty one may lack data too, as an empty vector does.
[[nodiscard]] inline bool is_left_out(const Tensor& t) noexcept { return !t.given() && t.shape == Shape{}; }

/// "(2, 8, 16, 64)"
[[nodiscard]] std::string shape_text(const Shape& shape);

/// Whether an item of `a` may lie on one of `b`: false is certain.
[[nodiscard]] bool may_overlap(const Tensor& a, const Tensor& b) noexcept;

/// Whether two items of `t` may lie on each other: false is certain.
[[nodiscard]] bool may_overlap_itself(const Tensor& t) noexcept;

/// Tensors that lie in one piece of memory: all are added, then memory is reserved and they are set.  More bytes than
/// there can be are a std::bad_alloc.
class Tensors {
 public:
  void add(Tensor& tensor, DType dtype, const Shape& shape);
  void reserve(Workspace& memory);

 private:
  std::vector<std::pair<Tensor*, Index>> tensors_;
  Index bytes_ = 0;
};

/// A list of numbers, (count, 1, 1, 1); they stay where they are.
[[nodiscard]] Tensor ints(const std::vector<Index>& numbers) noexcept;

/// Tokens first … first + count − 1 of an entry or a page, (1, head, count, dim); nothing of what is not given.
[[nodiscard]] Tensor tokens_of(const Tensor& t, Index entry, Index first, Index count) noexcept;

/// Items first … first + count − 1 along an axis.
[[nodiscard]] Tensor part_of(const Tensor& t, std::size_t axis, Index first, Index count) noexcept;

}  // namespace attncore
