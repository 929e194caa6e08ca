#pragma once

#include "score.h"

namespace attncore {

/// Keys past the sequence's length do not exist; the padding of the last register is among them.
struct Lengths : NoOp {
  static ATTN_FN Touch touch(const Call& call, const Block& block, Range keys) noexcept {
    (void)call;
    return keys.end <= block.sequence.keys ? Touch::nothing : Touch::elements;
  }

  template <class M>
  static ATTN_FN typename M::Scores apply(const Call& call, const Row& row, typename M::Scores s,
                                          const typename M::Keys& keys) noexcept {
    (void)call, (void)row;
    return M::hide_outside(s, keys, 0, keys.first + keys.count - 1);
  }
};

}  // namespace attncore
