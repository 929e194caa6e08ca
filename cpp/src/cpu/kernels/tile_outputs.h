// Decoding's other product by a matrix unit (tile_scores.h).
#pragma once

#include "tile_scores.h"

namespace attncore {

/// The low (high) items of each 128 bits of two tokens, pair by pair: one instruction, where pair_up's takes three.  columns_of brings
/// their sums in order.
template <bool kHigh, class V, int... I>
ATTN_INLINE V pair_in_lanes(V a, V b, std::integer_sequence<int, I...>) noexcept {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (I / 8 * 8 + I % 8 / 2 + I % 2 * n + (kHigh ? 4 : 0))...);
}
template <bool kHigh, class V, int... I>
ATTN_INLINE V columns_of(V low, V high, std::integer_sequence<int, I...>) noexcept {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(low, high, (I / 8 * 4 + I % 4 + I / 4 % 2 * n + (kHigh ? n / 2 : 0))...);
}

/// Tiles of C: all rows' of kColumnTiles, an even number.
template <class Isa, Index kStride, DType kStorage, int kRowTiles, int kColumnTiles>
class TileStrip {
 public:
  /// A (all rows of the tiles, keys); so many columns of the tokens from `column` on.
  ATTN_INLINE TileStrip(const Bf16Pair* a, const TokenWalk& b, Index keys, Index column,
                        Index columns) noexcept
      : a_(a), b_(b), keys_(keys), offset_(offset(column)), columns_(columns - column) {}

  /// Sums = A · B.  Tokens are fetched meanwhile.
  void multiply(FetchedLines& ahead) noexcept {
    multiply([&](Bf16Pair* room, Index, Range pairs, const Tokens& tokens) {
      ahead.fetch(offset(2 * pairs.size() * kColumns) / kLine);
      for (Index pair = pairs.begin; pair < pairs.end; ++pair)
        load_pair(room + pair * kColumns, tokens[2 * pair], tokens[2 * pair + 1], ~Bf16Pair{});
    });
  }
  /// The same without the terms of pairs that are hidden from a row, whose sums alone are right.
  void multiply_seen(Index row) noexcept {
    multiply([&](Bf16Pair* room, Index first, Range pairs, const Tokens& tokens) {
      for (Index pair = pairs.begin; pair < pairs.end; ++pair)
        load_pair(room + pair * kColumns, tokens[2 * pair], tokens[2 * pair + 1],
                  seen_halves(a_[row * kStride + first + pair]));
    });
  }

  [[nodiscard]] bool is_finite(Index rows) const noexcept { return all_finite<Isa>(sums_, rows * kColumns); }

  template <class Finish>
  ATTN_INLINE void store_row(float* out, Index row, Finish finish) const noexcept {
    using Lanes = std::make_integer_sequence<int, kTileColumns>;
    const auto store_register = [&](Index column, V sum) {
      if (column < columns_) store(out + column, finish(out + column, sum, row));
    };
    for (Index column = 0; column < kColumns; column += 2 * kTileColumns) {
      const float* const sums = sums_ + row * kColumns + column;
      const V low = load<V>(sums), high = load<V>(sums + kTileColumns);
      store_register(column, columns_of<false>(low, high, Lanes{}));
      store_register(column + kTileColumns, columns_of<true>(low, high, Lanes{}));
    }
  }

 private:
  using Unit = TileUnit<Isa>;
  using V = Vec<Isa, float>;
  using Tokens = TokenBlock<kTileKeys>;
  static constexpr Index kItem = sizeof(typename Storage<kStorage>::Item);
  static constexpr Index kColumns = kColumnTiles * kTileColumns, kLine = 64;
  static constexpr int kSums = kRowTiles * kColumnTiles;

  static ATTN_INLINE constexpr Index offset(Index items) noexcept {
    return item_offset<kStorage>(items, kItem);
  }

  /// fill(room, first, pairs, tokens): pairs of room, which holds the 16 from `first` on, of those tokens.
  template <class Fill>
  ATTN_INLINE void multiply(Fill fill) noexcept {
    alignas(64) Bf16Pair room[2][kTileDepth * kColumns];
    TokenWalk walk = b_;
    each_of<kSums>([](auto i) { Unit::template zero<i>(); });
    Tokens tokens(walk);
    fill(room[0], 0, Range{0, kTileDepth}, tokens);
    for (Index first = 0; 2 * first < keys_; first += kTileDepth) {
      Bf16Pair *const now = room[first / kTileDepth % 2], *const next = room[1 - first / kTileDepth % 2];
      const bool more = 2 * (first + kTileDepth) < keys_;
      if (more) tokens.take(walk);
      each_of<kSums>([&](auto i) {  // register i: column tile i / kRowTiles, row tile i % kRowTiles
        constexpr int kColumn = i / kRowTiles, kRow = i % kRowTiles;
        constexpr Index kPairs = kTileDepth / kSums;
        if constexpr (kColumn == 0)
          load_tile<Isa, 4 + kRow>({a_ + kRow * kTileRows * kStride + first, kStride});
        if constexpr (kRow == 0) load_tile<Isa, 6 + kColumn % 2>({now + kColumn * kTileColumns, kColumns});
        Unit::template multiply<i, 4 + kRow, 6 + kColumn % 2>();
        if (more) fill(next, first + kTileDepth, Range{i * kPairs, (i + 1) * kPairs}, tokens);
      });
    }
    each_of<kSums>([&](auto i) {
      float* const to = sums_ + i % kRowTiles * kTileRows * kColumns + i / kRowTiles * kTileColumns;
      Unit::template store<i>(to, kColumns * Index{sizeof(float)});
    });
  }

  ATTN_INLINE void load_pair(Bf16Pair* out, const std::byte* even, const std::byte* odd,
                             Bf16Pair seen) const noexcept {
    using Halves = typename Register<std::uint16_t, Isa::kBytes / 2>::type;
    using Lanes = std::make_integer_sequence<int, Isa::kBytes / 2>;
    for (Index column = 0; column < kColumns; column += 2 * kTileColumns, out += 2 * kTileColumns) {
      const auto load = [&](const std::byte* token) {
        return bit_cast<Halves>(
            load_pairs<Isa, kStorage>(token + offset_ + offset(column), kItem, columns_ - column));
      };
      const Halves a = load(even), b = load(odd);
      store(out, bit_cast<U32<Isa>>(pair_in_lanes<false>(a, b, Lanes{})) & seen);
      store(out + kTileColumns, bit_cast<U32<Isa>>(pair_in_lanes<true>(a, b, Lanes{})) & seen);
    }
  }

  const Bf16Pair* const a_;
  const TokenWalk b_;
  const Index keys_, offset_, columns_;
  alignas(64) float sums_[kRowTiles * kTileRows * kColumns];
};

/// C (rows, columns) = finish(C, A (rows, keys) · B).  Hidden pairs are marked in A, which has whole tiles of rows, whatever those past C's
/// hold, and whole runs of 32 keys, hidden ones past the last.
template <class Isa, Index kStride, class Finish>
void add_tile_rows(const RowList<float>& c, const Bf16Pair* a, const Tokens<Isa, float>& b, DType storage,
                   Index keys, Index columns, Finish finish) noexcept {
  constexpr Index kPairOfTiles = 2 * kTileColumns;
  const bool tall = c.size > kTileRows;
  const Index wide = (tall ? 1 : 2) * kPairOfTiles;
  with_exact_storage(storage, [&]<DType kStorage>() {
    constexpr Index kItem = sizeof(typename Storage<kStorage>::Item);
    FetchedLines ahead(columns <= wide ? b.ahead : b.next_tile, item_offset<kStorage>(columns, kItem));
    const auto add = [&]<int kRowTiles, int kColumnTiles>(Index column) {
      TileStrip<Isa, kStride, kStorage, kRowTiles, kColumnTiles> strip(a, b.read, keys, column, columns);
      strip.multiply(ahead);
      const bool finite = strip.is_finite(c.size);
      for (Index row = 0; row < c.size; ++row) {
        if (!finite) strip.multiply_seen(row);
        strip.store_row(c.at[row] + column, row, finish);
      }
    };
    for (Index column = 0; column < columns; column += wide) {
      if (tall) {
        add.template operator()<2, 2>(column);
      } else if (columns - column > kPairOfTiles) {
        add.template operator()<1, 4>(column);
      } else {
        add.template operator()<1, 2>(column);
      }
    }
  });
}

}  // namespace attncore
