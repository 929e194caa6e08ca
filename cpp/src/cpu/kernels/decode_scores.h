// Few rows against keys and values straight from where they lie (decoding): these are read but once, so that memory is what
// takes the time, and packing them would double the work.
//
// A score is a dot product along dim, in the lanes of a register that are summed at the end: other sums than gemm's, so that
// which of the two a sequence takes depends on its own number of rows.
#pragma once

#include "few_rows.h"

namespace attncore {

/// One step of sum_lanes: of each group of 2 kHalf lanes of a, then of b, the halves are added.
template <int kHalf, class V, int... I>
ATTN_INLINE V add_halves(V a, V b, std::integer_sequence<int, I...>) noexcept {
  return __builtin_shufflevector(a, b, (I / kHalf * 2 * kHalf + I % kHalf)...) +
         __builtin_shufflevector(a, b, (I / kHalf * 2 * kHalf + kHalf + I % kHalf)...);
}

/// Lane i of the result is the sum of v[i]'s lanes, i < kCount, a power of two; halves are added to halves whatever kCount is.
template <int kLanes, int kCount, int kHalf = kLanes / 2, class V>
ATTN_INLINE V sum_lanes(const V* v) noexcept {
  using Lanes = std::make_integer_sequence<int, kLanes>;
  constexpr int kLeft = max(1, kCount / 2);
  V next[kLeft];
  for (int i = 0; i < kLeft; ++i) {
    next[i] = add_halves<kHalf>(v[min(2 * i, kCount - 1)], v[min(2 * i + 1, kCount - 1)], Lanes{});
  }
  if constexpr (kHalf == 1) {
    return next[0];
  } else {
    return sum_lanes<kLanes, kLeft, kHalf / 2>(next);
  }
}

/// The dot products of A's rows (dim) with a key, in lanes.  A key at a time, as they lie: reading four side by side, Zen 4 gets two
/// thirds of the memory's speed.
template <class Isa, class T, class Item, DType kStorage, int kRows, class Depth>
ATTN_INLINE void dot_key(Vec<Isa, T> (&sum)[kRows], const FewRows<const Item, kRows>& a, const std::byte* key,
                         const std::byte* fetched, Depth depth) noexcept {
  using Items = Vec<Isa, Item>;
  using In = TokenItems<Isa, Item, kStorage>;
  constexpr Index n = kWidth<Isa, T>, kItem = In::kBytes;
  for (int row = 0; row < kRows; ++row) sum[row] = Vec<Isa, T>{};
  const auto add = [&](Index k, auto load_a, auto load_b) {
    fetch_later(fetched + item_offset<kStorage>(k, kItem));
    const Items items = load_b(key + item_offset<kStorage>(k, kItem));
    for (int row = 0; row < kRows; ++row)
      sum[row] = multiply_add<Isa>(load_a(a.row[row] + k), items, sum[row]);
  };
  Index k = 0;
  using Pair = LoadPair<Isa, T, kStorage>;
  if constexpr (Pair::kGiven && !kInPairs<T, Item>) {
    for (; k + 2 * n <= depth; k += 2 * n) {  // A's rows are split alike: split_pairs
      Vec<Isa, T> even, odd;
      fetch_later(fetched + k * kItem);
      Pair::load(key + k * kItem, even, odd);
      for (int row = 0; row < kRows; ++row) {
        sum[row] = load<Items>(a.row[row] + k) * even + sum[row];
        sum[row] = load<Items>(a.row[row] + k + n) * odd + sum[row];
      }
    }
  }
  const Index whole = kInPairs<T, Item> ? depth / 2 : depth;
  for (; k + n <= whole; k += n) {
    add(k, [](const Item* p) { return load<Items>(p); }, [](const std::byte* p) { return In::load(p); });
  }
  const Index rest = kInPairs<T, Item> ? depth - 2 * k : depth - k;
  if (rest > 0) {
    const auto load_rest = [&](const Item* p) {
      Items v{};
      __builtin_memcpy(&v, p, static_cast<std::size_t>(depth_of<T, Item>(rest)) * sizeof(Item));
      return v;
    };
    add(k, load_rest, [&](const std::byte* p) { return In::load(p, rest); });
  }
}

/// run(depth), the usual ones of a single row as constants, so that its loops have no counters: there is little else to do.
template <int kRows, class Run>
ATTN_INLINE void with_depth(Index depth, Run run) noexcept {
  if constexpr (kRows == 1) {
    if (depth == 64) return run(std::integral_constant<Index, 64>{});
    if (depth == 128) return run(std::integral_constant<Index, 128>{});
  }
  run(depth);
}

/// kRows rows of C over the next kKeys keys, which begin with `key`.
template <class Isa, class T, class Item, DType kStorage, int kRows, int kKeys, class Depth, class Finish>
ATTN_INLINE void dot_block(T* const* c, const FewRows<const Item, kRows>& a, TokenWalk& read,
                           TokenWalk& fetch, Index rows, Index key, Depth depth, Finish finish) noexcept {
  using V = Vec<Isa, T>;
  V sum[kRows][kKeys];
#pragma GCC unroll 16
  for (int i = 0; i < kKeys; ++i) {
    V own[kRows];
    dot_key<Isa, T, Item, kStorage>(own, a, read.next(), fetch.next(), depth);
    for (int row = 0; row < kRows; ++row) sum[row][i] = own[row];
  }
  alignas(Isa::kBytes) T sums[kWidth<Isa, T>];
  store(sums, finish(sums, sum_lanes<kWidth<Isa, T>, kRows * kKeys>(&sum[0][0]), 0));
  for (Index row = 0; row < rows; ++row) {
    __builtin_memcpy(c[row] + key, sums + row * kKeys, kKeys * sizeof(T));
  }
}

/// Whether dot_few_rows takes rows of A that split_pairs has been over.
template <class Isa, class T>
ATTN_INLINE bool takes_pairs(DType storage) noexcept {
  return with_key_storage<T>(storage, []<DType kStorage>() { return LoadPair<Isa, T, kStorage>::kGiven; });
}

/// Of each two registers of a row, the even elements and the odd ones.
template <class Isa, class T>
ATTN_INLINE void split_pairs(T* row, Index depth) noexcept {
  using V = Vec<Isa, T>;
  constexpr Index n = kWidth<Isa, T>;
  using Lanes = std::make_integer_sequence<int, kWidth<Isa, T>>;
  for (Index k = 0; k + 2 * n <= depth; k += 2 * n) {
    const V a = load<V>(row + k), b = load<V>(row + k + n);
    store(row + k, every_second<false>(a, b, Lanes{}));
    store(row + k + n, every_second<true>(a, b, Lanes{}));
  }
}

/// C (rows, keys) = finish(A (rows, depth) · Bᵀ); C has room for whole registers of keys.
template <class Isa, class T, class Item, class Finish>
void dot_few_rows(const RowList<T>& c, const RowList<const Item>& a, const Tokens<Isa, T>& b, DType storage,
                  Index keys, Index depth, Finish finish) noexcept {
  with_token_storage<T, Item>(storage, [&]<DType kStorage>() {
    with_rows<Isa, T>(a.size, [&]<Index kRows>() {
      constexpr Index kSums = min(kFewSums<Isa>, kWidth<Isa, T>), kFew = max(Index{1}, min(4, kSums / kRows));
      constexpr Index kMany = kRows == 1 ? kSums : kFew;
      with_depth<kRows>(depth, [&](auto items) {
        for (Index row = 0; row < a.size; row += kRows) {
          const FewRows<const Item, kRows> of_a(a, row);
          TokenWalk read = b.read, fetch = b.ahead;
          Index key = 0;
          const auto dot = [&]<Index kKeys>() {
            dot_block<Isa, T, Item, kStorage, kRows, kKeys>(c.at + row, of_a, read, fetch,
                                                            min(kRows, a.size - row), key, items, finish);
            key += kKeys;
          };
          while (keys - key >= kMany) dot.template operator()<kMany>();
          while (key < keys) dot.template operator()<kFew>();
        }
      });
    });
  });
}

}  // namespace attncore
