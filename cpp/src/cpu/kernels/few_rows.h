// What decoding works on: a few rows, and the tokens of a key tile.
#pragma once

#include "task.h"

namespace attncore {

inline constexpr Index kDirectRows =
    8;  // of a sequence and KV head: up to here, packing costs more than it saves

/// Fetches a line into the second cache: into the first, Zen 4 reads at two thirds of the speed.
ATTN_INLINE void fetch_later(const std::byte* line) noexcept { __builtin_prefetch(line, 0, 2); }
ATTN_INLINE void fetch_token(const std::byte* token, Index bytes) noexcept {
  constexpr Index kCacheLine = 64;
  for (Index at = 0; at < bytes; at += kCacheLine) fetch_later(token + at);
}

/// Where the tokens of a key tile stand, their items beside each other, and what to fetch meanwhile, in the order in which it lies:
/// memory is fastest at that.
template <class Isa, class T>
class Tokens {
 public:
  /// The tokens `keys`; those up to `reach` are read next.  Items that do not lie beside each other are copied into `room`.
  void find(const KeySource& source, Range keys, Index reach, Index dims, std::byte* room) noexcept {
    with_key_storage<T>(source.storage, [&]<DType kStorage>() {
      constexpr Index kItem = sizeof(typename Storage<kStorage>::Item);
      const Index bytes = max(Index{1}, item_offset<kStorage>(dims, kItem));
      const Index distance = max(Index{1}, min(kMostAhead, kFetchedBytes / bytes));
      const Index even = round_up(keys.size(), 2),
                  wanted = even + max(distance, keys.size());  // for pairs: a last one has a partner
      const Index found = min(wanted, max(keys.end, reach) - keys.begin);
      source.each_token(keys.begin, found, [&](Index i, const std::byte* token) { place_[i] = token; });
      for (Index i = found; i < wanted; ++i) place_[i] = place_[found - 1];
      at = place_;
      ahead = place_ + distance;
      next_tile = place_ + keys.size();
      if (source.dim_stride == kItem || kStorage == DType::i4) return;
      for (Index i = 0; i < keys.size(); ++i) {
        std::byte* const copy = room + i * dims * kItem;
        for (Index dim = 0; dim < dims; ++dim) {
          __builtin_memcpy(copy + dim * kItem, place_[i] + dim * source.dim_stride, kItem);
        }
        copy_[i] = copy_[even - 1] = copy;
      }
      at = copy_;
    });
  }

  const std::byte* const* at;
  const std::byte* const* ahead;  // to fetch while each token is read: far enough that memory answers in time
  const std::byte* const* next_tile;  // to fetch where the tile is gone through several times

 private:
  static constexpr Index kKeys = Isa::template kKeyTile<T>, kFetchedBytes = 4096, kMostAhead = 64;
  const std::byte* place_[kKeys + max(kMostAhead, kKeys)];
  const std::byte* copy_[kKeys];
};

/// run.template operator()<kRows>() with kRows a power of two, at most the lanes of a register: the rows past `rows` are
/// copies of the last.
template <class Isa, class T, class Run>
ATTN_INLINE void with_rows(Index rows, Run run) noexcept {
  constexpr Index n = kWidth<Isa, T>;
  if (rows == 1) return run.template operator()<1>();
  if (rows == 2 || n == 2) return run.template operator()<2>();
  if (rows <= 4 || n == 4) return run.template operator()<min(4, n)>();
  run.template operator()<min(8, n)>();
}

/// Rows of one matrix, or of several.
template <class T>
struct RowList {
  T* at[kDirectRows];
  Index size = 0;
  ATTN_INLINE void add(T* row) noexcept { at[size++] = row; }
};

/// kRows rows of a list from `first` on; those past its end are copies of the last.
template <class T, int kRows>
struct FewRows {
  T* row[kRows];
  ATTN_INLINE FewRows(const RowList<T>& a, Index first) noexcept {
    for (Index i = 0; i < kRows; ++i) row[i] = a.at[min(first + i, a.size - 1)];
  }
};

/// Sums that stay in registers, beside what they are made of.
template <class Isa>
inline constexpr int kFewSums = Isa::kRows * Isa::kColumns > 16 ? 16 : 8;

/// One store each: for `{}` g++ 12 calls upon memset.
template <class V, int kRows, int kColumns>
ATTN_INLINE void clear(V (&sum)[kRows][kColumns]) noexcept {
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) sum[i][j] = V{};
  }
}

/// What few rows read: `count` dims of a token in a register, and the bytes between such registers' first items.
template <class Isa, class Item, DType kStorage>
struct TokenItems {
  static constexpr Index kBytes = sizeof(typename Storage<kStorage>::Item);
  static ATTN_INLINE Vec<Isa, Item> load(const std::byte* p) noexcept {
    return Widen<Isa, Item, kStorage>::load(p);
  }
  static ATTN_INLINE Vec<Isa, Item> load(const std::byte* p, Index count) noexcept {
    return load_items<Isa, Item, kStorage>(p, kBytes, count);
  }
};
template <class Isa>
struct TokenItems<Isa, Bf16Pair, DType::bf16> {
  static constexpr Index kBytes = sizeof(Bf16Pair);
  static ATTN_INLINE U32<Isa> load(const std::byte* p) noexcept { return attncore::load<U32<Isa>>(p); }
  static ATTN_INLINE U32<Isa> load(const std::byte* p, Index count) noexcept {
    return load_pairs<Isa, DType::bf16>(p, kBytes / 2, count);
  }
};

/// run.template operator()<kStorage>() for what keys may be stored as; pairs are of bfloat16.
template <class T, class Item, class Run>
ATTN_INLINE void with_token_storage(DType storage, Run run) noexcept {
  if constexpr (kInPairs<T, Item>) {
    run.template operator()<DType::bf16>();
  } else {
    with_key_storage<T>(storage, run);
  }
}

}  // namespace attncore
