// What the calls of both caches share: the checks of arguments.
#pragma once

#include "cache_store.h"
#include "exclusion.h"
#include "require.h"

namespace attncore {

/// A pool's extents and the settings: checked, every default in place.
CacheSettings require_settings(const CacheSettings& settings, const char* extent_name, Index extent,
                               const char* slots_name, Index slots);

[[noreturn]] void reject_entry(Index number);

/// The entries that a call names.  `exists(number)` says which there are; `distinct`: none may come twice.
template <class Exists>
std::vector<Index> read_entries(const Tensor& entries, bool distinct, Exists exists) {
  require_data("entries", entries);
  const Index count = entries.shape[0];
  require_ints("entries", entries, {count, 1, 1, 1}, {"entries"});
  std::vector<Index> numbers;
  numbers.reserve(static_cast<std::size_t>(count));
  std::vector<bool> seen;
  for (Index i = 0; i < count; ++i) {
    const Index number = read_int(at(entries, i, 0), entries.dtype);
    if (!exists(number))
      reject("entries", "has " + std::to_string(number) + ", which the cache does not have");
    numbers.push_back(number);
    if (!distinct) continue;
    const auto place = static_cast<std::size_t>(number);
    if (seen.size() <= place) seen.resize(place + 1);
    if (seen[place]) reject("entries", "has " + std::to_string(number) + " more than once");
    seen[place] = true;
  }
  return numbers;
}

/// Checks what is appended to so many entries: how many tokens each gets.
std::vector<Index> require_new_tokens(const CacheSettings& settings, const NewTokens& tokens, Index entries);

/// Those of row `row` of what is appended.
Incoming incoming(const NewTokens& tokens, Index row, Index count);

/// What truncate leaves of entries that have `lengths` tokens.
std::vector<Index> require_new_lengths(const Tensor& given, const std::vector<Index>& entries,
                                       const std::vector<Index>& lengths);

/// What accept keeps of an entry: `from` are the tokens that become first, first + 1, …
struct Branch {
  Index first = 0;
  std::vector<Index> from;

  [[nodiscard]] Index length() const noexcept { return first + static_cast<Index>(from.size()); }
  /// The first token that moves, or the length.
  [[nodiscard]] Index moves_from() const noexcept {
    Index token = first;
    while (token < length() && from[static_cast<std::size_t>(token - first)] == token) ++token;
    return token;
  }
};
/// Moves its tokens; the pages that they move into are the entry's own.
inline void move_tokens(CacheStore& store, const std::int32_t* table, const Branch& branch) noexcept {
  for (Index token = branch.moves_from(); token < branch.length(); ++token)
    store.move(table, branch.from[static_cast<std::size_t>(token - branch.first)], token);
}

std::vector<Branch> require_branches(const Tensor& branch, const Tensor& new_tokens,
                                     const std::vector<Index>& entries, const std::vector<Index>& lengths);

/// The problem with what both caches set: lengths (which it refers to) and the window; key and value are missing.
Problem require_attend(const Problem& given, const CacheSettings& settings,
                       const std::vector<Index>& lengths);

/// Of what is `kept`, the tokens that gather writes from `first` on.
Range require_gathered(const CacheSettings& settings, Range kept, Index first, const Tensor& key,
                       const Tensor& value);

/// A state's tokens.
void require_packed(const CacheSettings& settings, Index tokens, const StoredTokens& packed);

}  // namespace attncore
