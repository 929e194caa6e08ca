// Matrix products of tiles: C (rows, columns) from A (rows, depth), row by row, and a packed B (depth,
// columns).
//
// B is packed in strips of kColumns registers (panel.h), so that a product streams memory.  A block of C of
// kRows rows and one strip stays in registers for the whole depth: kRows · kColumns multiply-adds for kRows +
// kColumns loads. Every element of C is one chain of multiply-adds over the depth whatever block it falls in:
// bits do not depend on the number of rows.  A matrix-unit ISA specialises Panel and gemm together.
#pragma once

#include "panel.h"

namespace attncore {

/// C = scale · A·B
template <class T>
struct Scaled {
  T scale;
  template <class V>
  ATTN_INLINE V operator()(const T* c, V sum, Index row) const noexcept {
    (void)c, (void)row;
    T factor = scale;
    asm volatile(
        ""
        : "+m"(factor));  // read after the loop: kept in a register, it would push a sum to the stack
    return sum * factor;
  }
};

/// C = keep[row] · C + A·B: the depth is summed apart, so that long sums are sums of block sums.
template <class T>
struct Accumulated {
  const T* keep;
  template <class V>
  ATTN_INLINE V operator()(const T* c, V sum, Index row) const noexcept {
    return load<V>(c) * keep[row] + sum;
  }
};

template <class T>
struct Matrix {  // row-major; `stride` in items
  T* data;
  Index stride;
  ATTN_INLINE T* row(Index i) const noexcept { return data + i * stride; }
};

template <class T>
ATTN_INLINE Matrix<const T> as_const(Matrix<T> m) noexcept {
  return {m.data, m.stride};
}

template <class T>
ATTN_INLINE Panel<const T> as_const(Panel<T> p) noexcept {
  return {p.data, p.columns, p.depth};
}

/// kRows × kColumns registers of C at (row, first column of the strip).
template <class Isa, class T, int kRows, int kColumns, class Finish>
ATTN_INLINE void multiply_block(Matrix<T> c, Matrix<const T> a, const T* strip, Index depth, Index row,
                                Finish finish) noexcept {
  using V = Vec<Isa, T>;
  constexpr int n = kWidth<Isa, T>;
  V sum[kRows][kColumns]{};
  const T* a_row[kRows];
  for (int i = 0; i < kRows; ++i) a_row[i] = a.row(row + i);
  for (Index k = 0; k < depth; ++k) {
    V b[kColumns];
    for (int j = 0; j < kColumns; ++j) b[j] = load<V>(strip + (k * kColumns + j) * n);
    for (int i = 0; i < kRows; ++i) {
      const V x = broadcast<V>(a_row[i][k]);
      for (int j = 0; j < kColumns; ++j) sum[i][j] = x * b[j] + sum[i][j];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) {
      T* at = c.row(row + i) + j * n;
      store(at, finish(at, sum[i][j], row + i));
    }
  }
}

/// The last rows, fewer than Isa::kRows: one block of exactly as many.
template <class Isa, class T, int kRows, int kColumns, class Finish>
ATTN_INLINE void multiply_rest(Matrix<T> c, Matrix<const T> a, const T* strip, Index depth, Index row,
                               Index rows, Finish finish) noexcept {
  if constexpr (kRows > 0) {
    if (rows == kRows) return multiply_block<Isa, T, kRows, kColumns>(c, a, strip, depth, row, finish);
    multiply_rest<Isa, T, kRows - 1, kColumns>(c, a, strip, depth, row, rows, finish);
  }
}

/// All rows of a strip of kColumns registers.
template <class Isa, class T, int kColumns, class Finish>
void multiply_strip(Matrix<T> c, Matrix<const T> a, const T* strip, Index rows, Index depth,
                    Finish finish) noexcept {
  Index row = 0;
  for (; row + Isa::kRows <= rows; row += Isa::kRows) {
    multiply_block<Isa, T, Isa::kRows, kColumns>(c, a, strip, depth, row, finish);
  }
  multiply_rest<Isa, T, Isa::kRows - 1, kColumns>(c, a, strip, depth, row, rows - row, finish);
}

/// A strip of `registers` ≤ kColumns registers.
template <class Isa, class T, int kColumns, class Finish>
ATTN_INLINE void multiply_any_strip(Index registers, Matrix<T> c, Matrix<const T> a, const T* strip,
                                    Index rows, Index depth, Finish finish) noexcept {
  if (registers == kColumns) return multiply_strip<Isa, T, kColumns>(c, a, strip, rows, depth, finish);
  if constexpr (kColumns > 1) {
    multiply_any_strip<Isa, T, kColumns - 1>(registers, c, a, strip, rows, depth, finish);
  }
}

/// C (rows, columns) from A (rows, depth) and the first `depth` rows of the panel; whole strips are computed,
/// so that C needs room for the panel's columns and their padding.
template <class Isa, class T, class Finish>
void gemm(Matrix<T> c, Matrix<const T> a, Panel<const T> b, Index rows, Index columns, Index depth,
          Finish finish) noexcept {
  for (Index strip = 0; strip < columns; strip += Isa::kColumns * kWidth<Isa, T>) {
    multiply_any_strip<Isa, T, Isa::kColumns>(strip_registers<Isa, T>(b.columns, strip),
                                              {c.data + strip, c.stride}, a, b.data + strip * b.depth, rows,
                                              depth, finish);
  }
}

/// C = keep[row] · C + A·B without the terms of hidden keys, whose weight is −0: for a B that holds Inf or
/// NaN, since in any multiply-add 0 · NaN is NaN.  The same sums in the same order as gemm: what is left out
/// is ± 0 there.
template <class Isa, class T>
void gemm_of_visible(Matrix<T> c, Matrix<const T> a, Panel<const T> b, Index rows, Index depth,
                     Accumulated<T> finish) noexcept {
  using V = Vec<Isa, T>;
  constexpr Index n = kWidth<Isa, T>;
  for (Index column = 0; column < b.columns; column += n) {
    const Index strip = column - column % (Isa::kColumns * n);
    const Index stride = strip_registers<Isa, T>(b.columns, strip) * n;
    const T* const in = b.data + strip * b.depth + (column - strip);
    for (Index row = 0; row < rows; ++row) {
      V sum{};
      for (Index k = 0; k < depth; ++k) {
        const T weight = a.row(row)[k];
        if (!__builtin_signbit(weight)) sum = broadcast<V>(weight) * load<V>(in + k * stride) + sum;
      }
      T* const at = c.row(row) + column;
      store(at, finish(at, sum, row));
    }
  }
}

}  // namespace attncore
