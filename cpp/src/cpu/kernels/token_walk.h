// Where a sequence's tokens lie, one after another, and what of them is fetched before it is read.
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
  [[nodiscard]] ATTN_INLINE bool is_last() const noexcept { return run_ == 1 && left_ == 0; }
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

/// KV heads whose tokens lie beside each other: so many, so many bytes apart, this one among them.
struct Beside {
  Index heads = 1, stride = 0, head = 0;
};

/// What is read soon, in the order in which it lies: a token of each of the heads, then the next one.
class PieceWalk {
 public:
  /// From so many heads behind the first token on.
  ATTN_INLINE PieceWalk(const TokenWalk& tokens, const Beside& beside, Index skip) noexcept
      : tokens_(tokens), heads_(beside.heads), head_stride_(beside.stride) {
    pass();
    at_ += skip * stride_;
    left_ -= skip;
  }
  ATTN_INLINE const std::byte* next() noexcept { return take(1); }

  /// So many pieces from here on stand at one stride.
  [[nodiscard]] ATTN_INLINE Index run() const noexcept { return left_; }
  [[nodiscard]] ATTN_INLINE Index stride() const noexcept { return stride_; }
  /// The first of so many, at most run(), which are passed.
  ATTN_INLINE const std::byte* take(Index count) noexcept {
    const std::byte* const first = at_;
    left_ -= count;
    if (left_ > 0) {
      at_ += count * stride_;
    } else {
      pass();
    }
    return first;
  }

 private:
  /// On to the heads of the next token; or of one head to as many tokens as stand at one stride, or to the last for ever.
  ATTN_INLINE void pass() noexcept {
    const bool stays = heads_ == 1 && tokens_.is_last();
    left_ = stays ? kUnbounded : heads_ == 1 ? tokens_.run() : heads_;
    stride_ = stays ? 0 : heads_ == 1 ? tokens_.stride() : head_stride_;
    at_ = heads_ == 1 && !stays ? tokens_.take(left_) : tokens_.next();
  }

  TokenWalk tokens_;
  Index heads_, head_stride_, stride_, left_;  // stride_, left_: of the pieces at hand
  const std::byte* at_;
};

/// Fetches tokens in the order in which they lie, some lines a step: a core drops what it is asked for faster than memory answers.  Steps of
/// so many bytes, of a token or a part of it, come in runs, which need no bookkeeping within.
class Fetching {
 public:
  ATTN_INLINE Fetching(const PieceWalk& tokens, Index bytes) noexcept : tokens_(tokens), bytes_(bytes) {}

  /// For those who go through the same tokens once more.
  ATTN_INLINE void pause(bool paused) noexcept { paused_ = paused; }
  /// So many steps may follow upon a begin().
  template <Index kBytes>
  [[nodiscard]] ATTN_INLINE Index run() const noexcept {
    if (paused_) return kUnbounded;
    if (bytes_ <= kBytes) return tokens_.run();
    return left_ > 0 ? ceil_div(left_, kBytes) : 1;
  }
  template <Index kBytes>
  ATTN_INLINE void begin(Index steps) noexcept {
    if (paused_) return;
    if (bytes_ <= kBytes) {
      stride_ = tokens_.stride();
      at_ = tokens_.take(steps);
      return;
    }
    if (left_ <= 0) pass();
    stride_ = kBytes;
    at_ = next_;
    next_ += steps * kBytes;
    left_ -= steps * kBytes;
  }
  template <Index kBytes>
  ATTN_INLINE void step() noexcept {
    if (paused_) return;
    constexpr Index kLine = 64;
    for (Index i = 0; i < kBytes; i += kLine) fetch_later(at_ + i);
    at_ += stride_;
  }

 private:
  /// On to the next tokens that lie end to end.
  ATTN_INLINE void pass() noexcept {
    const Index tokens = tokens_.stride() == bytes_ ? tokens_.run() : 1;
    next_ = tokens_.take(tokens);
    left_ = tokens * bytes_;
  }

  PieceWalk tokens_;
  const std::byte *at_ = nullptr, *next_ = nullptr;
  Index bytes_, stride_ = 0, left_ = 0;  // left_: from next_ on
  bool paused_ = false;
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

}  // namespace attncore
