// A score step is one small struct that stands between Q·Kᵀ and the softmax.  It has
//
// - visible(call, block): the keys that any row of the block may see; what lies outside is never touched;
// - is_band(call, block), if it can do nothing but leave each query a range of keys that never moves back from one to the next: whether it
//   does (cpu/tile/band.h);
// - band(call, position), if such ranges move on with the query's position: that range;
// - narrow(call, block, keys), if it finds a tile's last visible key cheaply: the keys up to that;
// - touch(call, block, keys): what it does to this tile: nothing, element work, or hides all of it;
// - apply<M>(call, row, s, keys): what becomes of a register of scores (a float on a GPU) of one row;
//   or apply_row<M>(call, row, visit), if there is much to look up for a row: visit(s, keys → what becomes of s) goes over all;
// - fetch(call, row, keys), if it reads memory for each pair: brings what `apply` will read of a row of a tile.
//
// M is the machine's vocabulary (cpu/tile/score_math.h): M::Scores, M::Keys and the primitives that `apply` uses.
// The text compiles for CPU and CUDA.  Every call in it is inlined by force.
#pragma once

#include "../call.h"

namespace attncore {

/// A query row, or a register of them: kernels may lay scores out either way, so per-head parameters are read
/// per row.  Query, out and what is like them have it as token `token` of entry `entry`; its keys stand at `key_place`, the
/// queries' own from `new_keys` on.
struct Row {
  Index batch, head, query, position;
  Index entry, token;
  Place key_place;
  Index new_keys;
};

ATTN_FN constexpr Row row_of(const Sequence& sequence, Index head, Index query) noexcept {
  const Place& place = sequence.query_place;
  return {sequence.batch,
          head,
          query,
          query + sequence.offset,
          place.batch,
          place.first + query,
          sequence.key_place,
          sequence.keys - sequence.queries};
}

/// The row's place in a tensor like query.
ATTN_FN std::byte* at(const Tensor& t, const Row& row) noexcept {
  return at(t, row.entry, row.head, row.token);
}

enum class Touch : std::uint8_t { nothing, elements, hides_all };

/// What a mask that heads share does to a row tile: for each key tile 0, or 1 + Touch once one of the heads has looked.
struct TouchNotes {
  std::uint8_t* by_tile = nullptr;
  Index key_tile = 1;

  /// What is noted of the tile that begins at `key`; else look()'s result, which is noted then.  Threads that look at the same time
  /// note the same.
  template <class Look>
  ATTN_FN Touch find(Index key, Look look) const noexcept {
#ifdef __CUDA_ARCH__
    return look();
#else
    if (by_tile == nullptr) return look();
    std::uint8_t* const note = by_tile + key / key_tile;
    const std::uint8_t known = __atomic_load_n(note, __ATOMIC_RELAXED);
    if (known > 0) return static_cast<Touch>(known - 1);
    const Touch touch = look();
    __atomic_store_n(note, static_cast<std::uint8_t>(static_cast<int>(touch) + 1), __ATOMIC_RELAXED);
    return touch;
#endif
  }
};

inline constexpr Index kBeyond = Index{1} << 61;  // beyond every position, and sums with one do not overflow

/// The query rows of one tile: `heads` × `queries` of one sequence.
struct Block {
  Sequence sequence;
  Range heads, queries;
  TouchNotes notes = {};
  ATTN_FN Index first_position() const noexcept { return queries.begin + sequence.offset; }
  ATTN_FN Index last_position() const noexcept { return queries.end - 1 + sequence.offset; }
};

/// Rows are ordered (query, head of the group): the heads that share a KV head stand beside each other.
ATTN_FN Block block_of(const Call& call, const Sequence& sequence, Index kv_head, Range rows) noexcept {
  const Index head = kv_head * call.group;
  const Range queries =
      call.group == 1 ? rows : Range{rows.begin / call.group, ceil_div(rows.end, call.group)};
  return {sequence, {head, head + call.group}, queries};
}

/// Fetches what `apply` will read of an array over (batch, head, query, key) for one row of a tile.
ATTN_FN void fetch_row(const Tensor& t, const Row& row, Range keys) noexcept {
#ifdef __CUDA_ARCH__
  (void)t, (void)row, (void)keys;
#else
  constexpr Index kLine = 64;
  const std::byte* const items = at(t, row.batch, row.head, row.query, keys.begin);
  for (Index byte = 0; byte < keys.size() * t.stride[3]; byte += kLine) __builtin_prefetch(items + byte);
#endif
}

/// The defaults of a step.
struct NoOp {
  static ATTN_FN Range visible(const Call& call, const Block& block) noexcept {
    (void)call;
    return {0, block.sequence.keys};
  }
};

}  // namespace attncore
