// Products of layers: y = x·Wᵀ and its gradients, one tile of the result at a time.
//
// b is packed as panels of kDepthBlock rows, a as rows of numbers; a panel's product is added to the tile's sums, which
// are rounded once, when the bias is added and heads are rotated.  An element's sums depend on its row of a and its
// column of b alone: bits do not depend on the tiles.
#pragma once

#include "direct.h"
#include "rotate.h"

namespace attncore {

/// What a tile's task works in.
template <class Isa, class T>
struct ProductScratch {
  static constexpr Index n = kWidth<Isa, T>;

  Matrix<T> a;  // (rows, kDepthBlock), or (kDepthBlock, rows) as a transposed a lies
  T* row;       // (columns)
  std::byte* rotated_rows;
  std::byte* turn;
  std::byte* panel;  // kDepthBlock rows of b, where they are not shared

  // A register more than the columns: rows at distances of a power of two would share a few cache sets.
  static ATTN_INLINE Index padded(Index columns) noexcept { return round_up(columns, n) + n; }

  static ATTN_INLINE Index panel_bytes(Index columns, Index depth) noexcept {
    return round_up(panel_items<Isa, T>(columns, depth) * Index{sizeof(T)}, 64);
  }
  static ATTN_INLINE Matrix<T> state(std::byte* memory, Index columns) noexcept {
    return {reinterpret_cast<T*>(memory), padded(columns)};
  }

  static ProductSizes sizes(const Product& p, Index rows, Index columns, Index depth) noexcept {
    Index bytes = 0;
    carve(nullptr, bytes, p, rows, columns);
    return {.scratch = bytes + panel_bytes(columns, min(depth, kDepthBlock)),
            .state = round_up(rows * padded(columns) * Index{sizeof(T)}, 64),
            .panel = panel_bytes(columns, depth)};
  }

  static ATTN_INLINE ProductScratch in(std::byte* memory, const Product& p, Index rows,
                                       Index columns) noexcept {
    Index bytes = 0;
    return carve(memory, bytes, p, rows, columns);
  }

 private:
  /// Without memory, only counts the bytes before the panel.
  static ATTN_INLINE ProductScratch carve(std::byte* memory, Index& used, const Product& p, Index rows,
                                          Index columns) noexcept {
    const auto take = [&](Index bytes) {
      std::byte* const taken = memory != nullptr ? memory + used : nullptr;
      used += round_up(bytes, 64);
      return taken;
    };
    const auto matrix = [&](Index count, Index items) {
      const Index stride = padded(items);
      return Matrix<T>{reinterpret_cast<T*>(take(count * stride * Index{sizeof(T)})), stride};
    };
    const Matrix<T> a = p.a_transposed ? matrix(kDepthBlock, rows) : matrix(rows, kDepthBlock);
    const Matrix<T> row = matrix(1, columns);
    std::byte* const rotated_rows = take(RotatedRows<Isa, T>::bytes(p.a, p.rotate_a));
    std::byte* const turn = take(Turns<Isa, T>::bytes(p.rotate_c));
    return {a, row.data, rotated_rows, turn, take(0)};
  }
};

/// Rows of b as they lie, whatever their strides: `row` is room for one.
template <class Isa, class T>
void pack_any_rows(Panel<T> panel, const Tensor& b, Index first_row, Index first_column, T* row) noexcept {
  constexpr Index n = kWidth<Isa, T>;
  for (Index k = 0; k < panel.depth; ++k) {
    load_row<Isa, T>(b, first_row + k, {first_column, first_column + panel.columns}, row);
    for (Index i = panel.columns; i < round_up(panel.columns, n); ++i) row[i] = 0;
    for (Index strip = 0; strip < panel.columns; strip += Isa::kColumns * n) {
      const Index registers = strip_registers<Isa, T>(panel.columns, strip);
      T* const out = panel.data + strip * panel.depth + k * registers * n;
      for (Index j = 0; j < registers * n; j += n) store(out + j, load<Vec<Isa, T>>(row + strip + j));
    }
  }
}

/// One depth block of some columns of b, from whole strips on.
template <class Isa, class T>
void pack_panel(const Product& p, Panel<T> panel, Index first_row, Index first_column, T* row) noexcept {
  if (!p.b_transposed && !p.b_in_place) {
    return pack_any_rows<Isa, T>(panel, p.b, first_row, first_column, row);
  }
  const Index dim = p.b_transposed ? first_row : first_column;
  const KeySource source{at(p.b, 0, 0, 0, dim), p.b.stride[2], p.b.stride[3], p.b.dtype};
  if (p.b_transposed) {
    pack_transposed<Isa, T>(panel, source, first_column);
  } else {
    pack_rows<Isa, T>(panel, source, first_row);
  }
}

template <class Isa, class T>
void pack_product(const Product& p, const ProductPacking& packing, std::byte* memory) noexcept {
  const auto scratch = ProductScratch<Isa, T>::in(memory, p, 0, packing.columns.size());
  const Range columns = packing.piece_columns, depth = packing.piece_depth;
  T* const panels = reinterpret_cast<T*>(packing.packed);
  // Where the depth block's panel begins, then where the piece's first strip does.
  const Index before = panel_items<Isa, T>(packing.columns.size(), depth.begin - packing.depth.begin);
  const Index strips = (columns.begin - packing.columns.begin) * depth.size();
  pack_panel<Isa, T>(p, Panel<T>{panels + before + strips, columns.size(), depth.size()}, depth.begin,
                     columns.begin, scratch.row);
}

template <class Isa, class T>
class ProductTile {
 public:
  ProductTile(const Product& p, const ProductTask& task, std::byte* memory) noexcept
      : p_(p),
        task_(task),
        rows_(task.rows.size()),
        columns_(task.columns.size()),
        scratch_(ProductScratch<Isa, T>::in(memory, p, rows_, columns_)),
        sums_(ProductScratch<Isa, T>::state(task.state, columns_)) {}

  void run() const noexcept {
    if (task_.first && task_.depth.empty()) clear();
    RotatedRows<Isa, T> rows(p_.a, p_.rotate_a, scratch_.rotated_rows);
    for (Index k = task_.depth.begin; k < task_.depth.end; k += kDepthBlock) {
      const Range depth{k, min(k + kDepthBlock, task_.depth.end)};
      if (p_.a_transposed) {
        for (Index i = 0; i < depth.size(); ++i) rows.load_row(k + i, task_.rows, scratch_.a.row(i));
      } else {
        for (Index row = 0; row < rows_; ++row)
          rows.load_row(task_.rows.begin + row, depth, scratch_.a.row(row));
      }
      multiply(depth);
    }
    if (task_.last) finish();
  }

 private:
  using V = Vec<Isa, T>;
  static constexpr Index n = kWidth<Isa, T>;

  void clear() const noexcept {
    for (Index row = 0; row < rows_; ++row) {
      for (Index i = 0; i < columns_; i += n) store(sums_.row(row) + i, V{});
    }
  }

  void multiply(Range depth) const noexcept {
    if (task_.first && depth.begin == task_.depth.begin) {
      multiply(depth, Stored<T>{});
    } else {
      multiply(depth, Added<T>{});
    }
  }

  template <class Finish>
  void multiply(Range depth, Finish finish) const noexcept {
    const Matrix<const T> a = as_const(scratch_.a);
    T* panel = reinterpret_cast<T*>(scratch_.panel);
    if (task_.packed != nullptr) {
      panel = reinterpret_cast<T*>(const_cast<std::byte*>(task_.packed)) +
              panel_items<Isa, T>(columns_, depth.begin - task_.depth.begin);
    } else if (!p_.a_transposed && p_.b_transposed && rows_ <= kUnpackedRows) {
      const KeySource b = b_rows(depth);
      return with_storage<T>(b.storage, [&]<DType kStorage>() {
        multiply_few_rows<Isa, T, kStorage, kUnpackedRows>(sums_, a, b, rows_, columns_, depth.size(),
                                                           finish);
      });
    } else {
      pack_panel<Isa, T>(p_, Panel<T>{panel, columns_, depth.size()}, depth.begin, task_.columns.begin,
                         scratch_.row);
    }
    const Panel<const T> b{panel, columns_, depth.size()};
    if (p_.a_transposed) return gemm<Isa, T>(sums_, transposed(a), b, rows_, columns_, depth.size(), finish);
    gemm<Isa, T>(sums_, a, b, rows_, columns_, depth.size(), finish);
  }

  [[nodiscard]] KeySource b_rows(Range depth) const noexcept {
    const Tensor& b = p_.b;
    return {at(b, 0, 0, task_.columns.begin, depth.begin), b.stride[2], b.stride[3], b.dtype};
  }

  void finish() const noexcept {
    if (p_.bias.given()) load_row<Isa, T>(p_.bias, 0, task_.columns, scratch_.row);
    Turns<Isa, T> turn(p_.rotate_c, scratch_.turn);
    for (Index row = 0; row < rows_; ++row) {
      T* const sums = sums_.row(row);
      for (Index i = 0; p_.bias.given() && i < columns_; i += n) {
        store(sums + i, load<V>(sums + i) + load<V>(scratch_.row + i));
      }
      if (p_.rotate_c.given()) {
        const RowAt where = RowAt::of(p_.c, task_.rows.begin + row);
        turn.set_position(p_.rotate_c.position(where.batch, where.token));
        for (Index head = 0; head < columns_; head += p_.c.shape[3]) turn.rotate(sums + head);
      }
      store_row<Isa, T>(p_.c, task_.rows.begin + row, task_.columns, sums);
    }
  }

  const Product& p_;
  const ProductTask& task_;
  Index rows_, columns_;
  ProductScratch<Isa, T> scratch_;
  Matrix<T> sums_;  // (rows, columns)
};

template <class Isa, class T>
void product_task(const Product& p, const ProductTask& task, std::byte* scratch) noexcept {
  ProductTile<Isa, T>(p, task, scratch).run();
}

/// The rows are summed apart, then added to the sums so far: sums of sums, as in a product.
template <class Isa, class T>
void column_sums(const Product& p, const ProductTask& task, std::byte* memory) noexcept {
  using V = Vec<Isa, T>;
  constexpr Index n = kWidth<Isa, T>;
  const Index columns = task.columns.size();
  const auto scratch = ProductScratch<Isa, T>::in(memory, p, 1, columns);
  T* const sums = ProductScratch<Isa, T>::state(task.state, columns).row(0);
  T* const recent = ProductScratch<Isa, T>::state(task.state, columns).row(1);
  RotatedRows<Isa, T> rows(p.a, p.rotate_a, scratch.rotated_rows);
  for (Index i = 0; i < columns; i += n) {
    if (task.first) store(sums + i, V{});
    store(recent + i, V{});
  }
  for (Index row = task.rows.begin; row < task.rows.end; ++row) {
    rows.load_row(row, task.columns, scratch.row);
    for (Index i = 0; i < columns; i += n) {
      store(recent + i, load<V>(recent + i) + load<V>(scratch.row + i));
    }
  }
  for (Index i = 0; i < columns; i += n) store(sums + i, load<V>(sums + i) + load<V>(recent + i));
  if (task.last) store_row<Isa, T>(p.c, 0, task.columns, sums);
}

}  // namespace attncore
