// Scores of more rows than a handful: where a row has a register to itself (decode_scores.h), the sums of its lanes take as long as the
// products.  Here a register holds several rows, 128 bits of each, and is multiplied by 128 bits of a key, which it meets in
// each of its groups of lanes:
//
//        a:  row 0, dims 0 … 3 | row 1, dims 0 … 3 | row 2, … | row 3, …        a + 1 register: rows 4 … 7, then dims 4 … 7
//        b:  key,   dims 0 … 3 | the same          | the same | the same
//
// so that but groups of lanes are summed, of as many keys at once as such a group has lanes: their sums stand beside each other.
#pragma once

#include "few_rows.h"

namespace attncore {

template <class T>
inline constexpr int kGroupLanes = 16 / static_cast<int>(sizeof(T));
template <class Isa, class T>
inline constexpr int kGroups = kWidth<Isa, T> / kGroupLanes<T>;

/// Keys at once, and the most registers of rows.
inline constexpr int kGroupedKeys = 4;
template <class Isa>
inline constexpr int kMostRegisters = kFewSums<Isa> / kGroupedKeys;

/// One step of sum_groups: in each group, of each 2 kHalf lanes of a, then of b, the halves are added.
template <int kGroup, int kHalf, class V, int... I>
ATTN_INLINE V add_in_groups(V a, V b, std::integer_sequence<int, I...>) noexcept {
  constexpr int n = sizeof...(I), kHere = kGroup / 2;
  return __builtin_shufflevector(
             a, b,
             (I % kGroup / kHere * n + I / kGroup * kGroup + I % kHere / kHalf * 2 * kHalf + I % kHalf)...) +
         __builtin_shufflevector(a, b,
                                 (I % kGroup / kHere * n + I / kGroup * kGroup +
                                  I % kHere / kHalf * 2 * kHalf + kHalf + I % kHalf)...);
}

/// Lane i of each group of the result is the sum of v[i]'s lanes in that group.
template <int kLanes, int kGroup, int kHalf = kGroup / 2, class V>
ATTN_INLINE V sum_groups(const V* v) noexcept {
  using Lanes = std::make_integer_sequence<int, kLanes>;
  V next[kHalf];
  for (int i = 0; i < kHalf; ++i) next[i] = add_in_groups<kGroup, kHalf>(v[2 * i], v[2 * i + 1], Lanes{});
  if constexpr (kHalf == 1) {
    return next[0];
  } else {
    return sum_groups<kLanes, kGroup, kHalf / 2>(next);
  }
}

/// kRegisters registers of A's rows (depth) from `first` on, those past its end being copies of the last, as dot_groups reads them: 128 bits of
/// each row after another.
template <class Isa, class Item, int kRegisters>
void group_rows(Item* out, const RowList<const Item>& a, Index first, Index depth) noexcept {
  constexpr Index n = kWidth<Isa, Item>, kGroup = kGroupLanes<Item>;
  for (Index i = 0; i < kRegisters * kGroups<Isa, Item>; ++i) {
    const Item* const row = a.at[min(first + i, a.size - 1)];
    Item* to = out + i * kGroup;
    Index k = 0;
    for (; k + kGroup <= depth; k += kGroup, to += kRegisters * n) __builtin_memcpy(to, row + k, 16);
    for (; k < round_up(depth, n); k += kGroup, to += kRegisters * n) {
      for (Index j = 0; j < kGroup; ++j) to[j] = k + j < depth ? row[k + j] : Item{};
    }
  }
}

/// Keys, or what is to be fetched, from the same byte on.
struct KeysAt {
  const std::byte* const* key;
  Index at;
};

/// Sums += the products of grouped rows, a register of depth, with as much of each key.
template <class Isa, class T, class Item, int kRegisters>
ATTN_INLINE void dot_groups(Vec<Isa, T> (&sum)[kRegisters][kGroupedKeys], const Item* a, KeysAt b,
                            KeysAt fetched) noexcept {
  using Items = Vec<Isa, Item>;
  constexpr Index n = kWidth<Isa, T>, kGroup = 16;
  for (Index group = 0; group < kGroups<Isa, T>; ++group) {
    // Now and then a line: a core drops what it is asked for faster than memory answers.
    for (Index i = fetched.at % 64 == 0 ? group : kGroupedKeys; i < kGroupedKeys; i += kGroups<Isa, T>)
      fetch_later(fetched.key[i] + fetched.at);
    Items rows[kRegisters];
    for (int row = 0; row < kRegisters; ++row, a += n) rows[row] = in_register(load<Items>(a));
    for (int i = 0; i < kGroupedKeys; ++i) {
      const Items items = bit_cast<Items>(RepeatBits<Isa>::load(b.key[i] + b.at + group * kGroup));
      for (int row = 0; row < kRegisters; ++row)
        sum[row][i] = multiply_add<Isa>(rows[row], items, sum[row][i]);
    }
  }
}

/// Whether keys lie as Items do.
template <class T, class Item, DType kStorage>
inline constexpr bool kStraight =
    kInPairs<T, Item> ? kStorage == DType::bf16 : std::is_same_v<typename Storage<kStorage>::Item, Item>;

/// C (rows, keys) = a block of products; `fetched`: lines to fetch meanwhile.
template <class Isa, class T, class Item, DType kStorage, Index kStride, int kRegisters, class Finish>
ATTN_INLINE void dot_group_block(T* c, const Item* a, const std::byte* const* key,
                                 const std::byte* const* fetched, Index dims, Finish finish) noexcept {
  using V = Vec<Isa, T>;
  using In = TokenItems<Isa, Item, kStorage>;
  constexpr Index n = kWidth<Isa, T>;
  constexpr int kKeys = kGroupedKeys, kGroup = kGroupLanes<T>;
  V sum[kRegisters][kKeys];
  clear(sum);
  alignas(Isa::kBytes) Item converted[kKeys][2 * n];
  const std::byte* rows[kKeys];
  for (int i = 0; i < kKeys; ++i) rows[i] = reinterpret_cast<const std::byte*>(converted[i]);
  const Index whole = kInPairs<T, Item> ? dims / 2 : dims;
  Index k = 0, at = 0;
  if constexpr (kInPairs<T, Item> && In::kTwo) {
    for (; k + 2 * n <= whole; k += 2 * n, a += 2 * kRegisters * kGroups<Isa, T> * n) {
      for (int i = 0; i < kKeys; ++i) {
        Vec<Isa, Item> first, second;
        In::load(key[i] + at, first, second);
        store(converted[i], first);
        store(converted[i] + n, second);
      }
      dot_groups<Isa, T, Item, kRegisters>(sum, a, {rows, 0}, {fetched, at});
      dot_groups<Isa, T, Item, kRegisters>(sum, a + kRegisters * kGroups<Isa, T> * n, {rows, Isa::kBytes},
                                           {fetched, In::offset(k + n)});
      at = In::offset(k + 2 * n);
    }
  }
  for (; k + n <= whole; k += n, a += kRegisters * kGroups<Isa, T> * n) {
    if constexpr (kStraight<T, Item, kStorage>) {
      dot_groups<Isa, T, Item, kRegisters>(sum, a, {key, at}, {fetched, at});
    } else {
      for (int i = 0; i < kKeys; ++i) store(converted[i], In::load(key[i] + at));
      dot_groups<Isa, T, Item, kRegisters>(sum, a, {rows, 0}, {fetched, at});
    }
    at = In::offset(k + n);
  }
  const Index rest = kInPairs<T, Item> ? dims - 2 * k : dims - k;
  if (rest > 0) {
    for (int i = 0; i < kKeys; ++i) store(converted[i], In::load(key[i] + at, rest));
    dot_groups<Isa, T, Item, kRegisters>(sum, a, {rows, 0}, {fetched, at});
  }
  for (int of = 0; of < kRegisters; ++of) {
    for (int i = 0; i < kKeys; i += kGroup) {
      alignas(Isa::kBytes) T sums[n];
      store(sums, finish(sums, sum_groups<n, kGroup>(&sum[of][i]), 0));
      for (Index row = 0; row < kGroups<Isa, T>; ++row) {
        T* const out = c + (of * kGroups<Isa, T> + row) * kStride + i;
        __builtin_memcpy(out, sums + row * kGroup, kGroup * sizeof(T));
      }
    }
  }
}

/// dot_few_rows' work; room too is as there.
template <class Isa, class T, class Item, Index kStride, class Finish>
void dot_grouped_rows(T* c, const RowList<const Item>& a, const Tokens<Isa, T>& b, DType storage, Index keys,
                      Index dims, Item* room, Finish finish) noexcept {
  const auto run = [&]<DType kStorage, int kRegisters>() {
    constexpr Index kRows = kRegisters * kGroups<Isa, T>;
    const Index depth = depth_of<T, Item>(dims), block = kRows * round_up(depth, kWidth<Isa, T>);
    for (Index row = 0; row < a.size; row += kRows) {
      group_rows<Isa, Item, kRegisters>(room + row / kRows * block, a, row, depth);
    }
    TokenWalk read = b.read;
    PieceWalk fetch = b.pieces_ahead();
    for (Index at = 0; at < keys; at += kGroupedKeys) {
      const std::byte *key[kGroupedKeys], *fetched[kGroupedKeys];
      for (int i = 0; i < kGroupedKeys; ++i) key[i] = read.next(), fetched[i] = fetch.next();
      for (Index row = 0; row < a.size; row += kRows) {
        dot_group_block<Isa, T, Item, kStorage, kStride, kRegisters>(
            c + row * kStride + at, room + row / kRows * block, key, row == 0 ? fetched : key, dims, finish);
      }
    }
  };
  with_token_storage<T, Item>(storage, [&]<DType kStorage>() {
    if constexpr (kMostRegisters<Isa> > 2) {
      if (a.size > 2 * kGroups<Isa, T>) return run.template operator()<kStorage, kMostRegisters<Isa>>();
    }
    run.template operator()<kStorage, 2>();
  });
}

}  // namespace attncore
