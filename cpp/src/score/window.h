#pragma once

#include "score.h"

namespace attncore {

/// Causal masking and sliding windows are one band: position − left ≤ key ≤ position + right.
struct Window : NoOp {
  static ATTN_FN Index first_key(const Call& call, Index position) noexcept {
    return call.score.left == kUnbounded ? -kBeyond : position - call.score.left;
  }
  static ATTN_FN Index last_key(const Call& call, Index position) noexcept {
    return call.score.right == kUnbounded ? kBeyond : position + call.score.right;
  }

  static ATTN_FN bool is_band(const Call& call, const Block& block) noexcept {
    (void)call, (void)block;
    return true;
  }
  static ATTN_FN Range band(const Call& call, Index position) noexcept {
    return {first_key(call, position), last_key(call, position) + 1};
  }

  static ATTN_FN Range visible(const Call& call, const Block& block) noexcept {
    return {first_key(call, block.first_position()), last_key(call, block.last_position()) + 1};
  }

  static ATTN_FN Touch touch(const Call& call, const Block& block, Range keys) noexcept {
    // The last row's band begins last, the first row's ends first.
    const Index begin = first_key(call, block.last_position());
    const Index last = last_key(call, block.first_position());
    return begin <= keys.begin && keys.end - 1 <= last ? Touch::nothing : Touch::elements;
  }

  template <class M>
  static ATTN_FN typename M::Scores apply(const Call& call, const Row& row, typename M::Scores s,
                                          const typename M::Keys& keys) noexcept {
    const Range seen = band(call, row.position);
    if (seen.begin <= keys.first && keys.first + keys.count <= seen.end) return s;
    return M::hide_outside(s, keys, seen.begin, seen.end - 1);
  }
};

}  // namespace attncore
