// Products of a matrix unit, AMX's or a test's: its registers are tiles of 16 rows of 64 bytes, float32 sums or bfloat16 pairs.
//
// B's panels of pairs (pairs.h) are what the unit reads: a row of a tile is 16 columns at one depth, and the next row stands a
// strip's registers further.  Their depth is a multiple of 16, zeros at the end.  A is read where it lies, or, where it has
// fewer rows or pairs than a tile, copied beside zeros.  Four sums stay in the unit for the whole depth:
//
//                B0    B1
//         A0    S00   S01        16 pairs deeper: four loads, four products
//         A1    S10   S11
//
// and are finished through 4 KB of memory, which the first cache holds.
//
// Items that are split (parts.h) are multiplied part by part, the small products of the whole depth before the large ones, so
// that sums grow large but at the end.  Of 16 pairs of 3 parts each product loads what the one before had not, two tiles:
//
//         A2 B0 ·   A1 ·   B1 ·   A0 ·   B2 ·   …   16 pairs deeper;   then  A0 B0 ·   16 pairs deeper
//
// In each product of 16 pairs (TDPBF16PS, as Intel's manual has it) the first halves' products are one chain of multiply-adds from 0
// and the second halves' another, both are added, and that is added to the sum; subnormal numbers are 0 everywhere.  An
// element's bits depend on its row and its column alone.
#pragma once

#include "parts.h"

namespace attncore {

// TileUnit<Isa> has eight registers, numbered at compile time:
//   configure(rows): from now to release() and in this thread, registers 0, 1 and 4 have the first 16 of up to 32 rows, 2, 3 and 5 the
//     rest, where there is a rest; all others, and without `rows` all, 16 rows; of 64 bytes each
//   zero<i>(), load<i>(p, stride), store<i>(p, stride): rows stand `stride` bytes apart
//   multiply<sum, a, b>(): sum += a · b

inline constexpr Index kTileRows = 16, kTileColumns = 16;

/// What a 2 × 2 block goes through.
struct TileBuffers {
  alignas(64) float sums[2 * kTileRows][2 * kTileColumns];
  alignas(64) Bf16Pair a[2][kTileRows * kTileDepth];
};

/// 16 rows × 16 pairs.
struct PairTile {
  const Bf16Pair* at;
  Index stride;
};

/// Those of A at (row, k); what A (rows, depth) has not is 0.
template <class Isa>
ATTN_INLINE PairTile tile_of(Matrix<const Bf16Pair> a, Index rows, Index depth, Index row, Index k,
                             Bf16Pair* room) noexcept {
  if (row + kTileRows <= rows && k + kTileDepth <= depth) return {a.row(row) + k, a.stride};
  constexpr Index kHalf = sizeof(Bf16Pair) / 2;
  for (Index i = 0; i < kTileRows; ++i) {
    const Index halves = row + i < rows ? 2 * (depth - k) : 0;
    const auto* const in = reinterpret_cast<const std::byte*>(a.row(min(row + i, rows - 1)) + k);
    store(room + i * kTileDepth, load_pairs<Isa, DType::bf16>(in, kHalf, halves));
  }
  return {room, kTileDepth};
}

template <class Isa, int kTile>
ATTN_INLINE void load_tile(PairTile tile) noexcept {
  TileUnit<Isa>::template load<kTile>(tile.at, tile.stride * Index{sizeof(Bf16Pair)});
}

/// A block of products: A (rows, depth) from `row` on, and a strip's columns.
struct TileBlock {
  Matrix<const Bf16Pair> a;
  PairTile b;
  Index rows, depth, row;
};

/// Sums += A · B of 16 pairs, at `a` and `b` of their depths; loads one or both.
template <class Isa, bool kTall, bool kWide, bool kLoadA, bool kLoadB>
ATTN_INLINE void multiply_step(const TileBlock& block, Index a, Index b, TileBuffers& buffers) noexcept {
  using Unit = TileUnit<Isa>;
  const auto load_a = [&]<int kTile>(Index row, Bf16Pair* room) {
    if constexpr (kLoadA) load_tile<Isa, kTile>(tile_of<Isa>(block.a, block.rows, block.depth, row, a, room));
  };
  const Bf16Pair* const columns = block.b.at + b * block.b.stride;
  load_a.template operator()<4>(block.row, buffers.a[0]);
  if constexpr (kLoadB) load_tile<Isa, 6>({columns, block.b.stride});
  Unit::template multiply<0, 4, 6>();
  if constexpr (kTall) {
    load_a.template operator()<5>(block.row + kTileRows, buffers.a[1]);
    Unit::template multiply<2, 5, 6>();
  }
  if constexpr (kWide) {
    if constexpr (kLoadB) load_tile<Isa, 7>({columns + kTileColumns, block.b.stride});
    Unit::template multiply<1, 4, 7>();
  }
  if constexpr (kTall && kWide) Unit::template multiply<3, 5, 7>();
}

/// step.template operator()<kLoadA, kLoadB>(a, b, begins) for A's and B's places in one of kSmallProducts; the first one begins.
template <class Item, std::size_t kAt, class Step>
ATTN_INLINE void small_product(Index k, Step& step) noexcept {
  constexpr auto kAll = kSmallProducts<Item>;
  constexpr PartPair kNow = kAll[kAt], kBefore = kAt > 0 ? kAll[kAt - 1] : PartPair{-1, -1};
  step.template operator()<kNow.a != kBefore.a, kNow.b != kBefore.b>(
      k + kNow.a * kTileDepth, k + kNow.b * kTileDepth, kAt == 0 && k == 0);
}

/// The same for all products, in their order.
template <class Item, class Step, std::size_t... i>
ATTN_INLINE void each_product(Index depth, Step& step, std::index_sequence<i...>) noexcept {
  constexpr int n = kParts<Item>;
  if constexpr (n > 1) {
    for (Index k = 0; k < depth; k += n * kTileDepth) (small_product<Item, i>(k, step), ...);
  }
  for (Index k = 0; k < depth; k += n * kTileDepth)
    step.template operator()<true, true>(k, k, n == 1 && k == 0);
}
template <class Item, class Step>
ATTN_INLINE void each_product(Index depth, Step step) noexcept {
  each_product<Item>(depth, step, std::make_index_sequence<kSmallProducts<Item>.size()>{});
}

/// kRowTiles × kColumnTiles tiles of sums, A · B, into `buffers`.
template <class Isa, class Item, int kRowTiles, int kColumnTiles>
ATTN_INLINE void multiply_tiles(const TileBlock& block, TileBuffers& buffers) noexcept {
  using Unit = TileUnit<Isa>;
  constexpr bool kTall = kRowTiles == 2, kWide = kColumnTiles == 2;
  Unit::template zero<0>();
  if constexpr (kWide) Unit::template zero<1>();
  if constexpr (kTall) Unit::template zero<2>();
  if constexpr (kTall && kWide) Unit::template zero<3>();
  each_product<Item>(block.depth, [&]<bool kLoadA, bool kLoadB>(Index a, Index b, bool) {
    multiply_step<Isa, kTall, kWide, kLoadA, kLoadB>(block, a, b, buffers);
  });
  constexpr Index kStride = sizeof buffers.sums[0];
  Unit::template store<0>(&buffers.sums[0][0], kStride);
  if constexpr (kWide) Unit::template store<1>(&buffers.sums[0][kTileColumns], kStride);
  if constexpr (kTall) Unit::template store<2>(&buffers.sums[kTileRows][0], kStride);
  if constexpr (kTall && kWide) Unit::template store<3>(&buffers.sums[kTileRows][kTileColumns], kStride);
}

/// The same, finished: C's rows from the block's on, and the columns of `registers` registers from c's first one on.
template <class Isa, class Item, class T, class Finish>
void multiply_tile_block(Matrix<T> c, const TileBlock& block, Index registers, TileBuffers& buffers,
                         Finish finish) noexcept {
  using V = Vec<Isa, T>;
  const Index given = min(2 * kTileRows, block.rows - block.row);
  const bool tall = given > kTileRows, wide = registers > 1;
  if (tall && wide) {
    multiply_tiles<Isa, Item, 2, 2>(block, buffers);
  } else if (tall) {
    multiply_tiles<Isa, Item, 2, 1>(block, buffers);
  } else if (wide) {
    multiply_tiles<Isa, Item, 1, 2>(block, buffers);
  } else {
    multiply_tiles<Isa, Item, 1, 1>(block, buffers);
  }
  for (Index i = 0; i < given; ++i) {
    for (Index j = 0; j < registers; ++j) {
      T* const at = c.row(block.row + i) + j * kTileColumns;
      store(at, finish(at, load<V>(&buffers.sums[i][j * kTileColumns]), block.row + i));
    }
  }
}

/// What a matrix unit multiplies.
template <class Isa, class Item>
concept InTiles = HasTiles<Isa> && (std::is_same_v<Item, Bf16Pair> || kSplit<Item>);

template <class Item>
ATTN_INLINE const Bf16Pair* pairs_of(const Item* items) noexcept {
  return reinterpret_cast<const Bf16Pair*>(items);  // their only member
}

/// gemm.h's product, where an ISA has a matrix unit, which is configured.  The panel is at least as deep as `depth`, rounded up
/// to tiles, and what it holds past `depth` is finite.
template <class Isa, class T, class Item, class Values, class Finish>
  requires InTiles<Isa, Item>
void gemm(Matrix<T> c, Matrix<const Item> a, Panel<const Values> b, Index rows, Index columns, Index depth,
          Finish finish) noexcept {
  static_assert(kWidth<Isa, T> == kTileColumns && kParts<Item> == kParts<Values>);
  TileBuffers buffers;
  for (Index row = 0; row < rows; row += 2 * kTileRows) {
    for (Index column = 0; column < columns; column += 2 * kTileColumns) {
      const Index strip = column - column % (Isa::kColumns * kTileColumns);
      const PairTile tile{pairs_of(b.data) + strip * b.depth + (column - strip),
                          strip_registers<Isa, T>(b.columns, strip) * kTileColumns};
      const Index registers = min(2, ceil_div(columns - column, kTileColumns));
      const TileBlock block{{pairs_of(a.data), a.stride}, tile, rows, depth, row};
      multiply_tile_block<Isa, Item>(Matrix<T>{c.data + column, c.stride}, block, registers, buffers, finish);
    }
  }
}

/// Of 16 pairs of values, row k of `b`, those that a row sees with weights[k]; the rest is 0.
template <class Isa>
ATTN_INLINE void copy_visible(const Bf16Pair* weights, PairTile b, Bf16Pair* room) noexcept {
  for (Index k = 0; k < kTileDepth; ++k) {
    store(room + k * kTileColumns, load<U32<Isa>>(b.at + k * b.stride) & seen_halves(weights[k]));
  }
}

/// C = C + A·B in one chain of sums, which begins with C.
struct Continued {
  template <class V>
  ATTN_INLINE V operator()(const float* c, V sum, Index row) const noexcept {
    (void)c, (void)row;
    return sum;
  }
};

/// gemm.h's product without the terms of hidden pairs, with the panel's depth from `first` on: to each row, hidden values are 0.  Marks
/// stand in first parts.
template <class Isa, class T, class Item, class Values, class Finish>
  requires InTiles<Isa, Item>
void gemm_of_visible(Matrix<T> c, Matrix<const Item> a, Panel<const Values> b, Index rows, Index depth,
                     Finish finish, Index first = 0) noexcept {
  using Unit = TileUnit<Isa>;
  using V = Vec<Isa, T>;
  constexpr Index kHalf = sizeof(Bf16Pair) / 2, kRun = kParts<Item> * kTileDepth;
  constexpr Bf16Pair kHidden = 0x80008000;
  alignas(64) Bf16Pair weights[kTileRows * kTileDepth]{}, marks[kTileDepth];
  alignas(64) Bf16Pair values[kTileDepth * kTileColumns];
  alignas(64) float sums[kTileRows * kTileColumns]{};
  for (Index column = 0; column < b.columns; column += kTileColumns) {
    const Index strip = column - column % (Isa::kColumns * kTileColumns);
    const Index stride = strip_registers<Isa, T>(b.columns, strip) * kTileColumns;
    const Bf16Pair* const in = pairs_of(b.data) + strip * b.depth + (column - strip) + first * stride;
    for (Index row = 0; row < rows; ++row) {
      T* const at = c.row(row) + column;
      const auto get = [&](Index k, Bf16Pair* room) {
        const auto* const own = reinterpret_cast<const std::byte*>(a.row(row) + k);
        store(room, load_pairs<Isa, DType::bf16>(own, kHalf, 2 * (depth - k)));
        for (Index i = depth - k; i < kTileDepth; ++i) room[i] = kHidden;
      };
      if constexpr (std::is_same_v<Finish, Continued>) {
        store(sums, load<V>(at));
        Unit::template load<0>(sums, kTileColumns * Index{sizeof(float)});
      } else {
        Unit::template zero<0>();
      }
      each_product<Item>(depth, [&]<bool, bool>(Index k, Index from, bool) {
        get(k, weights);
        get(k - k % kRun, marks);
        copy_visible<Isa>(marks, {in + from * stride, stride}, values);
        load_tile<Isa, 4>({weights, kTileDepth});
        load_tile<Isa, 6>({values, kTileColumns});
        Unit::template multiply<0, 4, 6>();
      });
      Unit::template store<0>(sums, kTileColumns * Index{sizeof(float)});
      store(at, finish(at, load<V>(sums), row));
    }
  }
}

}  // namespace attncore
