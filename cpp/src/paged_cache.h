// What a PagedKVCache is made of.
#pragma once

#include "cache_call.h"
#include "paged_pool.h"

namespace attncore {

struct PagedKVCache::Impl {
  CacheStore store;
  PagedPool pool;
  mutable Exclusion exclusion{"cache"};

  Impl(Index pages, Index page_size, const CacheSettings& settings)
      : store(require_settings(settings, "pages", pages, "page_size", page_size), pages, page_size, "pages",
              true),
        pool(pages, page_size) {}

  void require_entry(Index number) const {
    if (!pool.exists(number)) reject_entry(number);
  }

  [[nodiscard]] std::vector<Index> read(const Tensor& entries, bool distinct) const {
    if (is_left_out(entries)) return pool.numbers();
    return read_entries(entries, distinct, [&](Index number) { return pool.exists(number); });
  }

  [[nodiscard]] std::vector<Index> lengths_of(const std::vector<Index>& entries) const {
    std::vector<Index> result;
    result.reserve(entries.size());
    for (const Index number : entries) result.push_back(pool.entry(number).length);
    return result;
  }

  /// The first token that is still there.
  [[nodiscard]] Index kept_from(Index number) const noexcept {
    return pool.entry(number).given_back * pool.page_size();
  }

  /// The first key that a query at a position sees.
  [[nodiscard]] static Index first_seen(Index position, Index left) noexcept {
    return left >= position ? 0 : position - left;
  }

  /// run(place in the table) for each page that a branch moves tokens into.
  template <class Run>
  void for_pages_moved_into(const Branch& branch, Run run) const {
    const Index first = branch.moves_from(), size = pool.page_size();
    if (first == branch.length()) return;
    for (Index place = first / size; place * size < branch.length(); ++place)
      run(static_cast<std::size_t>(place));
  }
  /// Throws if that length needs pages that were given back.
  void require_left(const char* argument, Index number, Index length) const;
  /// Throws if a query sees a page that was given back.
  void require_kept_keys(const Problem& problem, const std::vector<Index>& chosen) const;
  /// (entries, columns), 0 past an entry's own pages.
  [[nodiscard]] std::vector<std::int32_t> tables_of(const std::vector<Index>& chosen, Index columns) const;
  void require_state(const CacheState& state) const;
};

}  // namespace attncore
