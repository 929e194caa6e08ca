// Of a tile of scores causality and windows leave a band, and so do segments in their order:
//
//          keys:  0 1 2 3 4 5 6                                           0 1 2 3 4 5 6
//       query 0   ■ ■ ■ · · · ·      first = {−1, 3}: what lies           ■ ■ ■ · · · ·      of_query[0] = {0, 3}
//       query 1   ■ ■ ■ ■ · · ·      before the tile counts too           ■ ■ ■ · · · ·      of_query[1] = {0, 3}
//       query 2   · ■ ■ ■ ■ · ·                                           · · · ■ ■ · ·      of_query[2] = {3, 5}
//
// Products skip what lies outside, where weights are 0: the same sums, bit by bit.
#pragma once

#include "../../call.h"

namespace attncore {

/// The keys of a tile that its rows see: query q sees `first`, moved on by q, and of that what lies in of_query[q].  By default all.
/// Rows are (query, head): row i is of query (lead + i) / group.
struct Band {
  Range first;  // query 0's keys, counted from the tile's first; they may lie far outside
  Index rows = 0, keys = 0;
  Index lead = 0, group = 1;
  const Range* of_query = nullptr;  // ranges that never move back, counted as `tile` is; null: of any key
  Index tile = 0;                   // the tile's first key
  bool whole = sees_all();          // every row sees every key

  /// The keys that any of some rows sees.
  [[nodiscard]] ATTN_INLINE Range keys_of(Range some) const noexcept {
    const Range seen = hull(query_of(some.begin), query_of(some.end - 1));
    return {max(0, min(seen.begin, keys)), max(0, min(seen.end, keys))};
  }
  /// The rows that see any of some keys; of several keys, maybe some more.
  [[nodiscard]] ATTN_INLINE Range rows_of(Range some) const noexcept {
    Range queries{some.begin - first.end + 1, some.end - first.begin};
    if (of_query != nullptr) [[unlikely]] {
      queries = intersect(queries, {first_query(&Range::end, tile + some.begin),
                                    first_query(&Range::begin, tile + some.end - 1)});
    }
    return {first_row(queries.begin), first_row(queries.end)};
  }

 private:
  [[nodiscard]] ATTN_INLINE bool sees_all() const noexcept {
    const Index last = query_of(max(rows, 1) - 1);
    const bool in_first = first.end >= keys && first.begin + last <= 0;
    return in_first &&
           (of_query == nullptr || (of_query[last].begin <= tile && of_query[0].end >= tile + keys));
  }
  /// The keys from the first that query `begin` sees to the last that query `last` sees.
  [[nodiscard]] ATTN_INLINE Range hull(Index begin, Index last) const noexcept {
    const Range seen{first.begin + begin, first.end + last};
    if (of_query == nullptr) [[likely]]
      return seen;
    return intersect(seen, {of_query[begin].begin - tile, of_query[last].end - tile});
  }
  /// The first query whose range begins, or ends, after the key.
  [[nodiscard]] ATTN_INLINE Index first_query(Index Range::* edge, Index key) const noexcept {
    Index begin = 0, end = query_of(rows - 1) + 1;
    while (begin < end) {
      const Index middle = (begin + end) / 2;
      if (of_query[middle].*edge > key) {
        end = middle;
      } else {
        begin = middle + 1;
      }
    }
    return begin;
  }
  [[nodiscard]] ATTN_INLINE Index query_of(Index row) const noexcept {
    return group == 1 ? row : (lead + row) / group;
  }
  [[nodiscard]] ATTN_INLINE Index first_row(Index query) const noexcept {
    return max(0, min(max(0, min(query, rows)) * group - lead, rows));
  }
};

// What a product C (rows, columns) = A (rows, depth) · B has to do: the rows that meet some of C's columns, and the depth of some rows.

/// All of it.
struct Everything {
  static ATTN_INLINE Range rows(Range columns, Index all) noexcept {
    (void)columns;
    return {0, all};
  }
  static ATTN_INLINE Range depth(Range rows, Index all) noexcept {
    (void)rows;
    return {0, all};
  }
};

/// C is (rows, keys): scores.
struct SeenScores {
  const Band& band;
  [[nodiscard]] ATTN_INLINE Range rows(Range columns, Index all) const noexcept {
    return band.whole ? Range{0, all} : band.rows_of(columns);
  }
  static ATTN_INLINE Range depth(Range rows, Index all) noexcept { return Everything::depth(rows, all); }
};

/// C is (keys, rows), of the keys from `first` on: scores that lie turned.
struct SeenTurnedScores {
  const Band& band;
  Index first;
  [[nodiscard]] ATTN_INLINE Range rows(Range columns, Index all) const noexcept {
    if (band.whole) return {0, all};
    const Range seen = band.keys_of({columns.begin, min(columns.end, band.rows)});
    return {max(0, seen.begin - first), min(seen.end - first, all)};
  }
  static ATTN_INLINE Range depth(Range rows, Index all) noexcept { return Everything::depth(rows, all); }
};

/// A is (rows, keys), kInItem keys in an item: weights.  Transposed it is (keys, rows), kInItem rows in an item.
template <Index kInItem, bool kTransposed = false>
struct SeenWeights {
  const Band& band;
  static ATTN_INLINE Range rows(Range columns, Index all) noexcept { return Everything::rows(columns, all); }
  [[nodiscard]] ATTN_INLINE Range depth(Range some, Index all) const noexcept {
    if (band.whole) return {0, all};
    const Range seen = kTransposed ? band.rows_of(some) : band.keys_of(some);
    return {seen.begin / kInItem, ceil_div(seen.end, kInItem)};
  }
};

}  // namespace attncore
