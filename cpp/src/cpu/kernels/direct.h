// Products of few rows straight from a matrix where it lies, without packing it: it is read but once, so that memory is
// what takes the time.  Every element is the same chain of multiply-adds as gemm's on packed panels: bits do not depend on
// which of the two a task takes.
#pragma once

#include "../tile/gemm.h"

namespace attncore {

inline constexpr Index kDirectRows = 8;  // up to here, packing costs more than it saves

/// Whether a source's rows can be loaded as they lie.
template <class T>
ATTN_INLINE bool is_direct(const KeySource& source) noexcept {
  if (sizeof(T) == 8 && source.storage != DType::f64) return false;
  return with_key_storage<T>(source.storage, [&]<DType kStorage>() {
    return source.dim_stride == Index{sizeof(typename Storage<kStorage>::Item)};
  });
}

template <class T, class Run>
ATTN_INLINE void with_direct_storage(DType dtype, Run run) noexcept {
  if constexpr (sizeof(T) == 8) {
    run.template operator()<DType::f64>();
  } else {
    with_key_storage<T>(dtype, run);
  }
}

/// run.template operator()<kRows>() for the least of 1, 2, 4 and 8 that holds `rows`: the rows past them are copies of the
/// last.
template <class Run>
ATTN_INLINE decltype(auto) with_rows(Index rows, Run run) noexcept {
  if (rows == 1) return run.template operator()<1>();
  if (rows == 2) return run.template operator()<2>();
  if (rows <= 4) return run.template operator()<4>();
  return run.template operator()<8>();
}

template <class T, int kRows>
struct FewRows {
  const T* row[kRows];
  ATTN_INLINE FewRows(Matrix<const T> a, Index rows) noexcept {
    for (Index i = 0; i < kRows; ++i) row[i] = a.row(min(i, rows - 1));
  }
};

/// kRows rows of C over a register of columns; b's rows first … first + columns − 1 are C's columns.  Squares of registers
/// are transposed, in lanes as wide as T that may hold several items; fetch(row of b, byte) is called for each that is
/// loaded.
template <class Isa, class T, DType kStorage, int kRows, class Finish, class Fetch>
ATTN_INLINE void multiply_register(Matrix<T> c, Matrix<const T> a, const KeySource& b, Index first,
                                   Index rows, Index columns, Index depth, Finish finish,
                                   Fetch fetch) noexcept {
  using V = Vec<Isa, T>;
  using Lane = InLane<Isa, T, kStorage>;
  constexpr Index n = kWidth<Isa, T>;
  const std::byte* in[n];
  for (Index i = 0; i < n; ++i) in[i] = b.token(first + min(i, columns - 1));
  const FewRows<T, kRows> at(a, rows);
  V sum[kRows]{};
  const auto add = [&](V items, Index k) {
    for (int row = 0; row < kRows; ++row) sum[row] = broadcast<V>(at.row[row][k]) * items + sum[row];
  };
  for (Index k = 0; k < depth; k += n * Lane::kItems) {
    const Index offset = item_offset<kStorage>(k, sizeof(typename Storage<kStorage>::Item));
    const Index bytes =
        min(Isa::kBytes, item_offset<kStorage>(depth, sizeof(typename Storage<kStorage>::Item)) - offset);
    V square[n];
    for (Index i = 0; i < n; ++i) {
      square[i] = Lane::load(in[i] + offset, bytes);
      fetch(i, offset);
    }
    transpose<Isa, T>(square);
    if (bytes == Isa::kBytes) {
      for (Index i = 0; i < n; ++i) {
        for (int item = 0; item < Lane::kItems; ++item)
          add(Lane::item(square[i], item), k + i * Lane::kItems + item);
      }
    } else {
      for (Index i = 0; i < depth - k; ++i)
        add(Lane::item(square[i / Lane::kItems], i % Lane::kItems), k + i);
    }
  }
  for (Index row = 0; row < rows; ++row) store(c.row(row), finish(c.row(row), sum[row], row));
}

/// C (rows, columns) = A (rows, depth) · Bᵀ with B's rows from `first` on; at most kDirectRows rows.
template <class Isa, class T, class Finish, class Fetch>
void multiply_few_rows(Matrix<T> c, Matrix<const T> a, const KeySource& b, Index first, Index rows,
                       Index columns, Index depth, Finish finish, Fetch fetch) noexcept {
  with_direct_storage<T>(b.storage, [&]<DType kStorage>() {
    with_rows(rows, [&]<int kRows>() {
      for (Index column = 0; column < columns; column += kWidth<Isa, T>) {
        multiply_register<Isa, T, kStorage, kRows>(
            {c.data + column, c.stride}, a, b, first + column, rows, min(kWidth<Isa, T>, columns - column),
            depth, finish, [&](Index row, Index byte) { fetch(first + column + row, byte); });
      }
    });
  });
}

/// kRows × kColumns registers of C, the last of which has `last` items: Σ over b's rows.  False where a sum is not finite:
/// nothing is stored then.
template <class Isa, class T, DType kStorage, int kRows, int kColumns, class Finish, class Fetch>
ATTN_INLINE bool add_strip(Matrix<T> c, Matrix<const T> a, const KeySource& b, Range from, Index column,
                           Index rows, Index last, Finish finish, Fetch fetch) noexcept {
  using V = Vec<Isa, T>;
  constexpr Index n = kWidth<Isa, T>, kItem = sizeof(typename Storage<kStorage>::Item);
  const FewRows<T, kRows> at(a, rows);
  const Index offset = item_offset<kStorage>(column, kItem);
  V sum[kRows][kColumns]{};
  for (Index k = 0; k < from.size(); ++k) {
    const std::byte* const in = b.token(from.begin + k) + offset;
    V items[kColumns];
    for (int j = 0; j < kColumns; ++j) {
      const std::byte* const p = in + item_offset<kStorage>(j * n, kItem);
      items[j] = j + 1 == kColumns && last < n ? load_items<Isa, T, kStorage>(p, kItem, last)
                                               : Widen<Isa, T, kStorage>::load(p);
    }
    fetch(from.begin + k, offset);
    for (int row = 0; row < kRows; ++row) {
      const V x = broadcast<V>(at.row[row][k]);
      for (int j = 0; j < kColumns; ++j) sum[row][j] = x * items[j] + sum[row][j];
    }
  }
  V zero{};  // or NaN
  for (int row = 0; row < kRows; ++row) {
    for (int j = 0; j < kColumns; ++j) zero += sum[row][j] * T{0};
  }
  if (horizontal_sum<Isa, T>(zero) != 0) return false;
  for (Index row = 0; row < rows; ++row) {
    for (int j = 0; j < kColumns; ++j) {
      T* const out = c.row(row) + column + j * n;
      store(out, finish(out, sum[row][j], row));
    }
  }
  return true;
}

/// A register of columns, without the terms of hidden pairs (gemm_of_visible).
template <class Isa, class T, DType kStorage, class Finish>
void add_visible(Matrix<T> c, Matrix<const T> a, const KeySource& b, Range from, Index column, Index rows,
                 Index last, Finish finish) noexcept {
  using V = Vec<Isa, T>;
  constexpr Index kItem = sizeof(typename Storage<kStorage>::Item);
  for (Index row = 0; row < rows; ++row) {
    V sum{};
    for (Index k = 0; k < from.size(); ++k) {
      const T weight = a.row(row)[k];
      if (is_hidden_mark(weight)) continue;
      const std::byte* const p = b.token(from.begin + k) + item_offset<kStorage>(column, kItem);
      sum = broadcast<V>(weight) * load_items<Isa, T, kStorage>(p, kItem, last) + sum;
    }
    T* const out = c.row(row) + column;
    store(out, finish(out, sum, row));
  }
}

/// C (rows, columns) = finish(C, A (rows, keys) · B) with B's rows `from`; at most kDirectRows rows.  Hidden pairs are
/// marked in A.
template <class Isa, class T, class Finish, class Fetch>
void add_few_rows(Matrix<T> c, Matrix<const T> a, const KeySource& b, Range from, Index rows, Index columns,
                  Finish finish, Fetch fetch) noexcept {
  constexpr Index n = kWidth<Isa, T>;
  with_direct_storage<T>(b.storage, [&]<DType kStorage>() {
    with_rows(rows, [&]<int kRows>() {
      constexpr int kColumns = max(1, min(8, Isa::kRows * Isa::kColumns / kRows));
      Index column = 0;
      const auto add = [&]<int kRegisters>() {
        const Index last = min(n, columns - column - (kRegisters - 1) * n);
        if (add_strip<Isa, T, kStorage, kRows, kRegisters>(c, a, b, from, column, rows, last, finish,
                                                           fetch)) {
          column += kRegisters * n;
          return;
        }
        for (int j = 0; j < kRegisters; ++j, column += n) {
          add_visible<Isa, T, kStorage>(c, a, b, from, column, rows, min(n, columns - column), finish);
        }
      };
      while (ceil_div(columns - column, n) >= kColumns) add.template operator()<kColumns>();
      while (column < columns) add.template operator()<1>();
    });
  });
}

}  // namespace attncore
