// Matrix products of tiles: C (rows, columns) from A (rows, depth), row by row, and a packed B (depth,
// columns).
//
// B is packed in strips of kColumns registers (panel.h), so that a product streams memory.  A block of C of
// kRows rows and one strip stays in registers for the whole depth: kRows · kColumns multiply-adds for kRows +
// kColumns loads. Every element of C is one chain of multiply-adds over the depth whatever block it falls in:
// bits do not depend on the number of rows.  A matrix unit has its own products (tile_stream.h).
#pragma once

#include "band.h"
#include "panel.h"

namespace attncore {

/// C = A·B
template <class T>
struct Stored {
  template <class V>
  ATTN_INLINE V operator()(const T* c, V sum, Index row) const noexcept {
    (void)c, (void)row;
    return sum;
  }
};

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

/// C = factor[row] · A·B, where − 0 becomes 0
template <class T>
struct ScaledRows {
  const T* factor;
  template <class V>
  ATTN_INLINE V operator()(const T* c, V sum, Index row) const noexcept {
    (void)c;
    return sum * factor[row] + T{0};
  }
};

/// C = C + A·B
template <class T>
struct Added {
  template <class V>
  ATTN_INLINE V operator()(const T* c, V sum, Index row) const noexcept {
    (void)row;
    return load<V>(c) + sum;
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

/// An A that is read by columns: element (row, k) is row k, column `row` of a row-major matrix.
template <class T>
struct Transposed {
  const T* data;
  Index stride;
};

template <class T>
ATTN_INLINE Transposed<T> transposed(Matrix<T> m) noexcept {
  return {m.data, m.stride};
}

/// kRows rows of an A from `row` on: item(i, k) is element (row + i, k).
template <class T, int kRows>
struct RowItems {
  const T* row[kRows];
  ATTN_INLINE RowItems(Matrix<const T> a, Index first) noexcept {
    for (int i = 0; i < kRows; ++i) row[i] = a.row(first + i);
  }
  ATTN_INLINE T item(int i, Index k) const noexcept { return row[i][k]; }
};

template <class T, int kRows>
struct ColumnItems {
  const T* first;
  Index stride;
  ATTN_INLINE ColumnItems(Transposed<T> a, Index row) noexcept : first(a.data + row), stride(a.stride) {}
  ATTN_INLINE T item(int i, Index k) const noexcept { return first[k * stride + i]; }
};

/// Rows that are read but once, while those so many bytes further are fetched.
template <class T>
struct Streamed {
  Matrix<const T> rows;
  Index ahead;
};
template <class T, int kRows>
struct StreamedItems {
  RowItems<T, kRows> rows;
  Index ahead;
  ATTN_INLINE T item(int i, Index k) const noexcept {
    constexpr int kRead = 0, kSecondCache = 2;
    __builtin_prefetch(reinterpret_cast<const std::byte*>(rows.row[i] + k) + ahead, kRead, kSecondCache);
    return rows.item(i, k);
  }
};

template <int kRows, class T>
ATTN_INLINE StreamedItems<T, kRows> items_of(Streamed<T> a, Index row) noexcept {
  return {{a.rows, row}, a.ahead};
}
template <int kRows, class T>
ATTN_INLINE RowItems<T, kRows> items_of(Matrix<const T> a, Index row) noexcept {
  return {a, row};
}
template <int kRows, class T>
ATTN_INLINE ColumnItems<T, kRows> items_of(Transposed<T> a, Index row) noexcept {
  return {a, row};
}

template <class T>
ATTN_INLINE Panel<const T> as_const(Panel<T> p) noexcept {
  return {p.data, p.columns, p.depth, p.stride};
}

/// The strip of so many registers that begins at column `first`, row by row.
template <class Isa, class T, class Item>
ATTN_INLINE Matrix<const Item> strip_of(Panel<const Item> b, Index first, Index registers) noexcept {
  if (b.stride != 0) return {b.data + first, b.stride};
  return {b.data + first * b.depth, registers * kWidth<Isa, T>};
}

/// What an ISA that multiplies pairs (pairs.h) specialises.
template <class Isa>
struct MultiplyPairs;

/// sum + a · b, or the sum of both products where items are pairs.
template <class Isa, class V, class Items>
ATTN_INLINE V multiply_add(Items a, Items b, V sum) noexcept {
  if constexpr (std::is_same_v<V, Items>) {
    return a * b + sum;
  } else {
    return MultiplyPairs<Isa>::add(a, b, sum);
  }
}

/// kRows × kColumns registers of C at (row, first column of the strip).  Items are T, or what multiply_add takes for it.
template <class Isa, class T, int kRows, int kColumns, class A, class Item, class Finish>
ATTN_INLINE void multiply_block(Matrix<T> c, A a, Matrix<const Item> strip, Range depth, Index row,
                                Finish finish) noexcept {
  using V = Vec<Isa, T>;
  using Items = Vec<Isa, Item>;
  constexpr int n = kWidth<Isa, T>;
  V sum[kRows][kColumns]{};
  const auto rows = items_of<kRows>(a, row);
  for (Index k = depth.begin; k < depth.end; ++k) {
    Items b[kColumns];
    for (int j = 0; j < kColumns; ++j) b[j] = load<Items>(strip.row(k) + j * n);
    for (int i = 0; i < kRows; ++i) {
      const Items x = broadcast<Items>(rows.item(i, k));
      for (int j = 0; j < kColumns; ++j) sum[i][j] = multiply_add<Isa>(x, b[j], sum[i][j]);
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
template <class Isa, class T, int kRows, int kColumns, class A, class Item, class Finish>
ATTN_INLINE void multiply_rest(Matrix<T> c, A a, Matrix<const Item> strip, Range depth, Range rows,
                               Finish finish) noexcept {
  if constexpr (kRows > 0) {
    if (rows.size() == kRows) {
      return multiply_block<Isa, T, kRows, kColumns>(c, a, strip, depth, rows.begin, finish);
    }
    multiply_rest<Isa, T, kRows - 1, kColumns>(c, a, strip, depth, rows, finish);
  }
}

/// Some rows of a strip of kColumns registers.
template <class Isa, class T, int kColumns, class A, class Item, class Finish, class Extents>
void multiply_strip(Matrix<T> c, A a, Matrix<const Item> strip, Range rows, Index depth, Finish finish,
                    Extents extents) noexcept {
  for (; rows.begin + Isa::kRows <= rows.end; rows.begin += Isa::kRows) {
    const Range some = extents.depth({rows.begin, rows.begin + Isa::kRows}, depth);
    multiply_block<Isa, T, Isa::kRows, kColumns>(c, a, strip, some, rows.begin, finish);
  }
  if (rows.empty()) return;
  multiply_rest<Isa, T, Isa::kRows - 1, kColumns>(c, a, strip, extents.depth(rows, depth), rows, finish);
}

/// A strip of `registers` ≤ kColumns registers.
template <class Isa, class T, int kColumns, class A, class Item, class Finish, class Extents>
ATTN_INLINE void multiply_any_strip(Index registers, Matrix<T> c, A a, Matrix<const Item> strip, Range rows,
                                    Index depth, Finish finish, Extents extents) noexcept {
  if (registers == kColumns) {
    return multiply_strip<Isa, T, kColumns>(c, a, strip, rows, depth, finish, extents);
  }
  if constexpr (kColumns > 1) {
    multiply_any_strip<Isa, T, kColumns - 1>(registers, c, a, strip, rows, depth, finish, extents);
  }
}

/// C (rows, columns) from A (rows, depth) and the first `depth` rows of the panel; whole strips are computed,
/// so that C needs room for the panel's columns and their padding.  What `extents` leaves out of C is not written, what it leaves
/// out of the depth must be 0 in A.
template <class Isa, class T, class A, class Item, class Finish, class Extents = Everything>
void gemm(Matrix<T> c, A a, Panel<const Item> b, Index rows, Index columns, Index depth, Finish finish,
          Extents extents = {}) noexcept {
  constexpr Index n = kWidth<Isa, T>;
  for (Index strip = 0; strip < columns; strip += Isa::kColumns * n) {
    const Index registers = strip_registers<Isa, T>(b.columns, strip);
    const Range seeing = extents.rows({strip, strip + registers * n}, rows);
    multiply_any_strip<Isa, T, Isa::kColumns>(registers, {c.data + strip, c.stride}, a,
                                              strip_of<Isa, T>(b, strip, registers), seeing, depth, finish,
                                              extents);
  }
}

/// What A holds for a pair of query and key that do not see each other; nothing else is −0.
template <class T>
ATTN_INLINE bool is_hidden_mark(T weight) noexcept {
  return weight == 0 && __builtin_signbit(weight);
}

/// sum + weight · values, unless the weight marks a hidden pair; pairs.h specialises it.
template <class Isa, class T>
struct VisibleTerm {
  static ATTN_INLINE Vec<Isa, T> add(T weight, Vec<Isa, T> values, Vec<Isa, T> sum) noexcept {
    return is_hidden_mark(weight) ? sum : broadcast<Vec<Isa, T>>(weight) * values + sum;
  }
};

/// gemm without the terms of hidden pairs: for a B that holds Inf or NaN, since in any multiply-add 0 · NaN is NaN.
/// The same sums in the same order as gemm: what is left out is ± 0 there.
template <class Isa, class T, class A, class Item, class Finish>
void gemm_of_visible(Matrix<T> c, A a, Panel<const Item> b, Index rows, Index depth, Finish finish) noexcept {
  using V = Vec<Isa, T>;
  constexpr Index n = kWidth<Isa, T>;
  for (Index column = 0; column < b.columns; column += n) {
    const Index strip = column - column % (Isa::kColumns * n);
    const Matrix<const Item> in = strip_of<Isa, T>(b, strip, strip_registers<Isa, T>(b.columns, strip));
    for (Index row = 0; row < rows; ++row) {
      V sum{};
      const auto items = items_of<1>(a, row);
      for (Index k = 0; k < depth; ++k) {
        sum = VisibleTerm<Isa, Item>::add(items.item(0, k),
                                          load<Vec<Isa, Item>>(in.row(k) + (column - strip)), sum);
      }
      T* const at = c.row(row) + column;
      store(at, finish(at, sum, row));
    }
  }
}

}  // namespace attncore
