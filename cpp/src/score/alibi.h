#pragma once

#include "score.h"

namespace attncore {

/// Attention with linear biases (Press et al. 2022): + slope · −|position − key|, a slope a head.
struct Alibi : NoOp {
  static ATTN_FN Touch touch(const Call& call, const Block& block, Range keys) noexcept {
    (void)block, (void)keys;
    return call.score.alibi.given() ? Touch::elements : Touch::nothing;
  }

  template <class M>
  static ATTN_FN typename M::Scores apply(const Call& call, const Row& row, typename M::Scores s,
                                          const typename M::Keys& keys) noexcept {
    const Tensor& slopes = call.score.alibi;
    const auto slope = M::load_one(at(slopes, row.batch, row.head), slopes.dtype);
    return s - slope * M::distance(row.position, keys);
  }

  /// The terms of the slope's gradient.
  template <class M>
  static ATTN_FN typename M::Scores reduce(const Row& row, typename M::Scores d_scores,
                                           const typename M::Keys& keys) noexcept {
    return -d_scores * M::distance(row.position, keys);
  }
};

}  // namespace attncore
