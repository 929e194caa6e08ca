// The state of a PagedKVCache: what is saved, and what is checked before it is loaded.
#include <algorithm>
#include <utility>

#include "paged_cache.h"

namespace attncore {

using std::to_string;

CacheState PagedKVCache::state() const {
  const Impl& self = *impl_;
  const Reading use(self.exclusion);
  CacheState state;
  // Pages are renumbered without gaps; of a page that is shared, all tokens are kept that any entry has.
  std::vector<Index> number_of(static_cast<std::size_t>(pages()), -1), length_of(number_of.size());
  for (const PagedEntry& entry : self.pool.entries) {
    for (std::size_t i = static_cast<std::size_t>(entry.given_back); i < entry.table.size(); ++i) {
      Index& length = length_of[static_cast<std::size_t>(entry.table[i])];
      length = max(length, min(page_size(), entry.length - static_cast<Index>(i) * page_size()));
    }
  }
  Index total = 0;
  for (std::size_t page = 0; page < number_of.size(); ++page) {
    if (length_of[page] == 0) continue;
    number_of[page] = static_cast<Index>(state.page_lengths.size());
    state.page_lengths.push_back(length_of[page]);
    total += length_of[page];
  }
  state.tokens = packed_tokens(settings(), total, state.memory);
  for (std::size_t page = 0, first = 0; page < number_of.size();
       first += static_cast<std::size_t>(length_of[page++])) {
    if (length_of[page] == 0) continue;
    self.store.save(static_cast<Index>(page), length_of[page], state.tokens, static_cast<Index>(first));
  }
  for (const PagedEntry& entry : self.pool.entries) {
    state.lengths.push_back(entry.in_use ? entry.length : -1);
    state.given_back.push_back(entry.given_back);
    std::vector<Index>& table = state.tables.emplace_back();
    for (const std::int32_t page : entry.table) table.push_back(number_of[static_cast<std::size_t>(page)]);
    std::fill_n(table.begin(), entry.given_back, Index{-1});
  }
  return state;
}

namespace {

/// Checks the table of an entry, who may have given whole pages back if there is a window; `last_user`: of each page, the last entry
/// that was found to have it.
void require_table(const CacheState& state, std::size_t number, Index page_size, bool window,
                   std::vector<Index>& last_user) {
  const std::string entry = "entry " + to_string(number);
  const std::vector<Index>& table = state.tables[number];
  const Index length = state.lengths[number], given_back = state.given_back[number];
  if (length < -1 || length > kFarthest) reject("state", entry + " has the length " + to_string(length));
  const Index tokens = max(length, 0), pages = tokens / page_size + (tokens % page_size != 0 ? 1 : 0);
  if (std::cmp_not_equal(table.size(), pages)) {
    reject("state", entry + " has " + to_string(table.size()) + " pages, must have " + to_string(pages));
  }
  if (given_back < 0 || given_back > (window ? tokens / page_size : 0)) {
    reject("state", entry + " has given " + to_string(given_back) + " of " + to_string(pages) +
                        " pages back" + (window ? "" : ", without a window"));
  }
  for (Index i = 0; i < pages; ++i) {
    const Index page = table[static_cast<std::size_t>(i)];
    if (i < given_back) {
      if (page == -1) continue;
      reject("state", entry + " has page " + to_string(page) + " where it has given pages back, must be -1");
    }
    if (page < 0 || std::cmp_greater_equal(page, last_user.size())) {
      reject("state", entry + " has page " + to_string(page) + ", must be 0 … " +
                          to_string(last_user.size()) + " - 1");
    }
    const auto place = static_cast<std::size_t>(page);
    if (std::cmp_equal(last_user[place], number)) {
      reject("state", entry + " has page " + to_string(page) + " twice");
    }
    last_user[place] = static_cast<Index>(number);
    if (state.page_lengths[place] < min(page_size, tokens - i * page_size)) {
      reject("state", "page " + to_string(page) + " has " + to_string(state.page_lengths[place]) +
                          " tokens, fewer than " + entry + " has of it");
    }
  }
}

}  // namespace

void PagedKVCache::Impl::require_state(const CacheState& state) const {
  const auto number_of_pages = static_cast<Index>(state.page_lengths.size());
  if (number_of_pages > pool.pages()) {
    throw CacheFull("state: has " + to_string(number_of_pages) + " pages, the cache has " +
                    to_string(pool.pages()));
  }
  const std::size_t entries = state.lengths.size();
  if (state.tables.size() != entries || state.given_back.size() != entries) {
    reject("state", "has " + to_string(entries) + " lengths, " + to_string(state.tables.size()) +
                        " tables and " + to_string(state.given_back.size()) + " numbers of pages given back");
  }
  Index total = 0;
  for (const Index length : state.page_lengths) {
    if (length < 1 || length > pool.page_size()) {
      reject("state",
             "has a page of " + to_string(length) + " tokens, must be 1 … " + to_string(pool.page_size()));
    }
    total += length;
  }
  require_packed(store.settings(), total, state.tokens);
  std::vector<Index> last_user(state.page_lengths.size(), -1);
  const bool window = store.settings().window != kUnbounded;
  for (std::size_t i = 0; i < entries; ++i) require_table(state, i, pool.page_size(), window, last_user);
  if (std::find(last_user.begin(), last_user.end(), -1) != last_user.end()) {
    reject("state", "has a page that no entry has");
  }
}

void PagedKVCache::restore(const CacheState& state) {
  Impl& self = *impl_;
  const Writing use(self.exclusion);
  self.require_state(state);
  self.pool.restore(state);
  Index first = 0;
  for (std::size_t page = 0; page < state.page_lengths.size(); ++page) {
    self.store.load(static_cast<Index>(page), state.page_lengths[page], state.tokens, first);
    first += state.page_lengths[page];
  }
}

}  // namespace attncore
