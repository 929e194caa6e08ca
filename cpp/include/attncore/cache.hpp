// attncore's caches: the keys and values of the tokens so far, for generation.  A cache is that of one layer; a model has
// a list of them.
//
// Any number of threads may read a cache at once (attend, gather, state, lengths, …).  A call that changes it (append,
// truncate, accept, add, fork, free, restore) must be alone: a call that conflicts throws InUse at once, and has changed nothing.
// Destroying or moving a cache is no such call: nobody may use it then.  What was moved from may only be assigned to or destroyed.
//
// All calls throw std::invalid_argument, DTypeError, std::bad_alloc and InUse; a call that throws leaves the cache as it was.
#pragma once

#include <attncore/layers.hpp>

namespace attncore {

/// What a cache holds, and how.
struct CacheSettings {
  Index kv_heads = 1, dim = 1;
  Index value_dim = 0;  ///< 0: dim
  /// Latent attention: values are the first value_dim dims of keys, which alone are appended and stored.
  bool value_in_key = false;
  /// Of storage: f32, f64, f16, bf16; or i8, i4, f8, which have a factor for each (token, head), so that x ≈ stored ·
  /// factor.  The factor is max|x| / 127, / 7 and / 448 (1 if all are 0, and at least 2⁻¹²⁶), the error at most factor / 2
  /// for i8 and i4, and the larger of |x| / 16 and factor / 1024 for f8.
  DType dtype = DType::f32;
  /// Keys are rotated as they are appended (with value_in_key: the dims past the values); its positions are not used.
  std::optional<Rope> rotary{};
  Index window = kUnbounded;  ///< a query sees its own key and at most so many before it
};

/// In bytes: address space, and what tokens take of it.
struct CacheMemory {
  Index reserved = 0, used = 0;
};

/// There is no room: neither address space, nor tokens of an entry, nor pages.
class CacheFull : public std::bad_alloc {
 public:
  explicit CacheFull(const std::string& what) : text_(std::make_shared<const std::string>(what)) {}
  [[nodiscard]] const char* what() const noexcept override { return text_->c_str(); }

 private:
  std::shared_ptr<const std::string> text_;
};

/// What is appended.
struct NewTokens {
  Tensor key{};      ///< (entries, kv_heads, tokens, dim), any floats: rounded to the cache's dtype
  Tensor value{};    ///< (entries, kv_heads, tokens, value_dim), any floats; not given with value_in_key
  Tensor lengths{};  ///< optional ints, (entries, 1, 1, 1): tokens past them are not appended
  Tensor
      positions{};  ///< optional ints, (1 or entries, 1, tokens, 1), of `rotary`; default: the entry's length, …
};

/// Tokens as they are stored, packed along the token axis; with value_in_key without values and their scales.
struct StoredTokens {
  Tensor key{}, value{};              ///< (1, kv_heads, tokens, dim), of the cache's dtype
  Tensor key_scale{}, value_scale{};  ///< (1, kv_heads, tokens, 1), f32; of i8, i4 and f8
};

/// All that a cache holds.
struct CacheState {
  /// The tokens of entry 0, of entry 1, …; of a paged cache those of pages 0, 1, …, of which each entry has some.
  StoredTokens tokens{};
  std::vector<Index> lengths{};  ///< of each entry; of a paged cache −1 for numbers that are free
  /// Paged: tokens of each page; the pages of each entry; how many of an entry's first pages have been given back.
  std::vector<Index> page_lengths{};
  std::vector<std::vector<Index>> tables{};
  std::vector<Index> given_back{};
  Workspace memory;  ///< what `tokens` points to, where the cache made it
};

/// One contiguous buffer for each entry's keys and one for its values, (entry, kv_head, token, dim).  Address space is
/// reserved for `capacity` tokens; it becomes memory where tokens are written, so that nothing is ever copied.  With a
/// window all tokens are kept: PagedKVCache gives them back.
class KVCache {
 public:
  /// Entries 0 … batch − 1, empty.  Throws std::invalid_argument, DTypeError, CacheFull.
  KVCache(Index batch, Index capacity, const CacheSettings& settings);
  ~KVCache();
  KVCache(KVCache&&) noexcept;
  KVCache& operator=(KVCache&&) noexcept;

  /// Appends tokens to the `entries` (distinct ints, (entries, 1, 1, 1); not given: all, in their order).  Throws
  /// std::invalid_argument (also for NaN and infinities that i8, i4 and f8 cannot store), DTypeError, CacheFull, InUse,
  /// Cancelled; every entry is then as it was.
  void append(const NewTokens& tokens, const Tensor& entries = {}, const Options& options = {});

  /// problem.out, lse = attention of problem.query (entries, heads, queries, dim) to all that the entries hold.  The last
  /// query stands at the last token.  The problem's key, value, scales, packing and paging are the cache's and must not be
  /// given, nor key_lengths, query_offset and segments.  Masks and biases broadcast to (entries, heads, queries, length
  /// of the longest of these entries).  score.left is cut to the cache's window; score.causal is false by default, as
  /// everywhere (Python's caches have it true).  `rotate_query` rotates queries by the numbers of their tokens, the last
  /// one's being the entry's length − 1 (in a tree: by depth), as append rotates keys that have no positions of their own.
  /// Throws as forward(), and InUse.
  void attend(const Problem& problem, const Tensor& entries = {}, const Options& options = {},
              bool rotate_query = false) const;

  /// Forgets the tokens from `lengths` on: ints, (1 or entries, 1, 1, 1), each 0 … the entry's length.
  void truncate(const Tensor& lengths, const Tensor& entries = {});

  /// Of the last `new_tokens` (ints, (1 or entries, 1, 1, 1)) an entry keeps those of `branch`, ints (1 or entries, 1, tokens,
  /// 1): their numbers among them, each greater than the one before; −1 ends it.  They move up, as they are stored; the others
  /// are forgotten.
  void accept(const Tensor& branch, const Tensor& new_tokens, const Tensor& entries = {});

  [[nodiscard]] const CacheSettings& settings() const noexcept;  ///< every default in place
  [[nodiscard]] Index batch() const noexcept;
  [[nodiscard]] Index capacity() const noexcept;
  [[nodiscard]] std::vector<Index> lengths() const;
  [[nodiscard]] Index length(Index entry) const;
  [[nodiscard]] CacheMemory memory() const;

  /// Tokens `first`, first + 1, … of an entry, (1, kv_heads, tokens, dim) and (…, value_dim), written: of the cache's dtype,
  /// f32 for i8, i4 and f8.  With value_in_key, value is not given: it is a part of key.
  void gather(Index entry, Index first, const Tensor& key, const Tensor& value) const;

  [[nodiscard]] CacheState state() const;
  /// Replaces all that the cache holds by a state of a KVCache of the same settings and batch; checks it first.
  void restore(const CacheState& state);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// A pool of pages, (page, kv_head, slot, dim); an entry is a table of pages (Kwon et al. 2023), which entries may share.
class PagedKVCache {
 public:
  PagedKVCache(Index pages, Index page_size, const CacheSettings& settings);
  ~PagedKVCache();
  PagedKVCache(PagedKVCache&&) noexcept;
  PagedKVCache& operator=(PagedKVCache&&) noexcept;

  Index add();  ///< a new entry, empty: the smallest number that is free
  Index fork(
      Index entry);  ///< a new entry of the same tokens; the pages are shared until one of both changes them
  void free(Index entry);  ///< its pages are free again, but those that others share

  /// As KVCache's; entries not given: all, by their numbers.  An append that needs more pages than are free is CacheFull.
  /// With a window, append then gives pages back that no token from the first new one on sees.
  void append(const NewTokens& tokens, const Tensor& entries = {}, const Options& options = {});
  void attend(const Problem& problem, const Tensor& entries = {}, const Options& options = {},
              bool rotate_query = false) const;
  /// As KVCache's; with a window, what is left must not need pages that were given back.
  void truncate(const Tensor& lengths, const Tensor& entries = {});
  /// The same.  Throws CacheFull if tokens move into pages that other entries have too, and too few are free for copies.
  void accept(const Tensor& branch, const Tensor& new_tokens, const Tensor& entries = {});

  [[nodiscard]] const CacheSettings& settings() const noexcept;
  [[nodiscard]] Index pages() const noexcept;
  [[nodiscard]] Index page_size() const noexcept;
  [[nodiscard]] Index free_pages() const;
  [[nodiscard]] std::vector<Index> entries() const;  ///< the numbers in use, rising
  [[nodiscard]] std::vector<Index> lengths() const;  ///< by number; −1: free
  [[nodiscard]] Index length(Index entry) const;
  [[nodiscard]] std::vector<Index> block_table(Index entry) const;  ///< −1: given back
  [[nodiscard]] std::vector<Index> reference_counts() const;        ///< by page: the entries that have it
  [[nodiscard]] CacheMemory memory() const;

  void gather(Index entry, Index first, const Tensor& key, const Tensor& value) const;
  [[nodiscard]] Index kept_from(Index entry) const;  ///< the first token whose page has not been given back

  [[nodiscard]] CacheState state() const;
  /// Of a PagedKVCache of the same settings and page size; pages may differ.  Throws CacheFull if there are too few.
  void restore(const CacheState& state);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// New tokens for the ends of sequences whose pages the caller owns (Problem::paging).
struct PagedAppend {
  Tensor key{};    ///< (batch, kv_heads, tokens, dim), any floats
  Tensor value{};  ///< (batch, kv_heads, tokens, value_dim), any floats; no values: neither it nor its pages
  Tensor lengths{};       ///< optional ints, (batch, 1, 1, 1): tokens past them are not appended
  Tensor token_starts{};  ///< optional ints, (batch + 1, 1, 1, 1): key and value are packed, as Packing's are

  /// (page, kv_head, slot, dim), written; i8, i4 and f8 have no gaps along dim.
  Tensor key_pages{}, value_pages{};
  Tensor key_scale{},
      value_scale{};  ///< (page, kv_head, slot, 1), f32, written; of i8, i4 and f8, as CacheSettings has them

  Tensor block_table{};  ///< ints, (batch, 1, 1, pages)
  Tensor key_lengths{};  ///< ints, (batch, 1, 1, 1): the tokens that are there before
};

/// Writes token i of an entry's new ones as its token key_length + i.  A page that two entries would write, or one twice, or
/// where another entry has tokens, is an error; so is what int8, int4 and float8 cannot store.  Nothing is written then.
/// Throws std::invalid_argument, DTypeError, std::bad_alloc, Cancelled.
void append_paged(const PagedAppend& append, const Options& options = {});

}  // namespace attncore
