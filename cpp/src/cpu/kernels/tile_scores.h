// More rows than a handful by a matrix unit, against keys and values where they lie (decode_scores.h says why they are not packed):
//
//     Sᵀ (keys, rows) = K · Qᵀ     16 keys × 32 dims from where they lie, at their stride; queries are packed, once a task
//     O (rows, dims) += P · V      weights as softmax keeps them; 32 values, paired in 4 KB that the first cache holds
//
// What else there is to do stands between the products, here of up to 16 rows:
//
//     S:  load Q · load K0 · S0 += K0 Q · fetch 1 KB · load K1 · S1 += K1 Q · fetch 1 KB ·   32 dims on; after the first two
//         products the scores of the 32 keys before are transposed
//     O:  load P · load V0 · O0 += P V0 · fetch 1 KB · pair 8 of the next 32 values · load V1 · …     32 keys on
//
// 32 keys and values of 128 dims are 16 products, 256 cycles of the unit, and 4100 instructions beside the softmax's 1500 (counted in
// the object code): 1400 to 1900 cycles.  Memory takes 3400 for their 16 KB at 15 GB/s a core and 3 GHz, the third cache 1700, and
// the dot products of pairs that this replaces 8192.  32 rows have 32 products and 5400 instructions beside the softmax's;
// packing takes 8800.
#pragma once

#include "../tile/tiles.h"
#include "few_rows.h"

namespace attncore {

/// Keys that are begun at once.
inline constexpr Index kTileKeys = 2 * kTileRows;
inline constexpr Index kTilePairs = kTileRows * kTileDepth;

/// Queries as tiles read them: (16 pairs of dims, 16 rows) after each other, then the next rows.  Rows that are not there are 0.
template <class Isa>
void pack_columns(Bf16Pair* out, const RowList<const Bf16Pair>& rows, Index dims) noexcept {
  for (Index first = 0; first < rows.size; first += kTileRows) {
    for (Index k = 0; k < round_up(dims, kRunItems) / 2; k += kTileDepth) {
      U32<Isa> square[kTileRows];
      for (Index i = 0; i < kTileRows; ++i)
        square[i] = first + i < rows.size ? load<U32<Isa>>(rows.at[first + i] + k) : U32<Isa>{};
      transpose<Isa, Bf16Pair>(square);
      for (Index i = 0; i < kTileDepth; ++i, out += kTileRows) store(out, square[i]);
    }
  }
}

/// 32 dims of 16 keys from `dim` on; those that are not there are 0.  Quantised ones are converted on the way.
template <class Isa, DType kStorage, int kTile>
ATTN_INLINE void load_keys(const TokenBlock<kTileRows>& keys, Index dim, Index dims,
                           Bf16Pair* room) noexcept {
  constexpr Index kItem = sizeof(typename Storage<kStorage>::Item);
  const Index at = item_offset<kStorage>(dim, kItem);
  if (kStorage == DType::bf16 && keys.first() != nullptr && dim + kRunItems <= dims)
    return TileUnit<Isa>::template load<kTile>(keys.first() + at, keys.stride());
  for (Index i = 0; i < kTileRows; ++i)
    store(room + i * kTileDepth, load_pairs<Isa, kStorage>(keys[i] + at, kItem, dims - dim));
  load_tile<Isa, kTile>({room, kTileDepth});
}

/// C (rows, 16 keys) = finish(sums (16 keys, 16)ᵀ)
template <class Isa, Index kStride, class Finish>
ATTN_INLINE void store_transposed(float* c, const float* sums, Index rows, Finish finish) noexcept {
  Vec<Isa, float> square[kTileRows];
  for (Index i = 0; i < kTileRows; ++i) square[i] = load<Vec<Isa, float>>(sums + i * kTileColumns);
  transpose<Isa, float>(square);
  for (Index i = 0; i < rows; ++i) store(c + i * kStride, finish(c, square[i], i));
}

/// dot_tile_rows of so many tiles of rows.
template <class Isa, Index kStride, DType kStorage, int kRowTiles, class Finish>
void dot_row_tiles(float* c, const Bf16Pair* a, Index rows, const Tokens<Isa, float>& b, Index keys,
                   Index dims, Finish finish) noexcept {
  using Unit = TileUnit<Isa>;
  constexpr Index kBytes = kTileColumns * Index{sizeof(float)},
                  kItem = sizeof(typename Storage<kStorage>::Item);
  constexpr Index kFetched =
      kTileRows * item_offset<kStorage>(kRunItems, kItem) / 64 / kRowTiles;  // lines a product
  alignas(64) float sums[2 * kRowTiles][kTilePairs];
  alignas(64) Bf16Pair room[2][kTilePairs];
  TokenWalk read = b.read;
  FetchedLines ahead(b.ahead, item_offset<kStorage>(dims, kItem), kTileKeys);
  const auto finish_keys = [&](auto i,
                               Index at) {  // register i: key tile i / kRowTiles, row tile i % kRowTiles
    const Index row = i % kRowTiles * kTileRows, key = at + i / kRowTiles * kTileRows;
    store_transposed<Isa, kStride>(c + row * kStride + key, sums[i], min(kTileRows, rows - row), finish);
  };
  Index at = 0;
  for (; at < keys; at += kTileKeys) {
    const TokenBlock<kTileRows> block[] = {TokenBlock<kTileRows>(read), TokenBlock<kTileRows>(read)};
    for (Index dim = 0; dim < dims; dim += kRunItems) {
      const Bf16Pair* const queries = a + dim / 2 * kTileRows;
      each_of<2 * kRowTiles>([&](auto i) {
        constexpr int kKeys = i / kRowTiles, kRows = i % kRowTiles;
        if constexpr (kKeys == 0)
          load_tile<Isa, 6 + kRows>(
              {queries + kRows * (round_up(dims, kRunItems) / 2) * kTileRows, kTileRows});
        if constexpr (kRows == 0) load_keys<Isa, kStorage, 4 + kKeys>(block[kKeys], dim, dims, room[kKeys]);
        if (dim == 0) {
          Unit::template store<i>(sums[i], kBytes);  // of the keys before
          Unit::template zero<i>();
        }
        Unit::template multiply<i, 4 + kKeys, 6 + kRows>();
        ahead.fetch(kFetched);
        if (dim == 0 && at > 0) finish_keys(i, at - kTileKeys);
      });
    }
  }
  each_of<2 * kRowTiles>([&](auto i) { Unit::template store<i>(sums[i], kBytes); });
  each_of<2 * kRowTiles>([&](auto i) { finish_keys(i, at - kTileKeys); });
}

/// C (rows, keys) = finish(A (rows, dims) · Bᵀ), A as pack_columns has it; C has room for whole kTileKeys.
template <class Isa, Index kStride, class Finish>
void dot_tile_rows(float* c, const Bf16Pair* a, Index rows, const Tokens<Isa, float>& b, DType storage,
                   Index keys, Index dims, Finish finish) noexcept {
  with_exact_storage(storage, [&]<DType kStorage>() {
    if (rows > kTileRows) return dot_row_tiles<Isa, kStride, kStorage, 2>(c, a, rows, b, keys, dims, finish);
    dot_row_tiles<Isa, kStride, kStorage, 1>(c, a, rows, b, keys, dims, finish);
  });
}

}  // namespace attncore
