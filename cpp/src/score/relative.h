#pragma once

#include "score.h"

namespace attncore {

/// T5's relative position bias (Raffel et al. 2020): + line[head][key − position], which is the table's entry of the
/// distance's bucket (distance_bias.cpp).
struct Relative : NoOp {
  static ATTN_FN Touch touch(const Call& call, const Block& block, Range keys) noexcept {
    (void)block, (void)keys;
    return call.distance_bias.given() ? Touch::elements : Touch::nothing;
  }

  template <class M>
  static ATTN_FN typename M::Scores apply(const Call& call, const Row& row, typename M::Scores s,
                                          const typename M::Keys& keys) noexcept {
    using T = typename M::Scalar;
    const DistanceBias& bias = call.distance_bias;
    const T* const line = reinterpret_cast<const T*>(bias.line) + row.head * bias.distances();
    return M::add_or_hide(s, M::by_distance(line, bias.farthest, keys.first - row.position));
  }
};

}  // namespace attncore
