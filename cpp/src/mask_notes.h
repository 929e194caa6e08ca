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
    row_tiles_ = ceil_div(call.queries * call.group, tile_rows_);
    Index keys = 0;  // of the longest entry: a table of pages may have room for many more
    for (const Section& section : sections) keys = max(keys, section.sequence.keys);
    key_tiles_ = ceil_div(keys, key_tile);
    entries_ = call.sequences.empty() && mask.stride[0] == 0 ? 1 : call.batch;
  }

  /// A byte for each row tile and key tile of a batch entry, or of one for all that see the same.
  [[nodiscard]] Index bytes() const noexcept { return round_up(entries_ * row_tiles_ * key_tiles_, 64); }

  void place(std::byte* memory) noexcept {
    notes_ = reinterpret_cast<std::uint8_t*>(memory);
    std::fill_n(notes_, bytes(), std::uint8_t{0});
  }

  /// A row tile's notes; none if it is not cut as those of the first section: of other tile_rows, or from another row on.
  [[nodiscard]] TouchNotes of(const Section& section, Range rows) const noexcept {
    if (entries_ == 0 || section.tile_rows != tile_rows_ || rows.begin % tile_rows_ != 0) return {};
    const Index row_tile = rows.begin / tile_rows_;
    const Index entry = entries_ == 1 ? 0 : section.sequence.batch;
    return {notes_ + (entry * row_tiles_ + row_tile) * key_tiles_, key_tile_};
  }

 private:
  Index key_tile_, tile_rows_ = 1, row_tiles_ = 0, key_tiles_ = 0, entries_ = 0;
  std::uint8_t* notes_ = nullptr;
};

}  // namespace attncore
