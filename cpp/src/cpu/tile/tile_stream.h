// Products of a matrix unit in one stream of instructions, in which a vector unit's stand between them.
//
// A block of up to 2 × 2 tiles of sums stays in the unit until the next block needs its registers: a tile that is stored directly
// before its register is used anew costs nothing, any other a third more time (18 and 26 cycles a product, Sapphire Rapids).
// Of each 16 pairs, with `·` a call of between(), which does some of the vector unit's work:
//
//         load A0, B0; S00 += A0 B0 · load A1; S10 += A1 B0 · load B1; S01 += A0 B1 · S11 += A1 B1 ·
//
// and where items are parts the same of each product of parts in tiles.h's order, of which each needs but A's tiles or B's anew.  A
// block's first four store what was there before each product; between() is called after all four, when those sums, which its
// work may be about, are in memory.
#pragma once

#include "tiles.h"

namespace attncore {

/// Up to 2 × 2 tiles of sums in memory.
struct SumTiles {
  float* at = nullptr;
  Index stride = 0;
  bool tall = false, wide = false;
};

/// The unit is configured for no more rows than memory has.
template <class Isa>
class TileStream {
 public:
  /// c = A · B of `steps` times 16 pairs, whatever their parts, or c += A · B.  Item: A's.
  template <class Item, class Between>
  void multiply(PairTile a, PairTile b, Index steps, const SumTiles& c, bool adds,
                Between& between) noexcept {
    if (c.tall && c.wide) return multiply_block<Item, true, true>(a, b, steps, c, adds, between);
    if (c.tall) return multiply_block<Item, true, false>(a, b, steps, c, adds, between);
    if (c.wide) return multiply_block<Item, false, true>(a, b, steps, c, adds, between);
    multiply_block<Item, false, false>(a, b, steps, c, adds, between);
  }

  /// Stores what the unit still holds.
  void flush() noexcept {
    store_sums<0>();
    store_sums<1>();
    store_sums<2>();
    store_sums<3>();
    held_ = {};
  }

 private:
  using Unit = TileUnit<Isa>;
  static constexpr Index kFloat = sizeof(float);

  /// Register i is of row tile i / 2, column tile i % 2.
  template <int i>
  static ATTN_INLINE float* place(const SumTiles& c) noexcept {
    return c.at + i / 2 * kTileRows * c.stride + i % 2 * kTileColumns;
  }
  template <int i>
  ATTN_INLINE void store_sums() noexcept {
    if (held_.at == nullptr || (i / 2 == 1 && !held_.tall) || (i % 2 == 1 && !held_.wide)) return;
    Unit::template store<i>(place<i>(held_), held_.stride * kFloat);
  }
  template <int i>
  ATTN_INLINE void begin_sums(const SumTiles& c, bool adds) noexcept {
    store_sums<i>();
    if (adds) {
      Unit::template load<i>(place<i>(c), c.stride * kFloat);
    } else {
      Unit::template zero<i>();
    }
  }

  /// Loads A's or B's tiles or both; before.template operator()<i>() before each product, after() after it.
  template <bool kTall, bool kWide, bool kLoadA, bool kLoadB, class Before, class After>
  static ATTN_INLINE void multiply_tiles(PairTile a, PairTile b, Before before, After after) noexcept {
    const auto one = [&]<int kSum, int kA, int kB>() {
      before.template operator()<kSum>();
      Unit::template multiply<kSum, kA, kB>();
      after();
    };
    if constexpr (kLoadA) load_tile<Isa, 4>(a);
    if constexpr (kLoadB) load_tile<Isa, 6>(b);
    one.template operator()<0, 4, 6>();
    if constexpr (kTall) {
      if constexpr (kLoadA) load_tile<Isa, 5>({a.at + kTileRows * a.stride, a.stride});
      one.template operator()<2, 5, 6>();
    }
    if constexpr (kWide) {
      if constexpr (kLoadB) load_tile<Isa, 7>({b.at + kTileColumns, b.stride});
      one.template operator()<1, 4, 7>();
    }
    if constexpr (kTall && kWide) one.template operator()<3, 5, 7>();
  }

  /// A block's products, one of parts after another (each_product).
  template <bool kTall, bool kWide, class Between>
  struct Block {
    TileStream& stream;
    PairTile a, b;
    const SumTiles& c;
    const bool adds;
    Between& between;

    template <bool kLoadA, bool kLoadB>
    ATTN_INLINE void operator()(Index at_a, Index at_b, bool begins) noexcept {
      const PairTile left{a.at + at_a, a.stride}, right{b.at + at_b * b.stride, b.stride};
      if (begins) return begin(left, right);
      multiply_tiles<kTall, kWide, kLoadA, kLoadB>(left, right, []<int>() {}, [&] { between(); });
    }

   private:
    ATTN_INLINE void begin(PairTile left, PairTile right) noexcept {
      const auto before = [&]<int i>() { stream.begin_sums<i>(c, adds); };
      multiply_tiles<kTall, kWide, true, true>(left, right, before, [] {});
      if constexpr (!kTall) stream.store_sums<2>();
      if constexpr (!kWide) stream.store_sums<1>();
      if constexpr (!kTall || !kWide) stream.store_sums<3>();
      stream.held_ = c;
      for (int i = 0; i < (kTall ? 2 : 1) * (kWide ? 2 : 1); ++i) between();
    }
  };

  template <class Item, bool kTall, bool kWide, class Between>
  void multiply_block(PairTile a, PairTile b, Index steps, const SumTiles& c, bool adds,
                      Between& between) noexcept {
    each_product<Item>(steps * kParts<Item> * kTileDepth,
                       Block<kTall, kWide, Between>{*this, a, b, c, adds, between});
  }

  SumTiles held_;
};

}  // namespace attncore
