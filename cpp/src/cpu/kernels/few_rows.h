// What decoding works on: a few rows, and some tokens.
#pragma once

#include "token_walk.h"

namespace attncore {

/// Some tokens of a KV head, their items beside each other, and what to fetch meanwhile, in the order in which it lies: memory is fastest at
/// that.
template <class Isa, class T>
class Tokens {
 public:
  /// The tokens `keys`; those up to `reach` are read next, beside others of the same heads: `beside`.  Items that do not lie beside each
  /// other are copied into `room`.
  Tokens(const KeySource& source, Range keys, Index reach, Index dims, std::byte* room,
         const Beside& beside = {}) noexcept
      : source_(source), beside_(beside) {
    with_key_storage<T>(source.storage, [&]<DType kStorage>() {
      constexpr Index kItem = sizeof(typename Storage<kStorage>::Item);
      constexpr Index kNearBytes = 128 << 10;
      const Index bytes = max(Index{1}, item_offset<kStorage>(dims, kItem)), end = max(keys.end, reach);
      near = (end - keys.begin) * bytes <= kNearBytes;
      find_ahead(keys, end, bytes);
      read = {source_, keys.begin, keys.end};
      if (source.dim_stride == kItem || kStorage == DType::i4) return;
      copy<kItem>(keys, dims, room);
      copies_ = {room, dims * kItem, kItem, source.storage};
      read = {copies_, 0, keys.size()};
    });
  }
  Tokens(const Tokens&) = delete;
  Tokens& operator=(const Tokens&) = delete;

  /// What to fetch while each token is read: far enough ahead that memory answers in time.
  [[nodiscard]] ATTN_INLINE PieceWalk pieces_ahead() const noexcept { return {ahead, beside_, skip_}; }
  /// The same where the tokens are gone through several times.
  [[nodiscard]] ATTN_INLINE PieceWalk next_pieces() const noexcept {
    return beside_.heads > 1 ? pieces_ahead() : PieceWalk(next_tile, beside_, 0);
  }

  TokenWalk read;
  TokenWalk ahead, next_tile;
  bool near;  // what there is to read may well be in the second cache: then speed is not memory's

 private:
  template <Index kItem>
  ATTN_INLINE void copy(Range keys, Index dims, std::byte* to) noexcept {
    const bool turned = source_.pages == nullptr && source_.token_stride == kItem;
    if (turned) return copy_turned<kItem>(source_.token(keys.begin), keys.size(), dims, to);
    for (Index i = 0; i < keys.size(); ++i) {
      const std::byte* const token = read.next();
      for (Index dim = 0; dim < dims; ++dim)
        __builtin_memcpy(to + (i * dims + dim) * kItem, token + dim * source_.dim_stride, kItem);
    }
  }

  /// Of tokens that lie beside each other some at once, so that each line is read once; a dim is one stream of many, too many for
  /// the hardware to follow.
  template <Index kItem>
  ATTN_INLINE void copy_turned(const std::byte* from, Index tokens, Index dims, std::byte* to) noexcept {
    constexpr Index kAtOnce = 32, kDimsAhead = 16;
    const Index stride = source_.dim_stride;
    for (Index first = 0; first < tokens; first += kAtOnce) {
      const Index count = min(kAtOnce, tokens - first);
      for (Index dim = 0; dim < dims; ++dim) {
        const std::byte* const line = from + first * kItem + dim * stride;
        for (Index at = 0; at < kAtOnce * kItem; at += 64)
          __builtin_prefetch(line + kDimsAhead * stride + at, 0, 3);
        for (Index i = 0; i < count; ++i)
          __builtin_memcpy(to + ((first + i) * dims + dim) * kItem, line + i * kItem, kItem);
      }
    }
  }

  /// Each of several heads fetches its share of as many tokens of all heads as come next.
  ATTN_INLINE void find_ahead(Range keys, Index end, Index bytes) noexcept {
    constexpr Index kFetchedBytes = 8192, kMostAhead = 64;
    next_tile = {source_, keys.end, end};
    if (beside_.heads == 1) {
      const Index distance = max(Index{1}, min(kMostAhead, kFetchedBytes / bytes));
      ahead = {source_, min(keys.begin + distance, end), end};
      return;
    }
    const Index before = beside_.head * keys.size();
    skip_ = before % beside_.heads;
    first_head_ = source_;
    first_head_.data -= beside_.head * beside_.stride;
    ahead = {first_head_, min(keys.end + before / beside_.heads, end), end};
  }

  const KeySource source_;
  KeySource first_head_, copies_;
  const Beside beside_;
  Index skip_ = 0;
};

/// How many of `rows` rows are multiplied at once, a power of two, at most the lanes of a register.
template <class Isa, class T>
ATTN_INLINE Index rows_at_once(Index rows) noexcept {
  constexpr Index n = min(8, kWidth<Isa, T>);
  return rows == 1 ? 1 : rows == 2 || n == 2 ? 2 : rows <= 4 || n == 4 ? min(4, n) : n;
}

/// run.template operator()<kRows>() with kRows = rows_at_once(rows).
template <class Isa, class T, class Run>
ATTN_INLINE void with_rows(Index rows, Run run) noexcept {
  constexpr Index n = min(8, kWidth<Isa, T>);
  const Index at_once = rows_at_once<Isa, T>(rows);
  if (at_once == 1) return run.template operator()<1>();
  if (at_once == 2) return run.template operator()<2>();
  if (at_once == 4) return run.template operator()<min(4, n)>();
  run.template operator()<n>();
}

/// Rows of several matrices.
template <class T>
struct RowList {
  T* at[2 * kDirectRows];
  Index size = 0;
  ATTN_INLINE void add(T* row) noexcept { at[size++] = row; }
};

/// Sums that stay in registers, beside what they are made of.
template <class Isa>
inline constexpr int kFewSums = Isa::kRows * Isa::kColumns > 16 ? 16 : 8;

/// run(i) for i < n, a constant: of an array that g++ is to keep in registers.
template <int n, class Run>
ATTN_INLINE void each_of(Run run) noexcept {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (run(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, n>{});
}

/// One store each: for `{}` g++ 12 calls upon memset.
template <class V, int kRows, int kColumns>
ATTN_INLINE void clear(V (&sum)[kRows][kColumns]) noexcept {
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) sum[i][j] = V{};
  }
}

/// What few rows read: `count` dims of a token in a register, and where item i of it begins.
template <class Isa, class Item, DType kStorage>
struct TokenItems {
  static constexpr Index kItem = sizeof(typename Storage<kStorage>::Item);
  static ATTN_INLINE constexpr Index offset(Index i) noexcept { return item_offset<kStorage>(i, kItem); }
  using Pair = LoadPair<Isa, Item, kStorage>;
  static constexpr bool kTwo = Pair::kGiven;  // registers at once: the even items, the odd ones
  static ATTN_INLINE void load(const std::byte* p, Vec<Isa, Item>& even, Vec<Isa, Item>& odd) noexcept
    requires kTwo
  {
    Pair::load(p, even, odd);
  }
  static ATTN_INLINE Vec<Isa, Item> load(const std::byte* p) noexcept {
    return Widen<Isa, Item, kStorage>::load(p);
  }
  static ATTN_INLINE Vec<Isa, Item> load(const std::byte* p, Index count) noexcept {
    return load_items<Isa, Item, kStorage>(p, kItem, count);
  }
};
template <class Isa, DType kStorage>
struct TokenItems<Isa, Bf16Pair, kStorage> {
  static constexpr Index kItem = sizeof(typename Storage<kStorage>::Item);
  static ATTN_INLINE constexpr Index offset(Index i) noexcept { return item_offset<kStorage>(2 * i, kItem); }
  using Pair = LoadPairs<Isa, kStorage>;
  static constexpr bool kTwo = Pair::kTwo;  // registers at once, in order
  static ATTN_INLINE void load(const std::byte* p, U32<Isa>& first, U32<Isa>& second) noexcept
    requires kTwo
  {
    Pair::load(p, first, second);
  }
  static ATTN_INLINE U32<Isa> load(const std::byte* p) noexcept { return Pair::load(p); }
  static ATTN_INLINE U32<Isa> load(const std::byte* p, Index count) noexcept {
    return load_pairs<Isa, kStorage>(p, kItem, count);
  }
};

/// run.template operator()<kStorage>() for what keys may be stored as; float32 is rounded to pairs in packed tiles only.
template <class T, class Item, class Run>
ATTN_INLINE void with_token_storage(DType storage, Run run) noexcept {
  if constexpr (kInPairs<T, Item>) {
    with_exact_storage(storage, run);
  } else {
    with_key_storage<T>(storage, run);
  }
}

}  // namespace attncore
