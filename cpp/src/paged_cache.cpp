// PagedKVCache: entries are tables of pages.
#include "paged_cache.h"

#include <algorithm>
#include <unordered_map>

#include "rotated_query.h"

namespace attncore {

using std::to_string;

PagedKVCache::PagedKVCache(Index pages, Index page_size, const CacheSettings& settings)
    : impl_(std::make_unique<Impl>(pages, page_size, settings)) {}
PagedKVCache::~PagedKVCache() = default;
PagedKVCache::PagedKVCache(PagedKVCache&&) noexcept = default;
PagedKVCache& PagedKVCache::operator=(PagedKVCache&&) noexcept = default;

const CacheSettings& PagedKVCache::settings() const noexcept { return impl_->store.settings(); }
Index PagedKVCache::pages() const noexcept { return impl_->store.pages(); }
Index PagedKVCache::page_size() const noexcept { return impl_->store.slots(); }

Index PagedKVCache::add() {
  const Writing use(impl_->exclusion);
  return impl_->pool.add();
}

Index PagedKVCache::fork(Index entry) {
  const Writing use(impl_->exclusion);
  impl_->require_entry(entry);
  return impl_->pool.fork(entry);
}

void PagedKVCache::free(Index entry) {
  const Writing use(impl_->exclusion);
  impl_->require_entry(entry);
  impl_->pool.free(entry);
}

void PagedKVCache::append(const NewTokens& tokens, const Tensor& entries, const Options& options) {
  Impl& self = *impl_;
  const Writing use(self.exclusion);
  const std::vector<Index> chosen = self.read(entries, true);
  const std::vector<Index> counts = require_new_tokens(settings(), tokens, static_cast<Index>(chosen.size()));
  PagedPool::Growth growth(self.pool);
  for (std::size_t i = 0; i < chosen.size(); ++i) growth.add(chosen[i], counts[i]);
  growth.take();
  Index row = 0;
  for (const auto& [number, count, old_pages, shared] : growth.steps()) {
    const Index row_of_entry = row++;
    if (count == 0) continue;
    const PagedEntry& entry = self.pool.entry(number);
    if (shared >= 0) self.store.copy(shared, entry.table[old_pages - 1], entry.length % page_size());
    Incoming in = incoming(tokens, row_of_entry, count);
    in.entry = number;
    in.first = entry.length;
    in.table = entry.table.data();
    self.store.write(in, options);
  }
  growth.keep();
  if (settings().window == kUnbounded) return;
  for (const auto& step : growth.steps()) {
    const Index first_new = self.pool.entry(step.entry).length - step.tokens;
    if (step.tokens > 0) self.pool.give_back(step.entry, Impl::first_seen(first_new, settings().window));
  }
}

void PagedKVCache::Impl::require_kept_keys(const Problem& problem, const std::vector<Index>& chosen) const {
  const Tensor& lengths = problem.score.query_lengths;
  const auto count = static_cast<Index>(chosen.size());
  if (lengths.given()) require_ints("query_lengths", lengths, {count, 1, 1, 1}, {"entries"});
  for (Index i = 0; i < count; ++i) {
    const Index number = chosen[static_cast<std::size_t>(i)], length = pool.entry(number).length;
    const Index queries =
        lengths.given() ? read_int(at(lengths, i, 0), lengths.dtype) : problem.query.shape[2];
    if (queries <= 0 || first_seen(length - queries, problem.score.left) >= kept_from(number)) continue;
    reject("query", "has " + to_string(queries) + " tokens for entry " + to_string(number) +
                        ", the first of which sees keys before " + to_string(kept_from(number)) +
                        ": they were given back");
  }
}

std::vector<std::int32_t> PagedKVCache::Impl::tables_of(const std::vector<Index>& chosen,
                                                        Index columns) const {
  std::vector<std::int32_t> tables(chosen.size() * static_cast<std::size_t>(columns));
  auto row = tables.begin();
  for (const Index number : chosen) {
    const std::vector<std::int32_t>& table = pool.entry(number).table;
    std::copy(table.begin(), table.end(), row);
    row += columns;
  }
  return tables;
}

void PagedKVCache::attend(const Problem& problem, const Tensor& entries, const Options& options,
                          bool rotate_query) const {
  const Impl& self = *impl_;
  const Reading use(self.exclusion);
  const std::vector<Index> chosen = self.read(entries, false);
  const std::vector<Index> lengths = self.lengths_of(chosen);
  Problem whole = require_attend(problem, settings(), lengths);
  if (settings().window != kUnbounded) self.require_kept_keys(whole, chosen);
  const StoredTokens& pools = self.store.pools();
  whole.key = pools.key;
  whole.value = pools.value;
  whole.key_scale = pools.key_scale;
  whole.value_scale = pools.value_scale;
  const Index longest = lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end());
  const Index columns = max(1, ceil_div(longest, page_size()));
  std::vector<std::int32_t> tables = self.tables_of(chosen, columns);
  if (tables.empty()) tables.push_back(0);  // a table that is given has memory
  whole.paging.block_table =
      Tensor::contiguous(tables.data(), DType::i32, {static_cast<Index>(chosen.size()), 1, 1, columns});
  rotate_query ? forward_rotated(whole, settings(), options) : forward(whole, options);
}

void PagedKVCache::truncate(const Tensor& lengths, const Tensor& entries) {
  Impl& self = *impl_;
  const Writing use(self.exclusion);
  const std::vector<Index> chosen = self.read(entries, true);
  const std::vector<Index> left = require_new_lengths(lengths, chosen, self.lengths_of(chosen));
  for (std::size_t i = 0; i < chosen.size(); ++i) self.require_left("lengths", chosen[i], left[i]);
  for (std::size_t i = 0; i < chosen.size(); ++i) self.pool.truncate(chosen[i], left[i]);
}

void PagedKVCache::accept(const Tensor& branch, const Tensor& new_tokens, const Tensor& entries) {
  Impl& self = *impl_;
  const Writing use(self.exclusion);
  const std::vector<Index> chosen = self.read(entries, true);
  const std::vector<Branch> branches = require_branches(branch, new_tokens, chosen, self.lengths_of(chosen));
  std::unordered_map<std::int32_t, Index> writers;  // of pages that others have too
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    self.require_left("new_tokens", chosen[i], branches[i].length());
    const Index moved = branches[i].moves_from(), kept = self.kept_from(chosen[i]);
    if (moved < min(kept, branches[i].length())) {
      reject("branch", "moves a token of entry " + to_string(chosen[i]) + " to " + to_string(moved) +
                           ", whose tokens before " + to_string(kept) + " were given back");
    }
    self.for_pages_moved_into(branches[i], [&](std::size_t place) {
      const std::int32_t page = self.pool.entry(chosen[i]).table[place];
      if (self.pool.references(page) > 1) ++writers[page];
    });
  }
  Index needed = 0;  // if all who have a page write to it, the last one keeps it
  for (const auto& [page, count] : writers) needed += min(count, self.pool.references(page) - 1);
  self.pool.require_free("accept", needed);
  // From here on nothing fails.
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    const PagedEntry& entry = self.pool.entry(chosen[i]);
    self.for_pages_moved_into(branches[i], [&](std::size_t place) {
      const std::int32_t shared = self.pool.make_own(chosen[i], place);
      if (shared < 0) return;
      const Index before = static_cast<Index>(place) * page_size();
      self.store.copy(shared, entry.table[place], min(page_size(), entry.length - before));
    });
    move_tokens(self.store, entry.table.data(), branches[i]);
    self.pool.truncate(chosen[i], branches[i].length());
  }
}

void PagedKVCache::Impl::require_left(const char* argument, Index number, Index length) const {
  const Index kept = kept_from(number), window = store.settings().window;
  if (length == 0 || first_seen(length, window) >= kept) return;
  reject(argument, "leaves " + to_string(length) + " tokens of entry " + to_string(number) +
                       ", whose tokens before " + to_string(kept) +
                       " were given back: must be 0 or at least " + to_string(kept + window));
}

Index PagedKVCache::free_pages() const {
  const Reading use(impl_->exclusion);
  return impl_->pool.free_pages();
}

std::vector<Index> PagedKVCache::entries() const {
  const Reading use(impl_->exclusion);
  return impl_->pool.numbers();
}

std::vector<Index> PagedKVCache::lengths() const {
  const Reading use(impl_->exclusion);
  std::vector<Index> result;
  for (const PagedEntry& entry : impl_->pool.entries) result.push_back(entry.in_use ? entry.length : -1);
  return result;
}

Index PagedKVCache::length(Index entry) const {
  const Reading use(impl_->exclusion);
  impl_->require_entry(entry);
  return impl_->pool.entry(entry).length;
}

std::vector<Index> PagedKVCache::block_table(Index entry) const {
  const Reading use(impl_->exclusion);
  impl_->require_entry(entry);
  const PagedEntry& own = impl_->pool.entry(entry);
  std::vector<Index> result(own.table.begin(), own.table.end());
  std::fill_n(result.begin(), own.given_back, Index{-1});
  return result;
}

std::vector<Index> PagedKVCache::reference_counts() const {
  const Reading use(impl_->exclusion);
  std::vector<Index> result;
  result.reserve(static_cast<std::size_t>(pages()));
  for (Index page = 0; page < pages(); ++page) {
    result.push_back(impl_->pool.references(static_cast<std::int32_t>(page)));
  }
  return result;
}

CacheMemory PagedKVCache::memory() const {
  const Reading use(impl_->exclusion);
  const Index page_bytes = page_size() * impl_->store.token_bytes();
  return {impl_->store.reserved_bytes(), (pages() - impl_->pool.free_pages()) * page_bytes};
}

void PagedKVCache::gather(Index entry, Index first, const Tensor& key, const Tensor& value) const {
  const Impl& self = *impl_;
  const Reading use(self.exclusion);
  self.require_entry(entry);
  const PagedEntry& own = self.pool.entry(entry);
  const Range kept{self.kept_from(entry), own.length};
  self.store.gather(own.table.data(), require_gathered(settings(), kept, first, key, value), key, value);
}

Index PagedKVCache::kept_from(Index entry) const {
  const Reading use(impl_->exclusion);
  impl_->require_entry(entry);
  return impl_->kept_from(entry);
}

}  // namespace attncore
