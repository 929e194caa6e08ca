#pragma once

#include "score.h"

namespace attncore {

/// Adds arrays that broadcast to (batch, head, query, key).  −inf means masked, whatever the score was.
struct Bias : NoOp {
  static ATTN_FN Touch touch(const Call& call, const Block& block, Range keys) noexcept {
    (void)block, (void)keys;
    return call.score.biases.size > 0 ? Touch::elements : Touch::nothing;
  }

  static ATTN_FN void fetch(const Call& call, const Row& row, Range keys) noexcept {
    const auto& biases = call.score.biases;
    for (std::size_t i = 0; i < biases.size; ++i) fetch_row(biases.items[i], row, keys);
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
