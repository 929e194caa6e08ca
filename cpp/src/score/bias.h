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

  /// Where an array's row is, and its dtype, is looked up once for all registers of scores.
  template <class M, class Visit>
  static ATTN_FN void apply_row(const Call& call, const Row& row, Visit& visit) noexcept {
    for (std::size_t i = 0; i < call.score.biases.size; ++i) {
      const Tensor& bias = call.score.biases.items[i];
      M::with_line(at(bias, row.batch, row.head, row.query), bias, [&](auto load) {
        visit([&](typename M::Scores s, const typename M::Keys& keys) {
          return M::add_or_hide(s, load(keys));
        });
      });
    }
  }
};

}  // namespace attncore
