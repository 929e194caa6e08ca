// Products of layers: y = x·Wᵀ and its gradients, one tile of the result at a time.
//
// b is packed as panels of kDepthBlock rows, a as rows of numbers; a panel's product is added to the tile's sums, which
// are rounded once, when the bias is added and heads are rotated.  An element's sums depend on its row of a and its
// column of b alone: bits do not depend on the tiles.  Items are T, or bfloat16 two by two along the depth: of an a that is
// not rotated.
#pragma once

#include "direct.h"
#include "pair_rows.h"

namespace attncore {

/// What a tile's task works in.
template <class Isa, class T, class Item>
struct ProductScratch {
  static constexpr Index n = kWidth<Isa, T>;

  Matrix<Item> a;  // (rows, kDepthBlock), or (kDepthBlock, rows) as a transposed a lies
  T* row;          // (columns)
  Item* items;     // (columns): of b, where they don't lie beside each other
  Item* pair[2];   // (rows or columns): two rows, before they are paired
  std::byte* rotated_rows;
  std::byte* turn;
  std::byte* panel;  // kDepthBlock rows of b, where they are not shared

  // A register more than the columns: rows at distances of a power of two would share a few cache sets.
  static ATTN_INLINE Index padded(Index columns) noexcept { return round_up(columns, n) + n; }

  static ATTN_INLINE Index panel_bytes(Index columns, Index depth) noexcept {
    return round_up(panel_items<Isa, Item>(columns, depth_of<T, Item>(depth)) * Index{sizeof(Item)}, 64);
  }
  static ATTN_INLINE Matrix<T> state(std::byte* memory, Index columns) noexcept {
    return {reinterpret_cast<T*>(memory), padded(columns)};
  }

  static ProductSizes sizes(const Product& p, Index rows, Index columns, Index depth) noexcept {
    Carver counted;
    (void)carve(counted, p, rows, columns);
    return {.scratch = counted.used() + panel_bytes(columns, min(depth, kDepthBlock)),
            .state = round_up(rows * padded(columns) * Index{sizeof(T)}, 64),
            .panel = panel_bytes(columns, depth)};
  }

  static ATTN_INLINE ProductScratch in(std::byte* memory, const Product& p, Index rows,
                                       Index columns) noexcept {
    Carver from(memory);
    return carve(from, p, rows, columns);
  }

 private:
  /// The panel, whose size is another matter, is what follows.
  static ATTN_INLINE ProductScratch carve(Carver& from, const Product& p, Index rows,
                                          Index columns) noexcept {
    const auto take = [&](Index bytes) { return from.take<std::byte>(round_up(bytes, 64)); };
    const auto matrix = [&](Index count, Index items) {
      const Index stride = padded(items);
      return Matrix<Item>{reinterpret_cast<Item*>(take(count * stride * Index{sizeof(Item)})), stride};
    };
    constexpr Index kHalves = kInPairs<T, Item> ? 2 : 0;
    const Index depth = depth_of<T, Item>(kDepthBlock);
    const Matrix<Item> a = p.a_transposed ? matrix(depth, rows) : matrix(rows, depth);
    T* const row = reinterpret_cast<T*>(take(padded(columns) * Index{sizeof(T)}));
    const Matrix<Item> items = matrix(1, columns), pair = matrix(kHalves, max(rows, columns));
    std::byte* const rotated_rows = take(RotatedRows<Isa, T>::bytes(p.a, p.rotate_a));
    std::byte* const turn = take(Turns<Isa, T>::bytes(p.rotate_c));
    return {a, row, items.data, {pair.row(0), pair.row(1)}, rotated_rows, turn, take(0)};
  }
};

/// Rows of b as they lie, whatever their strides.
template <class Isa, class T, class Item>
void pack_any_rows(Panel<Item> panel, const Tensor& b, Range rows, Index first_column,
                   const ProductScratch<Isa, T, Item>& scratch) noexcept {
  constexpr Index n = kWidth<Isa, Item>;
  const Range columns{first_column, first_column + panel.columns};
  Item* const row = scratch.items;
  for (Index k = 0; k < panel.depth; ++k) {
    if constexpr (kInPairs<T, Item>) {
      const Index even = rows.begin + 2 * k;
      load_paired_rows<Isa>(b, {even, min(even + 2, rows.end)}, columns, scratch.pair, row);
    } else {
      load_row<Isa, T>(b, rows.begin + k, columns, row);
    }
    for (Index i = panel.columns; i < round_up(panel.columns, n); ++i) row[i] = 0;
    for (Index strip = 0; strip < panel.columns; strip += Isa::kColumns * n) {
      const Index registers = strip_registers<Isa, Item>(panel.columns, strip);
      Item* const out = panel.data + strip * panel.depth + k * registers * n;
      for (Index j = 0; j < registers * n; j += n) store(out + j, load<Vec<Isa, Item>>(row + strip + j));
    }
  }
}

/// One depth block of some columns of b, from whole strips on.
template <class Isa, class T, class Item>
void pack_panel(const Product& p, Item* data, Range depth, Range columns,
                const ProductScratch<Isa, T, Item>& scratch) noexcept {
  const Panel<Item> panel{data, columns.size(), depth_of<T, Item>(depth.size())};
  if (!p.b_transposed && !p.b_in_place) {
    return pack_any_rows<Isa, T, Item>(panel, p.b, depth, columns.begin, scratch);
  }
  const Index dim = p.b_transposed ? depth.begin : columns.begin;
  const Index first = p.b_transposed ? columns.begin : depth.begin;
  const KeySource source{at(p.b, 0, 0, 0, dim), p.b.stride[2], p.b.stride[3], p.b.dtype};
  if (p.b_transposed) return pack_items_transposed<Isa, T>(panel, source, first, depth.size());
  pack_items<Isa, T>(panel, source, first, depth.size());
}

template <class Isa, class T, class Item>
void pack_product(const Product& p, const ProductPacking& packing, std::byte* memory) noexcept {
  const auto scratch = ProductScratch<Isa, T, Item>::in(memory, p, 0, packing.columns.size());
  const Range columns = packing.piece_columns, depth = packing.piece_depth;
  Item* const panels = reinterpret_cast<Item*>(packing.packed);
  // Where the depth block's panel begins, then where the piece's first strip does.
  const Index before =
      panel_items<Isa, Item>(packing.columns.size(), depth_of<T, Item>(depth.begin - packing.depth.begin));
  const Index strips = (columns.begin - packing.columns.begin) * depth_of<T, Item>(depth.size());
  pack_panel<Isa, T, Item>(p, panels + before + strips, depth, columns, scratch);
}

template <class Isa, class T, class Item>
class ProductTile {
 public:
  ProductTile(const Product& p, const ProductTask& task, std::byte* memory) noexcept
      : p_(p),
        task_(task),
        rows_(task.rows.size()),
        columns_(task.columns.size()),
        scratch_(ProductScratch<Isa, T, Item>::in(memory, p, rows_, columns_)),
        sums_(ProductScratch<Isa, T, Item>::state(task.state, columns_)) {}

  void run() const noexcept {
    if (task_.first && task_.depth.empty()) clear();
    RotatedRows<Isa, T> rows(p_.a, p_.rotate_a, scratch_.rotated_rows);
    for (Index k = task_.depth.begin; k < task_.depth.end; k += kDepthBlock) {
      const Range depth{k, min(k + kDepthBlock, task_.depth.end)};
      if constexpr (kInPairs<T, Item>) {
        load_pairs(depth);
      } else {
        load_numbers(rows, depth);
      }
      multiply(depth);
    }
    if (task_.last) finish();
  }

 private:
  using V = Vec<Isa, T>;
  static constexpr Index n = kWidth<Isa, T>;

  void load_numbers(RotatedRows<Isa, T>& rows, Range depth) const noexcept {
    for (Index i = 0; p_.a_transposed && i < depth.size(); ++i) {
      rows.load_row(depth.begin + i, task_.rows, scratch_.a.row(i));
    }
    for (Index i = 0; !p_.a_transposed && i < rows_; ++i) {
      rows.load_row(task_.rows.begin + i, depth, scratch_.a.row(i));
    }
  }

  void load_pairs(Range depth) const noexcept {
    for (Index k = depth.begin; p_.a_transposed && k < depth.end; k += 2) {
      load_paired_rows<Isa>(p_.a, {k, min(k + 2, depth.end)}, task_.rows, scratch_.pair,
                            scratch_.a.row((k - depth.begin) / 2));
    }
    for (Index i = 0; !p_.a_transposed && i < rows_; ++i) {
      load_bf16_row<Isa>(p_.a, task_.rows.begin + i, depth, scratch_.a.row(i));
    }
  }

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
    const Matrix<const Item> a = as_const(scratch_.a);
    const Index items = depth_of<T, Item>(depth.size());
    Item* panel = reinterpret_cast<Item*>(scratch_.panel);
    if (task_.packed != nullptr) {
      panel = reinterpret_cast<Item*>(const_cast<std::byte*>(task_.packed)) +
              panel_items<Isa, Item>(columns_, depth_of<T, Item>(depth.begin - task_.depth.begin));
    } else if (!p_.a_transposed && p_.b_transposed && rows_ <= kUnpackedRows) {
      return multiply_unpacked(a, depth, finish);
    } else {
      pack_panel<Isa, T, Item>(p_, panel, depth, task_.columns, scratch_);
    }
    const Panel<const Item> b{panel, columns_, items};
    if (p_.a_transposed) return gemm<Isa, T>(sums_, transposed(a), b, rows_, columns_, items, finish);
    gemm<Isa, T>(sums_, a, b, rows_, columns_, items, finish);
  }

  template <class Finish>
  void multiply_unpacked(Matrix<const Item> a, Range depth, Finish finish) const noexcept {
    const KeySource b = b_rows(depth);
    const auto run = [&]<DType kStorage>() {
      multiply_few_rows<Isa, T, kStorage, kUnpackedRows>(sums_, a, b, rows_, columns_, depth.size(), finish);
    };
    if constexpr (kInPairs<T, Item>) {
      run.template operator()<DType::bf16>();
    } else {
      with_storage<T>(b.storage, run);
    }
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
  ProductScratch<Isa, T, Item> scratch_;
  Matrix<T> sums_;  // (rows, columns)
};

template <class Isa, class T, class Item>
void product_task(const Product& p, const ProductTask& task, std::byte* scratch) noexcept {
  ProductTile<Isa, T, Item>(p, task, scratch).run();
}

/// The rows are summed apart, then added to the sums so far: sums of sums, as in a product.
template <class Isa, class T>
void column_sums(const Product& p, const ProductTask& task, std::byte* memory) noexcept {
  using V = Vec<Isa, T>;
  constexpr Index n = kWidth<Isa, T>;
  using Scratch = ProductScratch<Isa, T, T>;
  const Index columns = task.columns.size();
  const auto scratch = Scratch::in(memory, p, 1, columns);
  T* const sums = Scratch::state(task.state, columns).row(0);
  T* const recent = Scratch::state(task.state, columns).row(1);
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
