// What a section that is alone fetches, while it is at work, for what comes after it.
#pragma once

#include "../plan.h"
#include "../score/score.h"

namespace attncore {

/// Rows of query or out: where heads are not rows too.
inline Rows rows_of(const Call& call, const Tensor& t, const Section& s, Range rows) noexcept {
  if (call.group > 1) return {};
  const Row first = row_of(s.sequence, s.kv_head, rows.begin);
  return {at(t, first), t.stride[2], item_size(t.dtype) * t.shape[3], rows.size()};
}

/// Of key or value: where they are not in pages.
inline Rows tokens_of(const Call& call, const Tensor& t, const Section& s, Range keys) noexcept {
  const KeySource source = key_source(call, t, s.sequence, s.kv_head);
  if (source.pages != nullptr) return {};
  return {source.token(keys.begin), source.token_stride, item_size(t.dtype) * t.shape[3], keys.size()};
}

/// Its outputs, the next tile's queries, and its share of the keys and values of the next section, if there is one.
inline Ahead ahead_of(const Call& call, const Section& s, Index tile, const Section* next) noexcept {
  Ahead ahead;
  ahead.rows[Ahead::kOut] = rows_of(call, call.out, s, s.tile(tile));
  if (tile + 1 < s.tiles) {
    ahead.rows[Ahead::kQuery] = rows_of(call, call.query, s, s.tile(tile + 1));
  } else if (next != nullptr) {
    ahead.rows[Ahead::kQuery] = rows_of(call, call.query, *next, next->tile(0));
  }
  if (next == nullptr) return ahead;
  const Index keys = next->keys.size(), begin = next->keys.begin;
  const Range share{begin + keys * tile / s.tiles, begin + keys * (tile + 1) / s.tiles};
  ahead.rows[Ahead::kKey] = tokens_of(call, call.key, *next, share);
  ahead.rows[Ahead::kValue] = tokens_of(call, call.value, *next, share);
  return ahead;
}

}  // namespace attncore
