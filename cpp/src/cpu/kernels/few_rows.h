// What decoding works on: a few rows, and the tokens of a key tile.
#pragma once

#include "task.h"

namespace attncore {

/// Tokens one after another, along a stride and from page to page; after the last one it stays there.
class TokenWalk {
 public:
  ATTN_INLINE TokenWalk() noexcept = default;
  /// From token `first` of a source on, before `end`; at least one.
  ATTN_INLINE TokenWalk(const KeySource& source, Index first, Index end) noexcept
      : source_(&source), run_(max(Index{1}, end - first)) {
    const Index start = end - run_;
    token_ = source.token(start);
    stride_ = source.token_stride;
    if (source.pages == nullptr) return;
    page_ = source.pages + start / source.page_size;
    begin_run(run_, source.page_size - start % source.page_size);
  }

  ATTN_INLINE const std::byte* next() noexcept {
    const std::byte* const token = token_;
    if (--run_ > 0) {
      token_ += stride_;
    } else {
      end_run();
    }
    return token;
  }

  /// So many tokens from here on stand at one stride.
  [[nodiscard]] ATTN_INLINE Index run() const noexcept { return run_; }
  [[nodiscard]] ATTN_INLINE Index stride() const noexcept { return stride_; }
  /// The first of so many, at most run(), which are passed.
  ATTN_INLINE const std::byte* take(Index count) noexcept {
    const std::byte* const first = token_;
    token_ += (count - 1) * stride_;
    run_ -= count - 1;
    next();
    return first;
  }
  ATTN_INLINE void skip(Index count) noexcept {
    for (Index here = 0; count > 0; count -= here) {
      here = min(count, run_);
      take(here);
    }
  }

 private:
  ATTN_INLINE void begin_run(Index left, Index in_page) noexcept {
    run_ = min(left, in_page);
    left_ = left - run_;
  }
  ATTN_INLINE void end_run() noexcept {
    if (left_ == 0) {
      run_ = 1;
      return;
    }
    token_ = source_->data + *++page_ * source_->page_stride;
    begin_run(left_, source_->page_size);
  }

  const KeySource* source_ = nullptr;
  const std::byte* token_ = nullptr;
  Index run_ = 1, left_ = 0, stride_ = 0;  // tokens from here on in this page; in the pages after it
  const std::int32_t* page_ = nullptr;
};

/// Fetches a line into the second cache: into the first, Zen 4 reads at two thirds of the speed.
ATTN_INLINE void fetch_later(const std::byte* line) noexcept { __builtin_prefetch(line, 0, 2); }

/// Fetches tokens in the order in which they lie, some lines now and then: a core drops what it is asked for faster than memory answers.
class Fetching {
 public:
  /// Tokens of so many bytes, over as many steps as go through a tile `times` times.
  ATTN_INLINE Fetching(const TokenWalk& tokens, Index bytes, Index times) noexcept
      : tokens_(tokens), bytes_(bytes), times_(times), left_(bytes), wait_(times) {
    at_ = tokens_.next();
  }
  template <Index kBytes>
  ATTN_INLINE void step() noexcept {
    constexpr Index kLine = 64;
    if (--wait_ > 0) return;
    wait_ = times_;
    for (Index i = 0; i < kBytes; i += kLine) fetch_later(at_ + i);
    at_ += kBytes;
    left_ -= kBytes;
    if (left_ > 0) return;
    at_ = tokens_.next();
    left_ = bytes_;
  }

 private:
  TokenWalk tokens_;
  const std::byte* at_;
  Index bytes_, times_, left_, wait_;
};

/// What is read soon: lines in the order in which tokens lie.
class FetchedLines {
 public:
  /// Tokens of so many bytes, which are read so many at once.
  ATTN_INLINE FetchedLines(const TokenWalk& tokens, Index bytes, Index at_once = 1) noexcept
      : tokens_(tokens), bytes_(bytes) {
    tokens_.skip(at_once - 1);
  }

  ATTN_INLINE void fetch(Index count) noexcept {
    while (count > 0) {
      if (left_ == 0) pass();
      const std::byte* const at = at_;
      const Index here = min(count, left_);
#pragma GCC unroll 4
      for (Index i = 0; i < here; ++i) fetch_later(at + i * kLine);
      at_ = at + here * kLine;
      left_ -= here;
      count -= here;
    }
  }

 private:
  static constexpr Index kLine = 64;

  /// On to the next tokens that lie end to end.
  ATTN_INLINE void pass() noexcept {
    const Index tokens = tokens_.stride() == bytes_ ? tokens_.run() : 1;
    at_ = tokens_.take(tokens);
    left_ = ceil_div(tokens * bytes_, kLine);
  }

  TokenWalk tokens_;
  const std::byte* at_ = nullptr;
  Index bytes_, left_ = 0;
};

/// kCount tokens: where they lie at one stride, or each by itself.
template <Index kCount>
class TokenBlock {
 public:
  ATTN_INLINE explicit TokenBlock(TokenWalk& walk) noexcept { take(walk); }

  ATTN_INLINE void take(TokenWalk& walk) noexcept {
    stride_ = walk.stride();
    first_ = walk.run() >= kCount ? walk.take(kCount) : nullptr;
    if (first_ != nullptr) return;
    for (const std::byte*& token : token_) token = walk.next();
  }

  /// Where they lie so, the first.
  [[nodiscard]] ATTN_INLINE const std::byte* first() const noexcept { return first_; }
  [[nodiscard]] ATTN_INLINE Index stride() const noexcept { return stride_; }
  [[nodiscard]] ATTN_INLINE const std::byte* operator[](Index i) const noexcept {
    return first_ != nullptr ? first_ + i * stride_ : token_[i];
  }

 private:
  const std::byte* first_;
  Index stride_;
  const std::byte* token_[kCount];
};

/// The tokens of a key tile, their items beside each other, and what to fetch meanwhile, in the order in which it lies: memory is
/// fastest at that.
template <class Isa, class T>
class Tokens {
 public:
  /// The tokens `keys`; those up to `reach` are read next.  Items that do not lie beside each other are copied into `room`.
  Tokens(const KeySource& source, Range keys, Index reach, Index dims, std::byte* room) noexcept
      : source_(source) {
    with_key_storage<T>(source.storage, [&]<DType kStorage>() {
      constexpr Index kItem = sizeof(typename Storage<kStorage>::Item), kFetchedBytes = 8192, kMostAhead = 64;
      constexpr Index kNearBytes = 128 << 10;
      const Index bytes = max(Index{1}, item_offset<kStorage>(dims, kItem));
      const Index distance = max(Index{1}, min(kMostAhead, kFetchedBytes / bytes));
      const Index end = max(keys.end, reach);
      near = (end - keys.begin) * bytes <= kNearBytes;
      read = {source_, keys.begin, keys.end};
      ahead = {source_, min(keys.begin + distance, end), end};
      next_tile = {source_, keys.end, end};
      if (source.dim_stride == kItem || kStorage == DType::i4) return;
      for (Index i = 0; i < keys.size(); ++i) {
        const std::byte* const token = read.next();
        for (Index dim = 0; dim < dims; ++dim) {
          __builtin_memcpy(room + (i * dims + dim) * kItem, token + dim * source.dim_stride, kItem);
        }
      }
      copies_ = {room, dims * kItem, kItem, source.storage};
      read = {copies_, 0, keys.size()};
    });
  }
  Tokens(const Tokens&) = delete;
  Tokens& operator=(const Tokens&) = delete;

  TokenWalk read;
  TokenWalk ahead;      // to fetch while each token is read: far enough that memory answers in time
  TokenWalk next_tile;  // to fetch where the tile is gone through several times
  bool near;            // what there is to read may well be in the second cache: then speed is not memory's

 private:
  const KeySource source_;
  KeySource copies_;
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
