// Products of few rows with a transposed matrix, without packing it.
#pragma once

#include "../tile/gemm.h"

namespace attncore {

inline constexpr int kUnpackedRows = 8;  // up to here, b is not packed: it would be used but once

/// kRows rows of C over a register of columns, straight from b where it lies transposed: squares become columns in
/// registers.  The same sums in the same order as gemm's.
template <class Isa, class T, DType kStorage, int kRows, class Finish>
ATTN_INLINE void multiply_register(Matrix<T> c, Matrix<const T> a, const KeySource& b, Index columns,
                                   Index depth, Finish finish) noexcept {
  using V = Vec<Isa, T>;
  constexpr Index n = kWidth<Isa, T>;
  constexpr Index kAhead =
      512;  // bytes: a row of b is one stream of many, too many for the hardware to follow
  V sum[kRows]{};
  for (Index k = 0; k < depth; k += n) {
    V square[n];
    const Index items = min(n, depth - k);
    for (Index i = 0; i < n; ++i) {
      const std::byte* const p = b.data + i * b.token_stride + k * b.dim_stride;
      __builtin_prefetch(p + kAhead, 0, 2);
      square[i] = load_items<Isa, T, kStorage>(p, b.dim_stride, i < columns ? items : 0);
    }
    transpose<Isa, T>(square);
    for (Index i = 0; i < items; ++i) {
      for (int row = 0; row < kRows; ++row) sum[row] = broadcast<V>(a.row(row)[k + i]) * square[i] + sum[row];
    }
  }
  for (int row = 0; row < kRows; ++row) store(c.row(row), finish(c.row(row), sum[row], row));
}

template <class Isa, class T, DType kStorage, int kRows, class Finish>
void multiply_few_rows(Matrix<T> c, Matrix<const T> a, const KeySource& b, Index rows, Index columns,
                       Index depth, Finish finish) noexcept {
  if (rows < kRows) {
    if constexpr (kRows > 1) {
      multiply_few_rows<Isa, T, kStorage, kRows - 1>(c, a, b, rows, columns, depth, finish);
    }
    return;
  }
  for (Index column = 0; column < columns; column += kWidth<Isa, T>) {
    const KeySource from{b.data + column * b.token_stride, b.token_stride, b.dim_stride, b.storage};
    multiply_register<Isa, T, kStorage, kRows>({c.data + column, c.stride}, a, from, columns - column, depth,
                                               finish);
  }
}

}  // namespace attncore
