#pragma once

#include "score.h"

namespace attncore {

/// New tokens that form a tree (Miao et al. 2024): the last `queries` keys are theirs, and a query sees its ancestors among
/// them.
struct TreeMask : NoOp {
  static ATTN_FN Index first_key(const Sequence& sequence) noexcept {
    return sequence.keys - sequence.queries;
  }

  /// Ancestors stand before their descendants.
  static ATTN_FN Range visible(const Call& call, const Block& block) noexcept {
    if (!call.tree.given()) return NoOp::visible(call, block);
    return {0, first_key(block.sequence) + block.queries.end};
  }

  static ATTN_FN Touch touch(const Call& call, const Block& block, Range keys) noexcept {
    return call.tree.given() && keys.end > first_key(block.sequence) ? Touch::elements : Touch::nothing;
  }

  template <class M>
  static ATTN_FN typename M::Scores apply(const Call& call, const Row& row, typename M::Scores s,
                                          const typename M::Keys& keys) noexcept {
    return M::hide_where_clear(s, call.tree.line(row.entry, row.token), row.new_keys, keys);
  }
};

}  // namespace attncore
