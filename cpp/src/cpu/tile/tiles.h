// What a matrix unit multiplies, AMX's or a test's: its registers are tiles of 16 rows of 64 bytes, float32 sums or bfloat16 pairs.
//
// B's panels of pairs (pairs.h) are what the unit reads: a row of a tile is 16 columns at one depth, and the next row stands a
// strip's registers further.  Their depth is a multiple of 16, zeros at the end.  A is read where it lies, as deep.  Four sums stay in
// the unit for the whole depth (tile_stream.h):
//
//                B0    B1
//         A0    S00   S01        16 pairs deeper: four loads, four products
//         A1    S10   S11
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

/// 16 rows × 16 pairs.
struct PairTile {
  const Bf16Pair* at;
  Index stride;
};

template <class Isa, int kTile>
ATTN_INLINE void load_tile(PairTile tile) noexcept {
  TileUnit<Isa>::template load<kTile>(tile.at, tile.stride * Index{sizeof(Bf16Pair)});
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

/// What a matrix unit multiplies.
template <class Isa, class Item>
concept InTiles = HasTiles<Isa> && (std::is_same_v<Item, Bf16Pair> || kSplit<Item>);

template <class Item>
ATTN_INLINE const Bf16Pair* pairs_of(const Item* items) noexcept {
  return reinterpret_cast<const Bf16Pair*>(items);  // their only member
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
