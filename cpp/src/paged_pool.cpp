#include "paged_pool.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

namespace attncore {

using std::to_string;

PagedPool::PagedPool(Index pages, Index page_size)
    : page_size_(page_size), references_(static_cast<std::size_t>(pages)) {
  free_.reserve(references_.size());
  for (Index page = pages; page-- > 0;) free_.push_back(static_cast<std::int32_t>(page));
}

std::vector<Index> PagedPool::numbers() const {
  std::vector<Index> result;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    if (entries[i].in_use) result.push_back(static_cast<Index>(i));
  }
  return result;
}

std::int32_t PagedPool::take_page() noexcept {
  const std::int32_t page = free_.back();
  free_.pop_back();
  references_[static_cast<std::size_t>(page)] = 1;
  return page;
}

void PagedPool::release(std::int32_t page) noexcept {
  if (--references_[static_cast<std::size_t>(page)] == 0) free_.push_back(page);  // there is room for all
}

void PagedPool::require_free(const char* call, Index needed) const {
  if (needed <= free_pages()) return;
  throw CacheFull(std::string(call) + ": needs " + to_string(needed) + " pages, " + to_string(free_pages()) +
                  " of " + to_string(pages()) + " are free");
}

std::int32_t PagedPool::make_own(Index number, std::size_t place) noexcept {
  std::int32_t& page = entry(number).table[place];
  if (references(page) == 1) return -1;
  const std::int32_t shared = std::exchange(page, take_page());
  release(shared);  // others have it
  return shared;
}

Index PagedPool::add() {
  const auto place =
      std::find_if(entries.begin(), entries.end(), [](const PagedEntry& e) { return !e.in_use; });
  const Index number = place - entries.begin();
  if (place == entries.end()) entries.emplace_back();
  entry(number).in_use = true;
  return number;
}

Index PagedPool::fork(Index number) {
  PagedEntry copy = entry(number);
  const Index result = add();
  for (std::size_t i = static_cast<std::size_t>(copy.given_back); i < copy.table.size(); ++i) {
    ++references_[static_cast<std::size_t>(copy.table[i])];
  }
  entry(result) = std::move(copy);
  return result;
}

void PagedPool::free(Index number) noexcept {
  truncate(number, 0);
  entry(number) = PagedEntry{};
}

void PagedPool::truncate(Index number, Index length) noexcept {
  PagedEntry& e = entry(number);
  const auto left = static_cast<std::size_t>(pages_of(length));
  while (e.table.size() > left) {
    if (e.table.size() > static_cast<std::size_t>(e.given_back)) release(e.table.back());
    e.table.pop_back();
  }
  e.length = length;
  if (length == 0) e.given_back = 0;
}

void PagedPool::give_back(Index number, Index first) noexcept {
  PagedEntry& e = entry(number);
  for (; (e.given_back + 1) * page_size_ <= first; ++e.given_back) {
    release(std::exchange(e.table[static_cast<std::size_t>(e.given_back)], 0));
  }
}

void PagedPool::Growth::add(Index entry, Index tokens) {
  PagedEntry& e = pool_.entry(entry);
  Step step{entry, tokens, e.table.size()};
  const auto new_pages = static_cast<std::size_t>(pool_.pages_of(e.length + tokens)) - step.old_pages;
  needed_ += static_cast<Index>(new_pages);
  // What cannot be had need not be reserved: take() will say so.
  if (needed_ <= pool_.free_pages()) e.table.reserve(step.old_pages + new_pages);
  steps_.push_back(step);
}

void PagedPool::Growth::find_shared() {
  struct Sharers {
    Index count = 0, most_tokens = 0;  // in the page
    Step* longest = nullptr;
  };
  std::unordered_map<std::int32_t, Sharers> sharers;  // by page
  for (Step& step : steps_) {
    const PagedEntry& e = pool_.entry(step.entry);
    const Index tokens = e.length % pool_.page_size_;
    if (step.tokens == 0 || tokens == 0 || pool_.references(e.table.back()) == 1) continue;
    step.shared = e.table.back();
    ++needed_;
    Sharers& others = sharers[step.shared];
    ++others.count;
    if (tokens < others.most_tokens) continue;
    others.most_tokens = tokens;
    others.longest = &step;
  }
  for (const auto& [page, all] : sharers) {
    if (all.count < pool_.references(page)) continue;
    all.longest->shared = -1;
    --needed_;
  }
}

void PagedPool::Growth::take() {
  find_shared();
  pool_.require_free("append", needed_);
  taken_ = true;
  for (const Step& step : steps_) {
    PagedEntry& e = pool_.entry(step.entry);
    if (step.shared >= 0) e.table.back() = pool_.take_page();
    const auto pages = static_cast<std::size_t>(pool_.pages_of(e.length + step.tokens));
    while (e.table.size() < pages) e.table.push_back(pool_.take_page());
  }
}

void PagedPool::Growth::keep() noexcept {
  kept_ = true;
  for (const Step& step : steps_) {
    if (step.shared >= 0) pool_.release(step.shared);
    pool_.entry(step.entry).length += step.tokens;
  }
}

PagedPool::Growth::~Growth() {
  if (kept_ || !taken_) return;
  for (const Step& step : steps_) {
    PagedEntry& e = pool_.entry(step.entry);
    for (; e.table.size() > step.old_pages; e.table.pop_back()) pool_.release(e.table.back());
    if (step.shared >= 0) pool_.release(std::exchange(e.table.back(), step.shared));
  }
}

void PagedPool::restore(const CacheState& state) {
  PagedPool pool(pages(), page_size_);
  pool.free_.resize(pool.free_.size() - state.page_lengths.size());
  for (std::size_t i = 0; i < state.lengths.size(); ++i) {
    if (state.lengths[i] < 0) {
      pool.entries.emplace_back();
      continue;
    }
    PagedEntry e{true, state.lengths[i], state.given_back[i], {}};
    e.table.reserve(state.tables[i].size());
    for (const Index page : state.tables[i]) {
      e.table.push_back(static_cast<std::int32_t>(std::max<Index>(page, 0)));
      if (page >= 0) ++pool.references_[static_cast<std::size_t>(page)];
    }
    pool.entries.push_back(std::move(e));
  }
  std::swap(*this, pool);
}

}  // namespace attncore
