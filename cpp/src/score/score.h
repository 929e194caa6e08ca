// What a score step is: one small struct that stands between Q·Kᵀ and the softmax.
//
//   visible(call, block)          the keys that any row of the block may see: what lies outside is never
//   touched touch(call, block, keys)      what it does to this tile: nothing, element work, or hides all of
//   it apply<M>(call, row, s, keys)  a register of scores (a float on a GPU) of one row, keys.first + lane
//
// M is the machine's vocabulary (cpu/tile/score_math.h): M::Scores, M::Keys and the primitives that `apply`
// uses. The text compiles for CPU and CUDA.  Every call in it is inlined by force.
#pragma once

#include "../call.h"

namespace attncore {

/// A query row, or a register of them: kernels may lay scores out either way, so per-head parameters are read
/// per row.
struct Row {
  Index batch, head, query, position;
};

/// The query rows of one tile: `heads` × `queries` of one sequence.
struct Block {
  Sequence sequence;
  Range heads, queries;
  ATTN_FN Index first_position() const noexcept { return queries.begin + sequence.offset; }
  ATTN_FN Index last_position() const noexcept { return queries.end - 1 + sequence.offset; }
};

/// Rows are ordered (query, head of the group): the heads that share a KV head stand beside each other.
ATTN_FN Block block_of(const Call& call, const Sequence& sequence, Index kv_head, Range rows) noexcept {
  const Index head = kv_head * call.group;
  return {sequence, {head, head + call.group}, {rows.begin / call.group, ceil_div(rows.end, call.group)}};
}

enum class Touch : std::uint8_t { nothing, elements, hides_all };

/// The defaults of a step.
struct NoOp {
  static ATTN_FN Range visible(const Call& call, const Block& block) noexcept {
    (void)call;
    return {0, block.sequence.keys};
  }
};

}  // namespace attncore
