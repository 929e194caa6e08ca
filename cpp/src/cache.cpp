// KVCache: entries of one buffer each.
#include <algorithm>
#include <numeric>

#include "cache_call.h"
#include "rotated_query.h"

namespace attncore {

using std::to_string;

struct KVCache::Impl {
  CacheStore store;  // a page an entry
  std::vector<Index> lengths;
  mutable Exclusion exclusion{"cache"};

  Impl(Index batch, Index capacity, const CacheSettings& settings)
      : store(require_settings(settings, "batch", batch, "capacity", capacity), batch, capacity, "capacity",
              false),
        lengths(static_cast<std::size_t>(batch)) {}

  void require_entry(Index number) const {
    if (number < 0 || number >= store.pages()) reject_entry(number);
  }
  [[nodiscard]] Index& length(Index entry) noexcept { return lengths[static_cast<std::size_t>(entry)]; }

  [[nodiscard]] std::vector<Index> read(const Tensor& entries, bool distinct) const {
    const Index batch = store.pages();
    if (is_left_out(entries)) {
      std::vector<Index> all(lengths.size());
      std::iota(all.begin(), all.end(), Index{0});
      return all;
    }
    return read_entries(entries, distinct, [&](Index number) { return number >= 0 && number < batch; });
  }

  [[nodiscard]] std::vector<Index> lengths_of(const std::vector<Index>& entries) const {
    std::vector<Index> result;
    result.reserve(entries.size());
    for (const Index entry : entries) result.push_back(lengths[static_cast<std::size_t>(entry)]);
    return result;
  }

  [[nodiscard]] Index total() const noexcept {
    return std::accumulate(lengths.begin(), lengths.end(), Index{0});
  }
};

KVCache::KVCache(Index batch, Index capacity, const CacheSettings& settings)
    : impl_(std::make_unique<Impl>(batch, capacity, settings)) {}
KVCache::~KVCache() = default;
KVCache::KVCache(KVCache&&) noexcept = default;
KVCache& KVCache::operator=(KVCache&&) noexcept = default;

const CacheSettings& KVCache::settings() const noexcept { return impl_->store.settings(); }
Index KVCache::batch() const noexcept { return impl_->store.pages(); }
Index KVCache::capacity() const noexcept { return impl_->store.slots(); }

void KVCache::append(const NewTokens& tokens, const Tensor& entries, const Options& options) {
  Impl& self = *impl_;
  const Writing use(self.exclusion);
  const std::vector<Index> chosen = self.read(entries, true);
  const std::vector<Index> counts = require_new_tokens(settings(), tokens, static_cast<Index>(chosen.size()));
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    const Index length = self.length(chosen[i]);
    if (counts[i] <= capacity() - length) continue;
    throw CacheFull("append: entry " + to_string(chosen[i]) + " has " + to_string(length) + " of " +
                    to_string(capacity()) + " tokens, " + to_string(counts[i]) + " more do not fit");
  }
  // What is written lies past the lengths: until these change, nothing has happened.
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    if (counts[i] == 0) continue;
    const auto page = static_cast<std::int32_t>(chosen[i]);
    Incoming in = incoming(tokens, static_cast<Index>(i), counts[i]);
    in.entry = chosen[i];
    in.first = self.length(chosen[i]);
    in.table = &page;
    self.store.prepare(page, {in.first, in.first + counts[i]});
    self.store.write(in, options);
  }
  for (std::size_t i = 0; i < chosen.size(); ++i) self.length(chosen[i]) += counts[i];
}

void KVCache::attend(const Problem& problem, const Tensor& entries, const Options& options,
                     bool rotate_query) const {
  const Impl& self = *impl_;
  const Reading use(self.exclusion);
  std::vector<Index> chosen = self.read(entries, false);
  const std::vector<Index> lengths = self.lengths_of(chosen);
  Problem whole = require_attend(problem, settings(), lengths);
  const Index longest = lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end());
  const auto gap =
      std::adjacent_find(chosen.begin(), chosen.end(), [](Index a, Index b) { return b != a + 1; });
  const bool in_order = gap == chosen.end();
  const auto view = [&](Tensor pool) {
    if (!pool.given()) return pool;
    if (in_order) {
      pool.data = at(pool, chosen.empty() ? 0 : chosen.front(), 0);
      pool.shape[0] = static_cast<Index>(chosen.size());
    }
    pool.shape[2] = longest;
    return pool;
  };
  const StoredTokens& pools = self.store.pools();
  whole.key = view(pools.key);
  whole.value = view(pools.value);
  whole.key_scale = view(pools.key_scale);
  whole.value_scale = view(pools.value_scale);
  if (!in_order && longest > 0) {  // an entry is a page
    whole.paging.block_table =
        Tensor::contiguous(chosen.data(), DType::i64, {static_cast<Index>(chosen.size()), 1, 1, 1});
  } else if (!in_order) {  // any will do: all are empty
    for (Tensor* const t : {&whole.key, &whole.value, &whole.key_scale, &whole.value_scale}) {
      t->shape[0] = static_cast<Index>(chosen.size());
      t->stride[0] = 0;
    }
  }
  rotate_query ? forward_rotated(whole, settings(), options) : forward(whole, options);
}

void KVCache::truncate(const Tensor& lengths, const Tensor& entries) {
  Impl& self = *impl_;
  const Writing use(self.exclusion);
  const std::vector<Index> chosen = self.read(entries, true);
  const std::vector<Index> left = require_new_lengths(lengths, chosen, self.lengths_of(chosen));
  for (std::size_t i = 0; i < chosen.size(); ++i) self.length(chosen[i]) = left[i];
}

void KVCache::accept(const Tensor& branch, const Tensor& new_tokens, const Tensor& entries) {
  Impl& self = *impl_;
  const Writing use(self.exclusion);
  const std::vector<Index> chosen = self.read(entries, true);
  const std::vector<Branch> branches = require_branches(branch, new_tokens, chosen, self.lengths_of(chosen));
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    const auto page = static_cast<std::int32_t>(chosen[i]);
    move_tokens(self.store, &page, branches[i]);
    self.length(chosen[i]) = branches[i].length();
  }
}

std::vector<Index> KVCache::lengths() const {
  const Reading use(impl_->exclusion);
  return impl_->lengths;
}

Index KVCache::length(Index entry) const {
  const Reading use(impl_->exclusion);
  impl_->require_entry(entry);
  return impl_->lengths[static_cast<std::size_t>(entry)];
}

CacheMemory KVCache::memory() const {
  const Reading use(impl_->exclusion);
  return {impl_->store.reserved_bytes(), impl_->total() * impl_->store.token_bytes()};
}

void KVCache::gather(Index entry, Index first, const Tensor& key, const Tensor& value) const {
  const Impl& self = *impl_;
  const Reading use(self.exclusion);
  self.require_entry(entry);
  const auto page = static_cast<std::int32_t>(entry);
  const Range kept{0, self.lengths[static_cast<std::size_t>(entry)]};
  self.store.gather(&page, require_gathered(settings(), kept, first, key, value), key, value);
}

CacheState KVCache::state() const {
  const Impl& self = *impl_;
  const Reading use(self.exclusion);
  CacheState state;
  state.lengths = self.lengths;
  state.tokens = packed_tokens(settings(), self.total(), state.memory);
  Index first = 0;
  for (Index entry = 0; entry < batch(); ++entry) {
    const Index length = state.lengths[static_cast<std::size_t>(entry)];
    self.store.save(entry, length, state.tokens, first);
    first += length;
  }
  return state;
}

void KVCache::restore(const CacheState& state) {
  Impl& self = *impl_;
  const Writing use(self.exclusion);
  if (state.lengths.size() != self.lengths.size()) {
    reject("state",
           "has " + to_string(state.lengths.size()) + " entries, the cache has " + to_string(batch()));
  }
  if (!state.tables.empty() || !state.page_lengths.empty()) reject("state", "is a paged cache's");
  Index total = 0;
  for (const Index length : state.lengths) {
    if (length < 0) reject("state", "has the length " + to_string(length));
    if (length > capacity()) {
      throw CacheFull("state: has an entry of " + to_string(length) + " tokens, capacity is " +
                      to_string(capacity()));
    }
    total += length;
  }
  require_packed(settings(), total, state.tokens);
  Index first = 0;
  for (Index entry = 0; entry < batch(); ++entry) {
    const Index length = state.lengths[static_cast<std::size_t>(entry)];
    self.store.prepare(entry, {0, length});
    self.store.load(entry, length, state.tokens, first);
    first += length;
  }
  self.lengths = state.lengths;
}

}  // namespace attncore
