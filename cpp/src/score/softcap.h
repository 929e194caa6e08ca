#pragma once

#include "score.h"

namespace attncore {

/// c · tanh(s / c) keeps scores within ±c (Gemma 2, Gemma Team 2024).
struct SoftCap : NoOp {
  static ATTN_FN Touch touch(const Call& call, const Block& block, Range keys) noexcept {
    (void)block, (void)keys;
    return call.softcap > 0 ? Touch::elements : Touch::nothing;
  }

  template <class M>
  static ATTN_FN typename M::Scores apply(const Call& call, const Row& row, typename M::Scores s,
                                          const typename M::Keys& keys) noexcept {
    (void)row, (void)keys;
    using T = typename M::Scalar;
    const T cap = static_cast<T>(call.softcap);
    return cap * M::tanh(s / cap);
  }

  /// d apply / d s at the result of apply: 1 − tanh².
  template <class M>
  static ATTN_FN typename M::Scores slope(const Call& call, typename M::Scores result) noexcept {
    using T = typename M::Scalar;
    const auto tanh = result / static_cast<T>(call.softcap);
    return 1 - tanh * tanh;
  }
};

}  // namespace attncore
