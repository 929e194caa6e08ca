#pragma once

#include "score.h"

namespace attncore {

/// Packed documents: a query attends to the keys of its own segment only.  Mostly these are a range (Call::segments).
struct Segments : NoOp {
  /// Of the block's first query and on, each its range of keys; null if they have none.
  static ATTN_FN const Range* ranges(const Call& call, const Block& block) noexcept {
    const Range* const first = call.segments.of(block.sequence.query_place);
    return first == nullptr ? nullptr : first + block.queries.begin;
  }

  static ATTN_FN bool is_band(const Call& call, const Block& block) noexcept {
    return ranges(call, block) != nullptr;
  }

  static ATTN_FN Range visible(const Call& call, const Block& block) noexcept {
    const Range* const seen = ranges(call, block);
    if (seen == nullptr || block.queries.empty()) return NoOp::visible(call, block);
    return {seen[0].begin, seen[block.queries.size() - 1].end};
  }

  static ATTN_FN Touch touch(const Call& call, const Block& block, Range keys) noexcept {
    if (!call.score.query_segments.given()) return Touch::nothing;
    if (const Range* const seen = ranges(call, block)) {
      const Index begin = seen[block.queries.size() - 1].begin, end = seen[0].end;
      const bool all = begin <= keys.begin && min(keys.end, block.sequence.keys) <= end;
      return all ? Touch::nothing : Touch::elements;
    }
    const Extent of_queries = extent(call.score.query_segments, block.sequence.query_place, block.queries);
    const Extent of_keys = extent(call.score.key_segments, block.sequence.key_place,
                                  {keys.begin, min(keys.end, block.sequence.keys)});
    if (of_queries.high < of_keys.low || of_keys.high < of_queries.low) return Touch::hides_all;
    const bool one = of_queries.low == of_queries.high && of_keys.low == of_keys.high;
    return one ? Touch::nothing : Touch::elements;
  }

  template <class M>
  static ATTN_FN typename M::Scores apply(const Call& call, const Row& row, typename M::Scores s,
                                          const typename M::Keys& keys) noexcept {
    if (call.segments.given()) {
      const Range seen = call.segments.of(row.entry, row.token);
      if (seen.begin <= keys.first && keys.first + keys.count <= seen.end) return s;
      if (seen.begin >= 0) return M::hide_outside(s, keys, seen.begin, seen.end - 1);
    }
    const Tensor& query_segments = call.score.query_segments;
    const Tensor& key_segments = call.score.key_segments;
    const Index segment = read_int(at(query_segments, row.entry, 0, row.token), query_segments.dtype);
    const Place& place = row.key_place;
    return M::hide_where_unequal(s, at(key_segments, place.batch, 0, place.first + keys.first), key_segments,
                                 segment, keys);
  }

 private:
  struct Extent {
    Index low, high;
  };
  static ATTN_FN Extent extent(const Tensor& segments, const Place& place, Range tokens) noexcept {
    Extent e{kUnbounded, -kUnbounded};
    for (Index token = tokens.begin; token < tokens.end; ++token) {
      const Index segment = read_int(at(segments, place.batch, 0, place.first + token), segments.dtype);
      e = {min(e.low, segment), max(e.high, segment)};
    }
    return e;
  }
};

}  // namespace attncore
