// Rows of bfloat16 tensors, two by two along a product's depth.
#pragma once

#include "../tile/pairs.h"
#include "rotate.h"

namespace attncore {

/// Some columns of a row, beside each other, then a 0; writes up to a register more.
template <class Isa>
void load_bf16_row(const Tensor& t, Index row, Range columns, Bf16Pair* out) noexcept {
  constexpr Index n = 2 * kWidth<Isa, float>, kItem = sizeof(std::uint16_t);
  auto* const items = reinterpret_cast<std::byte*>(out);
  const Index stride = t.stride[3];
  const RowAt where = RowAt::of(t, row);
  for_each_head(
      t, where.batch, where.token, columns, [&](const std::byte* head, Index dim, Index count, Index column) {
        for (Index i = 0; i < count; i += n) {
          const auto pairs = load_pairs<Isa, DType::bf16>(head + (dim + i) * stride, stride, count - i);
          store(static_cast<void*>(items + (column + i) * kItem), pairs);
        }
      });
  __builtin_memset(items + columns.size() * kItem, 0, kItem);
}

/// Some columns of two rows, pair by pair, or of one and zeros; `room` is for both.  Writes whole pairs of
/// registers.
template <class Isa>
void load_paired_rows(const Tensor& t, Range rows, Range columns, Bf16Pair* const (&room)[2],
                      Bf16Pair* out) noexcept {
  constexpr Index n = kWidth<Isa, float>;
  for (Index i = 0; i < rows.size(); ++i) load_bf16_row<Isa>(t, rows.begin + i, columns, room[i]);
  for (Index i = 0; i < columns.size(); i += 2 * n) {
    const auto even = load<U32<Isa>>(room[0] + i / 2);
    const auto odd = rows.size() == 2 ? load<U32<Isa>>(room[1] + i / 2) : U32<Isa>{};
    store_paired<Isa>(out + i, even, odd);
  }
}

}  // namespace attncore
