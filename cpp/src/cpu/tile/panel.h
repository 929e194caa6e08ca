// Packed operands: the B of a product (depth, columns) as strips of Isa::kColumns registers, each strip
// contiguous:
//
//     strip 0: row 0 of its columns, row 1, …, row depth − 1;  strip 1: …;  the last strip may be narrower.
//
// K is packed transposed (depth = dim, columns = keys), V as it is (depth = keys, columns = value_dim).
// Columns are padded with zeros to whole registers; items become the accumulation type here, so that products
// know one type only.
#pragma once

#include "../dtype.h"

namespace attncore {

template <class T>
struct Panel {
  T* data;
  Index columns, depth;  // as packed; columns without the padding
  Index stride =
      0;  // of rows that are not packed, but whole registers where they lie: then there are no strips
};

template <class Isa, class T>
ATTN_INLINE Index panel_items(Index columns, Index depth) noexcept {
  return round_up(columns, kWidth<Isa, T>) * depth;
}

/// The registers of the strip that begins at `column`.
template <class Isa, class T>
ATTN_INLINE Index strip_registers(Index columns, Index column) noexcept {
  return min(Isa::kColumns, ceil_div(columns - column, kWidth<Isa, T>));
}

/// Packs keys first … first + columns − 1 transposed, in squares of registers: load(token, i, given) is a token's items from i
/// on, or 0 where it is not given.
template <class Isa, class Item, class Load>
ATTN_INLINE void pack_squares(Panel<Item> panel, const KeySource& source, Index first, Load load) noexcept {
  constexpr Index n = kWidth<Isa, Item>;
  for (Index column = 0; column < panel.columns; column += n) {
    const Index strip = column - column % (Isa::kColumns * n);
    const Index registers = strip_registers<Isa, Item>(panel.columns, strip);
    Item* const out = panel.data + strip * panel.depth + (column - strip);
    const Index keys = min(n, panel.columns - column);
    const std::byte* in[n];
    for (Index key = 0; key < n; ++key) in[key] = source.token(first + column + min(key, keys - 1));
    for (Index item = 0; item < panel.depth; item += n) {
      Vec<Isa, Item> block[n];
      for (Index key = 0; key < n; ++key) block[key] = load(in[key], item, key < keys);
      transpose<Isa, Item>(block);
      Item* const to = out + item * registers * n;
      if (panel.depth - item >= n) {
        for (Index i = 0; i < n; ++i) store(to + i * registers * n, block[i]);
      } else {
        for (Index i = 0; i < panel.depth - item; ++i) store(to + i * registers * n, block[i]);
      }
    }
  }
}

template <class Isa, class T, DType kStorage>
void pack_transposed(Panel<T> panel, const KeySource& source, Index first) noexcept {
  constexpr Index n = kWidth<Isa, T>;
  with_stride<kStorage>(source.dim_stride, [&](auto stride) {
    pack_squares<Isa>(panel, source, first, [&](const std::byte* token, Index dim, bool given) {
      const std::byte* const p = token + item_offset<kStorage>(dim, stride);
      __builtin_prefetch(p + n * source.token_stride);  // of the next square down: tokens may lie far apart
      return load_items<Isa, T, kStorage>(p, stride, given ? min(n, panel.depth - dim) : 0);
    });
  });
}

/// Whether so many items, whole registers of them, are finite.
template <class Isa, class T>
bool all_finite(const T* items, Index count) noexcept {
  constexpr Index n = kWidth<Isa, T>;
  using Bits = typename Register<typename IntOf<T>::unsigned_type, kWidth<Isa, T>>::type;
  Bits poison{};  // the bits of 0 · item: ± 0, or those of NaN
  for (Index i = 0; i < count; i += n) poison |= bit_cast<Bits>(load<Vec<Isa, T>>(items + i) * T{0});
  return horizontal_sum<Isa, T>(bit_cast<Vec<Isa, T>>(poison)) == 0;
}

constexpr Index kPrefetchTokens = 16;

template <class Isa, class T, DType kStorage, class Stride>
bool pack_rows(Panel<T> panel, const KeySource& source, Index first, Stride stride) noexcept {
  constexpr Index n = kWidth<Isa, T>;
  using Bits = typename Register<typename IntOf<T>::unsigned_type, kWidth<Isa, T>>::type;
  Bits poison{};  // the bits of 0 · item: ± 0, or those of NaN
  for (Index strip = 0; strip < panel.columns; strip += Isa::kColumns * n) {
    const Index registers = strip_registers<Isa, T>(panel.columns, strip);
    T* out = panel.data + strip * panel.depth;
    for (Index key = 0; key < panel.depth; ++key) {
      const std::byte* const in = source.token(first + key) + item_offset<kStorage>(strip, stride);
      for (Index j = 0; j < registers; ++j, out += n) {
        const std::byte* const p = in + item_offset<kStorage>(j * n, stride);
        __builtin_prefetch(p + kPrefetchTokens * source.token_stride);
        const Index dims = min(n, panel.columns - strip - j * n);
        const auto items = load_items<Isa, T, kStorage>(p, stride, dims);
        poison |= bit_cast<Bits>(items * T{0});
        store(out, items);
      }
    }
  }
  return horizontal_sum<Isa, T>(bit_cast<Vec<Isa, T>>(poison)) == 0;
}

/// Packs keys first … first + depth − 1 of V.  Returns whether all items are finite.
template <class Isa, class T, DType kStorage>
bool pack_rows(Panel<T> panel, const KeySource& source, Index first) noexcept {
  return with_stride<kStorage>(source.dim_stride, [&](auto stride) {
    return pack_rows<Isa, T, kStorage>(panel, source, first, stride);
  });
}

/// The same for the source's own storage dtype.
template <class Isa, class T>
void pack_transposed(Panel<T> panel, const KeySource& source, Index first) noexcept {
  with_key_storage<T>(source.storage,
                      [&]<DType kStorage>() { pack_transposed<Isa, T, kStorage>(panel, source, first); });
}

template <class Isa, class T>
bool pack_rows(Panel<T> panel, const KeySource& source, Index first) noexcept {
  return with_key_storage<T>(
      source.storage, [&]<DType kStorage>() { return pack_rows<Isa, T, kStorage>(panel, source, first); });
}

}  // namespace attncore
