// The pools of a cache, (page, kv_head, slot, dim), and what goes in and out of them.  KVCache's pages are its entries.
#pragma once

#include <attncore/cache.hpp>

#include "cache_format.h"
#include "cache_memory.h"

namespace attncore {

/// Tokens of one entry on their way into a store.
struct Incoming {
  Tensor key, value;                    // (1, kv_heads, count, dim)
  Tensor positions;                     // of `rotary`: (1, 1, count, 1); not given: first, first + 1, …
  const std::int32_t* table = nullptr;  // the entry's pages
  Index entry = 0;                      // its number, for messages
  Index first = 0;                      // what the first one is in the entry
};

/// One of the arrays that a cache stores; numbers of keys and values come first.
struct StoredPart {
  const char* name;
  Tensor StoredTokens::* tensor;
  DType dtype;
  Index dim;
};
[[nodiscard]] std::vector<StoredPart> stored_parts(const CacheSettings& settings);

/// The first dim of keys that `rotary` may rotate: none that is a value.
[[nodiscard]] constexpr Index first_rotated(const CacheSettings& settings) noexcept {
  return settings.value_in_key ? settings.value_dim : 0;
}

class CacheStore {
 public:
  /// Throws CacheFull, naming `argument`.  `huge`: all of its memory comes in huge pages; else see prepare().
  CacheStore(const CacheSettings& settings, Index pages, Index slots, const char* argument, bool huge);

  /// Settings with every default in place.
  [[nodiscard]] const CacheSettings& settings() const noexcept { return settings_; }
  /// Keys and values, wherever these lie.
  [[nodiscard]] const StoredTokens& pools() const noexcept { return pools_; }
  [[nodiscard]] Index pages() const noexcept { return pools_.key.shape[0]; }
  [[nodiscard]] Index slots() const noexcept { return pools_.key.shape[2]; }
  [[nodiscard]] Index token_bytes() const noexcept;
  [[nodiscard]] Index reserved_bytes() const noexcept;

  /// Throws std::invalid_argument (what cannot be stored), Cancelled.
  void write(const Incoming& tokens, const Options& options);

  /// Before slots of a page are written for the first time: huge pages where they will be at least half full.
  void prepare(Index page, Range range) noexcept;

  /// The first `count` slots of a page.
  void copy(Index from, Index to, Index count) noexcept;

  /// A token of a table becomes another one.
  void move(const std::int32_t* table, Index from, Index to) noexcept;

  /// Slots 0 … count − 1 of a page are tokens first … of `packed`.
  void save(Index page, Index count, const StoredTokens& packed, Index first) const noexcept;
  void load(Index page, Index count, const StoredTokens& packed, Index first) noexcept;

  /// Tokens begin … end − 1 of a table as floats; (1, kv_heads, tokens, dim), of the cache's dtype or f32.  `value` may not
  /// be given.
  void gather(const std::int32_t* table, Range tokens, const Tensor& key, const Tensor& value) const noexcept;

 private:
  void place(const char* argument, const Tensor& x, const Incoming& tokens, Index done, const Tensor& pool,
             const Tensor& scales) const;

  CacheSettings settings_;
  std::vector<StoredPart> parts_;
  StoredTokens pools_;
  Reservation memory_[4];  // of the parts
};

/// Tensors of `tokens` packed tokens in memory that is reserved for them.
[[nodiscard]] StoredTokens packed_tokens(const CacheSettings& settings, Index tokens, Workspace& memory);

}  // namespace attncore
