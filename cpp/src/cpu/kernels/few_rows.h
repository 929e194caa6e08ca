// What decoding works on: a few rows, and the tokens of a key tile.
#pragma once

#include "../tile/gemm.h"

namespace attncore {

inline constexpr Index kDirectRows =
    8;  // of a sequence and KV head: up to here, packing costs more than it saves

/// Where the tokens of a key tile stand, their items beside each other.
template <class Isa, class T>
struct Tokens {
  static constexpr Index kKeys = Isa::template kKeyTile<T>;
  const std::byte* at[kKeys];

  /// Where the tokens `keys` lie; those from `end` on are as the one before.
  void find(const KeySource& source, Range keys, Index end) noexcept {
    const Index last = max(0, min(keys.end, end) - 1 - keys.begin);
    source.each_token(min(keys.begin, end - 1), last + 1,
                      [&](Index i, const std::byte* token) { at[i] = token; });
    for (Index i = last + 1; i < keys.size(); ++i) at[i] = at[last];
  }

  /// The same, but their items stand beside each other: in copies, in `room`, if they do not lie so.
  void find(const KeySource& source, Range keys, Index dims, std::byte* room) noexcept {
    find(source, keys, keys.end);
    with_key_storage<T>(source.storage, [&]<DType kStorage>() {
      constexpr Index kItem = sizeof(typename Storage<kStorage>::Item);
      if (source.dim_stride == kItem || kStorage == DType::i4) return;
      for (Index i = 0; i < keys.size(); ++i) {
        std::byte* const copy = room + i * dims * kItem;
        for (Index dim = 0; dim < dims; ++dim) {
          __builtin_memcpy(copy + dim * kItem, at[i] + dim * source.dim_stride, kItem);
        }
        at[i] = copy;
      }
    });
  }
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

}  // namespace attncore
