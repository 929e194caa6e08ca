#pragma once

#include "score.h"

namespace attncore {

/// Packed documents: a query attends to the keys of its own segment only.
struct Segments : NoOp {
  static ATTN_FN Touch touch(const Call& call, const Block& block, Range keys) noexcept {
    if (!call.score.query_segments.given()) return Touch::nothing;
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
