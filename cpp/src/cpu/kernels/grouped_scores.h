// Scores of more rows than a handful: where a row has a register to itself (decode_scores.h), the sums of its lanes take as long as the
// products.  Here a register holds several rows, 64 bits of each, and is multiplied by 64 bits of a key, which all rows meet:
//
//        a:  row 0, dims 0 and 1 | row 1, dims 0 and 1 | row 2, …        a + 1 register: the next rows, then dims 2 and 3
//        b:  key,   dims 0 and 1 | the same            | the same …
//
// so that but two lanes are summed, of some keys at once, whose sums are transposed.  float64, of which 64 bits are one number, keeps to
// the sums of lanes: one chain over all dims would lose digits.
#pragma once

#include "few_rows.h"

namespace attncore {

/// What of a key meets all rows at once, how many items that is, and how many rows a register has room for.  As many keys are
/// multiplied at once.
using KeyWord = std::uint64_t;
inline constexpr Index kWordBytes = sizeof(KeyWord);
template <class Item>
inline constexpr int kWordItems = sizeof(KeyWord) / sizeof(Item);
template <class Isa>
inline constexpr int kGroups = Isa::kBytes / static_cast<int>(sizeof(KeyWord));
template <class Isa, class T>
inline constexpr bool kGroupsRows =
    kGroups<Isa> > 2 && kWordItems<T> > 1;  // else it gains nothing, or loses the sums of lanes

/// Sums += the products of grouped rows with a word of as many keys.
template <class Isa, class T, class Item, int kRegisters>
ATTN_INLINE void dot_word(Vec<Isa, T> (&sum)[kRegisters][kGroups<Isa>], const Item* a,
                          const std::byte* const* key, Index at) noexcept {
  using Items = Vec<Isa, Item>;
  Items rows[kRegisters];
  for (int of = 0; of < kRegisters; ++of) rows[of] = in_register(load<Items>(a + of * kWidth<Isa, Item>));
  for (int i = 0; i < kGroups<Isa>; ++i) {
    const auto items = bit_cast<Items>(broadcast<Vec<Isa, KeyWord>>(load<KeyWord>(key[i] + at)));
    for (int of = 0; of < kRegisters; ++of) sum[of][i] = multiply_add<Isa>(rows[of], items, sum[of][i]);
  }
}

/// Whether keys lie as Items do.
template <class T, class Item, DType kStorage>
inline constexpr bool kStraight =
    kInPairs<T, Item> ? kStorage == DType::bf16 : std::is_same_v<typename Storage<kStorage>::Item, Item>;

/// The products of grouped rows with keys; those that are stored otherwise are converted on the way.  With each word a line is fetched: a
/// core drops what it is asked for faster than memory answers.
template <class Isa, class T, class Item, DType kStorage, int kRegisters>
ATTN_INLINE void dot_keys(Vec<Isa, T> (&sum)[kRegisters][kGroups<Isa>], const Item* a,
                          const std::byte* const* key, const std::byte* const* fetched, Index dims) noexcept {
  using In = TokenItems<Isa, Item, kStorage>;
  constexpr int kKeys = kGroups<Isa>, kWords = kGroups<Isa>;  // of a register of a key
  constexpr Index n = kWidth<Isa, Item>, kLine = 64;
  const auto dot = [&](const std::byte* const* items, Index at, Index word, Index read) {
    if (read % kLine == 0) fetch_later(fetched[word % kWords] + read);
    dot_word<Isa, T, Item, kRegisters>(sum, a, items, at + word * kWordBytes);
    a += kRegisters * n;
  };
  clear(sum);
  const Index whole = kInPairs<T, Item> ? dims / 2 : dims;
  Index k = 0;
  if constexpr (kStraight<T, Item, kStorage>) {
    for (; k + n <= whole; k += n) {
#pragma GCC unroll 8
      for (int word = 0; word < kWords; ++word) dot(key, In::offset(k), word, In::offset(k));
    }
  }
  alignas(Isa::kBytes) Item converted[kKeys][2 * n];
  const std::byte* items[kKeys];
  for (int i = 0; i < kKeys; ++i) items[i] = reinterpret_cast<const std::byte*>(converted[i]);
  if constexpr (kInPairs<T, Item> && In::kTwo) {
    for (; k + 2 * n <= whole; k += 2 * n) {
      for (int i = 0; i < kKeys; ++i) {
        Vec<Isa, Item> first, second;
        In::load(key[i] + In::offset(k), first, second);
        store(converted[i], first);
        store(converted[i] + n, second);
      }
#pragma GCC unroll 1
      for (int word = 0; word < 2 * kWords; ++word) dot(items, 0, word, In::offset(k + word / kWords * n));
    }
  }
  for (; k < depth_of<T, Item>(dims); k += n) {
    const Index rest = kInPairs<T, Item> ? dims - 2 * k : dims - k;
    for (int i = 0; i < kKeys; ++i)
      store(converted[i],
            k + n <= whole ? In::load(key[i] + In::offset(k)) : In::load(key[i] + In::offset(k), rest));
#pragma GCC unroll 1
    for (int word = 0; word < kWords; ++word) dot(items, 0, word, In::offset(k));
  }
}

/// C (rows of a register, keys) = finish(the sums of each key's words)
template <class Isa, class T, Index kStride, class Finish>
ATTN_INLINE void store_groups(T* c, const Vec<Isa, T>* sums, Finish finish) noexcept {
  using V = Vec<Isa, T>;
  constexpr int kKeys = kGroups<Isa>, kItems = kWordItems<T>;
  V block[kKeys / kItems];  // all rows' scores of a key, or of two
  for (int i = 0; i < kKeys / kItems; ++i) {
    using Lanes = std::make_integer_sequence<int, kWidth<Isa, T>>;
    const V a = sums[2 * i], b = sums[2 * i + 1];
    block[i] = every_second<false>(a, b, Lanes{}) + every_second<true>(a, b, Lanes{});
  }
  transpose<Isa, T, kKeys / kItems, kKeys>(block);
  for (int i = 0; i < kKeys / kItems; ++i, c += kItems * kStride) {
    const V scores = finish(c, block[i], 0);
    using Lanes = std::make_integer_sequence<int, kKeys>;
    store(c, low_half(scores, Lanes{}));
    store(c + kStride, high_half(scores, Lanes{}));
  }
}

/// run.template operator()<kRegisters>(): registers at once, for so many rows.
template <class Isa, class Run>
ATTN_INLINE void with_registers(Index rows, Run run) noexcept {
  if (rows <= kGroups<Isa>) return run.template operator()<1>();
  run.template operator()<2>();
}

/// A's rows (depth) as dot_word reads them: word after word of as many as are multiplied at once.  Those that are not there are 0.
template <class Isa, class Item>
void group_rows(Item* out, const RowList<const Item>& a, Index depth) noexcept {
  using Words = Vec<Isa, KeyWord>;
  constexpr Index n = kWidth<Isa, Item>, kRows = kGroups<Isa>;
  with_registers<Isa>(a.size, [&]<int kRegisters>() {
    for (Index first = 0; first < a.size; first += kRegisters * kRows) {
      for (Index k = 0; k < depth; k += n, out += kRegisters * kRows * n) {
        const auto bytes = static_cast<std::size_t>(min(n, depth - k)) * sizeof(Item);
        for (Index of = 0; of < kRegisters; ++of) {
          Words square[kRows];
          for (Index i = 0; i < kRows; ++i) {
            const Index row = first + of * kRows + i;
            square[i] = Words{};
            if (row < a.size) __builtin_memcpy(&square[i], a.at[row] + k, bytes);
          }
          transpose<Isa, KeyWord>(square);
          for (Index i = 0; i < kRows; ++i)
            store(static_cast<void*>(out + (i * kRegisters + of) * n), square[i]);
        }
      }
    }
  });
}

/// C (rows, keys) = finish(A (rows, dims) · Bᵀ), A as group_rows has it; C has room for kDirectRows and for whole registers of keys.
template <class Isa, class T, class Item, Index kStride, class Finish>
void dot_grouped_rows(T* c, const Item* a, Index rows, const Tokens<Isa, T>& b, DType storage, Index keys,
                      Index dims, Finish finish) noexcept {
  constexpr int kKeys = kGroups<Isa>;
  with_token_storage<T, Item>(storage, [&]<DType kStorage>() {
    with_registers<Isa>(rows, [&]<int kRegisters>() {
      constexpr Index kRows = kRegisters * kGroups<Isa>;
      const Index block = kRows * round_up(depth_of<T, Item>(dims), kWidth<Isa, Item>);
      TokenWalk read = b.read;
      PieceWalk fetch = b.pieces_ahead();
      for (Index at = 0; at < keys; at += kKeys) {
        const std::byte *key[kKeys], *fetched[kKeys];
        for (int i = 0; i < kKeys; ++i) key[i] = read.next(), fetched[i] = fetch.next();
        for (Index row = 0; row < rows; row += kRows) {
          Vec<Isa, T> sum[kRegisters][kKeys];
          dot_keys<Isa, T, Item, kStorage, kRegisters>(sum, a + row / kRows * block, key,
                                                       row == 0 ? fetched : key, dims);
          T* const out = c + row * kStride + at;
          store_groups<Isa, T, kStride>(out, sum[0], finish);
          if constexpr (kRegisters > 1)
            store_groups<Isa, T, kStride>(out + kGroups<Isa> * kStride, sum[1], finish);
        }
      }
    });
  });
}

}  // namespace attncore
