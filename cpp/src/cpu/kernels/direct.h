// Products of few rows with a transposed matrix, without packing it.
#pragma once

#include "task.h"

namespace attncore {

inline constexpr int kUnpackedRows = 8;  // up to here, b is not packed: it would be used but once

/// So many items of a row, but at most a register's, along a product's depth; the rest is 0.
template <class Isa, class T, class Item, DType kStorage>
ATTN_INLINE Vec<Isa, Item> load_depth(const std::byte* p, Index stride, Index count) noexcept {
  if constexpr (kInPairs<T, Item>) {
    return load_pairs<Isa, kStorage>(p, stride, count);
  } else {
    return load_items<Isa, T, kStorage>(p, stride, min(kWidth<Isa, T>, count));
  }
}

/// The same of a whole register, items beside each other.
template <class Isa, class T, class Item, DType kStorage>
ATTN_INLINE Vec<Isa, Item> load_depth(const std::byte* p) noexcept {
  if constexpr (kInPairs<T, Item>) {
    return LoadPairs<Isa, kStorage>::load(p);
  } else {
    return Widen<Isa, T, kStorage>::load(p);
  }
}

/// kRows rows of C over a register of columns, straight from b where it lies transposed: squares become columns in
/// registers.  The same sums in the same order as gemm's.
template <class Isa, class T, DType kStorage, int kRows, class Item, class Finish>
ATTN_INLINE void multiply_register(Matrix<T> c, Matrix<const Item> a, const KeySource& b, Index columns,
                                   Index dims, Finish finish) noexcept {
  using V = Vec<Isa, T>;
  using Items = Vec<Isa, Item>;
  constexpr Index n = kWidth<Isa, Item>;
  constexpr Index kAhead =
      512;  // bytes: a row of b is one stream of many, too many for the hardware to follow
  constexpr Index kDims = kNumbers<T, Item>;
  const Index depth = depth_of<T, Item>(dims);
  V sum[kRows]{};
  const auto add_square = [&](Index k, Index given, auto load_row) {
    Items square[n];
    for (Index i = 0; i < n; ++i) {
      const std::byte* const p = b.data + i * b.token_stride + k * kDims * b.dim_stride;
      __builtin_prefetch(p + kAhead, 0, 2);
      square[i] = load_row(p, i);
    }
    transpose<Isa, Item>(square);
    for (Index i = 0; i < given; ++i) {
      for (int row = 0; row < kRows; ++row) {
        sum[row] = multiply_add<Isa>(broadcast<Items>(a.row(row)[k + i]), square[i], sum[row]);
      }
    }
  };
  Index k = 0;
  if (columns >= n && b.dim_stride == Index{sizeof(typename Storage<kStorage>::Item)}) {
    for (; (k + n) * kDims <= dims; k += n)
      add_square(k, n, [](const std::byte* p, Index) { return load_depth<Isa, T, Item, kStorage>(p); });
  }
  for (; k < depth; k += n) {
    add_square(k, min(n, depth - k), [&](const std::byte* p, Index i) {
      const Index given = i < columns ? dims - k * kDims : 0;
      return load_depth<Isa, T, Item, kStorage>(p, b.dim_stride, given);
    });
  }
  for (int row = 0; row < kRows; ++row) store(c.row(row), finish(c.row(row), sum[row], row));
}

template <class Isa, class T, DType kStorage, int kRows, class Item, class Finish>
void multiply_few_rows(Matrix<T> c, Matrix<const Item> a, const KeySource& b, Index rows, Index columns,
                       Index dims, Finish finish) noexcept {
  if (rows < kRows) {
    if constexpr (kRows > 1) {
      multiply_few_rows<Isa, T, kStorage, kRows - 1>(c, a, b, rows, columns, dims, finish);
    }
    return;
  }
  for (Index column = 0; column < columns; column += kWidth<Isa, T>) {
    const KeySource from{b.data + column * b.token_stride, b.token_stride, b.dim_stride, b.storage};
    multiply_register<Isa, T, kStorage, kRows>({c.data + column, c.stride}, a, from, columns - column, dims,
                                               finish);
  }
}

}  // namespace attncore
