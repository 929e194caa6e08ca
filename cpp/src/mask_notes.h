// A mask that heads share is looked at once: the first head that meets a tile notes what the mask does to it.
#pragma once

#include <algorithm>
#include <vector>

#include "plan.h"

namespace attncore {

class MaskNotes {
 public:
  /// For the row tiles of a plan's sections, which are the same for all heads.
  MaskNotes(const Call& call, const std::vector<Section>& sections, Index key_tile) : key_tile_(key_tile) {
    const Tensor& mask = call.score.mask;
    const bool shared = mask.given() && mask.stride[1] == 0 && call.kv_heads > 1;
    if (!shared || mask.stride[2] == 0 || sections.empty()) return;  // a line that queries share is soon seen
    tile_rows_ = sections.front().tile_rows;
    one_for_all_ = call.sequences.empty() && mask.stride[0] == 0;
    const auto entries = static_cast<std::size_t>(one_for_all_ ? 1 : call.batch);
    entries_.resize(entries);
    for (const Section& section : sections) {
      Entry& entry = entries_[entry_of(section)];
      const Index rows = section.sequence.queries * call.group;
      entry.key_tiles = max(entry.key_tiles, ceil_div(section.sequence.keys, key_tile));
      entry.row_tiles = max(entry.row_tiles, ceil_div(rows, tile_rows_));
    }
    for (Entry& entry : entries_) {
      entry.first = notes_count_;
      notes_count_ += entry.row_tiles * entry.key_tiles;
    }
  }

  /// A byte for each row tile and key tile of a batch entry, or of one for all that see the same.
  [[nodiscard]] Index bytes() const noexcept { return round_up(notes_count_, 64); }

  void place(std::byte* memory) noexcept {
    notes_ = reinterpret_cast<std::uint8_t*>(memory);
    std::fill_n(notes_, bytes(), std::uint8_t{0});
  }

  /// A row tile's notes; none if it is not cut as those of the first section: of other tile_rows, or from another row on.
  [[nodiscard]] TouchNotes of(const Section& section, Range rows) const noexcept {
    if (entries_.empty() || section.tile_rows != tile_rows_ || rows.begin % tile_rows_ != 0) return {};
    const Entry& entry = entries_[entry_of(section)];
    return {notes_ + entry.first + rows.begin / tile_rows_ * entry.key_tiles, key_tile_};
  }

 private:
  struct Entry {
    Index row_tiles = 0, key_tiles = 0, first = 0;  // first: of its notes
  };

  [[nodiscard]] std::size_t entry_of(const Section& section) const noexcept {
    return one_for_all_ ? 0 : static_cast<std::size_t>(section.sequence.batch);
  }

  Index key_tile_, tile_rows_ = 1, notes_count_ = 0;
  bool one_for_all_ = false;
  std::vector<Entry> entries_;
  std::uint8_t* notes_ = nullptr;
};

}  // namespace attncore
