// Few rows against keys and values straight from where they lie (decoding): these are read but once, so that memory is what
// takes the time, and packing them would double the work.
//
// A score is a dot product along dim, in the lanes of a register that are summed at the end: other sums than gemm's, so that
// which of the two a sequence takes depends on its own rows and keys.
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

/// kRows rows of A (dim) from `first` on, those past its end being copies of the last, as dot_key reads them: register by register,
/// the rows one after another.  Where keys come as even and odd items, so do these.
template <class Isa, class T, class Item, DType kStorage, int kRows>
void interleave_rows(Item* out, const RowList<const Item>& a, Index first, Index depth) noexcept {
  using V = Vec<Isa, Item>;
  constexpr Index n = kWidth<Isa, T>;
  using Lanes = std::make_integer_sequence<int, kWidth<Isa, T>>;
  for (Index i = 0; i < kRows; ++i) {
    const Item* const row = a.at[min(first + i, a.size - 1)];
    Item* to = out + i * n;
    Index k = 0;
    if constexpr (LoadPair<Isa, T, kStorage>::kGiven && !kInPairs<T, Item>) {
      for (; k + 2 * n <= depth; k += 2 * n, to += 2 * kRows * n) {
        const V low = load<V>(row + k), high = load<V>(row + k + n);
        store(to, every_second<false>(low, high, Lanes{}));
        store(to + kRows * n, every_second<true>(low, high, Lanes{}));
      }
    }
    for (; k + n <= depth; k += n, to += kRows * n) store(to, load<V>(row + k));
    if (k == depth) continue;
    V rest{};
    __builtin_memcpy(&rest, row + k, static_cast<std::size_t>(depth - k) * sizeof(Item));
    store(to, rest);
  }
}

/// The dot products of kRows rows of A, interleaved, with a key, in lanes.  A key at a time, as they lie: reading four side by side, Zen 4
/// gets two thirds of the memory's speed.
template <class Isa, class T, class Item, DType kStorage, int kRows, class Depth>
ATTN_INLINE void dot_key(Vec<Isa, T> (&sum)[kRows], const Item* a, const std::byte* key,
                         const std::byte* fetched, Depth dims) noexcept {
  using Items = Vec<Isa, Item>;
  using In = TokenItems<Isa, Item, kStorage>;
  constexpr Index n = kWidth<Isa, T>;
  for (int row = 0; row < kRows; ++row) sum[row] = Vec<Isa, T>{};
  const auto add = [&](Items items) {
    for (int row = 0; row < kRows; ++row, a += n)
      sum[row] = multiply_add<Isa>(load<Items>(a), items, sum[row]);
  };
  const Index whole = kInPairs<T, Item> ? dims / 2 : dims;
  Index k = 0;
  if constexpr (In::kTwo) {
    for (; k + 2 * n <= whole; k += 2 * n) {
      Items first, second;
      fetch_later(fetched + In::offset(k));
      In::load(key + In::offset(k), first, second);
      add(first);
      add(second);
    }
  }
  for (; k + n <= whole; k += n) {
    const Index at = In::offset(k);
    fetch_later(fetched + at);
    add(In::load(key + at));
  }
  const Index rest = kInPairs<T, Item> ? dims - 2 * k : dims - k;
  if (rest <= 0) return;
  const Index at = In::offset(k);
  fetch_later(fetched + at);
  add(In::load(key + at, rest));
}

/// run(dims), the usual ones of a single row as constants, so that its loops have no counters: there is little else to do.
template <int kRows, class Run>
ATTN_INLINE void with_depth(Index dims, Run run) noexcept {
  if constexpr (kRows == 1) {
    if (dims == 64) return run(std::integral_constant<Index, 64>{});
    if (dims == 128) return run(std::integral_constant<Index, 128>{});
  }
  run(dims);
}

/// C (rows, keys) = finish(A (rows, dims) · Bᵀ); C has room for whole registers of keys, and for rows_at_once more.  `room`: for A,
/// interleaved.
template <class Isa, class T, class Item, Index kStride, class Finish>
void dot_few_rows(T* c, const RowList<const Item>& a, const Tokens<Isa, T>& b, DType storage, Index keys,
                  Index dims, Item* room, Finish finish) noexcept {
  with_token_storage<T, Item>(storage, [&]<DType kStorage>() {
    with_rows<Isa, T>(a.size, [&]<Index kRows>() {
      constexpr int n = kWidth<Isa, T>;
      constexpr Index kSums = min(kFewSums<Isa>, n), kFew = max(Index{1}, min(4, kSums / kRows));
      with_depth<kRows>(dims, [&](auto depth) {
        for (Index row = 0; row < a.size; row += kRows) {
          interleave_rows<Isa, T, Item, kStorage, kRows>(room, a, row, depth_of<T, Item>(dims));
          TokenWalk read = b.read;
          PieceWalk fetch = b.pieces_ahead();
          // So many keys, which lie at one stride and are fetched so, or each by itself.
          const auto dot = [&]<Index kKeys, bool kRun>(Index key) {
            Vec<Isa, T> sum[kRows * kKeys];
            const Index stride = read.stride(), fetched_stride = fetch.stride();
            const std::byte* in = kRun ? read.take(kKeys) : nullptr;
            const std::byte* fetched = kRun ? fetch.take(kKeys) : nullptr;
#pragma GCC unroll 16
            for (int i = 0; i < kKeys; ++i) {
              Vec<Isa, T> own[kRows];
              if constexpr (!kRun) in = read.next(), fetched = fetch.next();
              dot_key<Isa, T, Item, kStorage>(own, room, in, fetched, depth);
              if constexpr (kRun) in += stride, fetched += fetched_stride;
              for (int j = 0; j < kRows; ++j) sum[j * kKeys + i] = own[j];
            }
            alignas(Isa::kBytes) T sums[n];
            store(sums, finish(sums, sum_lanes<n, kRows * kKeys>(sum), 0));
            for (Index i = 0; i < kRows; ++i)
              __builtin_memcpy(c + (row + i) * kStride + key, sums + i * kKeys, kKeys * sizeof(T));
          };
          Index key = 0;
          const auto together = [&](Index count) { return min(read.run(), fetch.run()) >= count; };
          if constexpr (kRows == 1) {
            for (; b.near && keys - key >= kSums && together(kSums); key += kSums)
              dot.template operator()<kSums, true>(key);
          }
          for (; key < keys; key += kFew) {
            together(kFew) ? dot.template operator()<kFew, true>(key)
                           : dot.template operator()<kFew, false>(key);
          }
        }
      });
    });
  });
}

}  // namespace attncore
