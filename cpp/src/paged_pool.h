// Which pages are free, and how many entries have each; the entries' tables.
#pragma once

#include <attncore/cache.hpp>
#include <utility>

namespace attncore {

/// The pages of an entry, in the order of its tokens.
struct PagedEntry {
  bool in_use = false;
  Index length = 0;
  Index given_back = 0;             // so many of the first pages are no longer its own: their numbers are 0
  std::vector<std::int32_t> table;  // ⌈length / page_size⌉
};

class PagedPool {
 public:
  PagedPool(Index pages, Index page_size);

  std::vector<PagedEntry> entries;
  [[nodiscard]] PagedEntry& entry(Index number) noexcept { return entries[static_cast<std::size_t>(number)]; }
  [[nodiscard]] const PagedEntry& entry(Index number) const noexcept {
    return entries[static_cast<std::size_t>(number)];
  }
  [[nodiscard]] bool exists(Index number) const noexcept {
    return number >= 0 && std::cmp_less(number, entries.size()) && entry(number).in_use;
  }
  [[nodiscard]] std::vector<Index> numbers() const;
  [[nodiscard]] Index page_size() const noexcept { return page_size_; }
  [[nodiscard]] Index pages() const noexcept { return static_cast<Index>(references_.size()); }
  [[nodiscard]] Index free_pages() const noexcept { return static_cast<Index>(free_.size()); }
  [[nodiscard]] Index references(std::int32_t page) const noexcept {
    return references_[static_cast<std::size_t>(page)];
  }

  void require_free(const char* call, Index needed) const;  ///< throws CacheFull
  /// A page of an entry becomes its own, if others have it too; a page must be free then.  Returns the one to be copied, or −1.
  std::int32_t make_own(Index number, std::size_t place) noexcept;

  Index add();               // the smallest number that is free
  Index fork(Index number);  // all pages shared
  void free(Index number) noexcept;
  void truncate(Index number, Index length) noexcept;
  /// Gives back the pages that lie wholly before token `first`.
  void give_back(Index number, Index first) noexcept;

  /// Pages for more tokens of some entries: those of new tokens, and one for the last page of an entry that shares it and
  /// begins to write there.  All of it is undone at the end of the scope, unless it is kept: so of several entries that
  /// share a page, one may write to it if all go on: the longest, past what the others have there.
  class Growth {
   public:
    explicit Growth(PagedPool& pool) : pool_(pool) {}
    Growth(const Growth&) = delete;
    Growth& operator=(const Growth&) = delete;
    ~Growth();

    struct Step {
      Index entry, tokens;
      std::size_t old_pages;     // of the table
      std::int32_t shared = -1;  // the page that is copied to the table's last old one
    };
    void add(Index entry, Index tokens);
    void take();  ///< the pages, once all steps are there.  Throws CacheFull.
    [[nodiscard]] const std::vector<Step>& steps() const noexcept { return steps_; }
    void keep() noexcept;  ///< the lengths change now

   private:
    void find_shared();

    PagedPool& pool_;
    std::vector<Step> steps_;
    Index needed_ = 0;
    bool taken_ = false, kept_ = false;
  };

  /// Replaces everything by the tables of a state.  `tables` refer to pages 0 … pages − 1, which must be there.
  void restore(const CacheState& state);

 private:
  [[nodiscard]] Index pages_of(Index tokens) const noexcept { return (tokens + page_size_ - 1) / page_size_; }
  [[nodiscard]] std::int32_t take_page() noexcept;
  void release(std::int32_t page) noexcept;

  Index page_size_;
  std::vector<std::int32_t> references_;  // by page
  std::vector<std::int32_t> free_;        // the next one last
};

}  // namespace attncore
