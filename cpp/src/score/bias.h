#pragma once

#include "score.h"

namespace attncore {

/// Adds arrays that broadcast to (batch, head, query, key).  −inf means masked, whatever the score was.
struct Bias : NoOp {
  static ATTN_FN Touch touch(const Call& call, const Block& block, Range keys) noexcept {
    const auto& biases = call.score.biases;
    for (std::size_t i = 0; i < biases.size; ++i) fetch_ahead(biases.items[i], block, keys);
    return biases.size > 0 ? Touch::elements : Touch::nothing;
  }

  template <class M>
  static ATTN_FN typename M::Scores apply(const Call& call, const Row& row, typename M::Scores s,
                                          const typename M::Keys& keys) noexcept {
    for (std::size_t i = 0; i < call.score.biases.size; ++i) {
      const Tensor& bias = call.score.biases.items[i];
      s = M::add_or_hide(s, M::load(at(bias, row.batch, row.head, row.query, keys.first), bias, keys));
    }
    return s;
  }
};

}  // namespace attncore
