#include "prefix.h"

#include <map>

namespace attncore {
namespace {

using Members = std::vector<std::size_t>;

class Prefixes {
 public:
  Prefixes(const Pages& pages, const std::vector<Sequence>& sequences, Index part_keys)
      : pages_(pages), sequences_(sequences), part_keys_(part_keys) {}

  /// The members, by the pages of their part `part`; those that do not have all of it are left out.
  [[nodiscard]] std::vector<Members> split(const Members& members, Index part) const {
    std::map<std::vector<std::int32_t>, Members> by_pages;
    const Index first = part * part_keys_ / pages_.size;
    const Index last = ((part + 1) * part_keys_ - 1) / pages_.size;
    for (const std::size_t member : members) {
      const Sequence& s = sequences_[member];
      if (s.keys < (part + 1) * part_keys_) continue;
      const std::int32_t* const numbers = pages_.numbers + s.first_page;
      by_pages[{numbers + first, numbers + last + 1}].push_back(member);
    }
    std::vector<Members> groups;
    groups.reserve(by_pages.size());
    for (auto& [numbers, same] : by_pages) groups.push_back(std::move(same));
    return groups;
  }

  /// Adds what the members share from part `part` on.
  void add_parts(const Members& members, Index part, std::vector<SharedPart>& parts) const {
    for (const Members& same : split(members, part)) {
      if (same.size() < 2) continue;
      parts.push_back({part, same});
      add_parts(same, part + 1, parts);
    }
  }

 private:
  const Pages& pages_;
  const std::vector<Sequence>& sequences_;
  Index part_keys_;
};

}  // namespace

std::vector<PrefixGroup> prefix_groups(const Pages& pages, const std::vector<Sequence>& sequences,
                                       std::size_t most,
                                       const std::function<Index(const Sequence&)>& part_keys) {
  std::map<Index, Members> by_part_keys;
  for (std::size_t i = 0; i < sequences.size(); ++i) by_part_keys[part_keys(sequences[i])].push_back(i);

  std::vector<std::size_t> leader(sequences.size());  // the first of the group that a sequence belongs to
  for (std::size_t i = 0; i < leader.size(); ++i) leader[i] = i;
  for (const auto& [keys, members] : by_part_keys) {
    if (keys == 0) continue;
    for (const Members& same : Prefixes(pages, sequences, keys).split(members, 0)) {
      for (std::size_t i = 0; i < same.size(); ++i) leader[same[i]] = same[i - i % most];
    }
  }
  std::vector<PrefixGroup> groups;
  std::vector<std::size_t> group_of(sequences.size());
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    if (leader[i] == i) {
      group_of[i] = groups.size();
      groups.emplace_back();
    }
    groups[group_of[leader[i]]].sequences.push_back(sequences[i]);
  }
  for (PrefixGroup& group : groups) {
    if (group.sequences.size() < 2) continue;
    Members all(group.sequences.size());
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = i;
    Prefixes(pages, group.sequences, part_keys(group.sequences[0])).add_parts(all, 0, group.parts);
  }
  return groups;
}

}  // namespace attncore
