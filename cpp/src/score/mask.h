#pragma once

#include "score.h"

namespace attncore {

/// A boolean array that broadcasts to (batch, head, query, key): True = attend.
struct Mask : NoOp {
  /// Of a line that all rows share: padding, mostly.
  static ATTN_FN Range narrow(const Call& call, const Block& block, Range keys) noexcept {
    const Tensor& mask = call.score.mask;
    const bool one_head = mask.stride[1] == 0 || block.heads.size() == 1;
    if (!mask.given() || mask.stride[2] != 0 || !one_head) return keys;
    const std::byte* const line = at(mask, block.sequence.batch, block.heads.begin);
    while (!keys.empty() && line[(keys.end - 1) * mask.stride[3]] == std::byte{0}) --keys.end;
    return keys;
  }

  static ATTN_FN Touch touch(const Call& call, const Block& block, Range keys) noexcept {
    if (!call.score.mask.given()) return Touch::nothing;
    return block.notes.find(keys.begin, Look{call.score.mask, block, keys});
  }

  static ATTN_FN void fetch(const Call& call, const Row& row, Range keys) noexcept {
    fetch_row(call.score.mask, row, keys);
  }

  template <class M>
  static ATTN_FN typename M::Scores apply(const Call& call, const Row& row, typename M::Scores s,
                                          const typename M::Keys& keys) noexcept {
    const Tensor& mask = call.score.mask;
    return M::hide_where_zero(s, at(mask, row.batch, row.head, row.query, keys.first), mask.stride[3], keys);
  }

 private:
  /// A lambda might not be inlined.
  struct Look {
    const Tensor& mask;
    const Block& block;
    Range keys;
    ATTN_FN Touch operator()() const noexcept { return look(mask, block, keys); }
  };

  /// Looks at the tile's bytes once: rows that broadcasting repeats are not looked at again.
  static ATTN_FN Touch look(const Tensor& mask, const Block& block, Range keys) noexcept {
    const Range heads = mask.stride[1] == 0 ? Range{0, 1} : block.heads;
    const Range queries = mask.stride[2] == 0 ? Range{0, 1} : block.queries;
    const Index count = min(keys.end, block.sequence.keys) - keys.begin;
    bool any = false, all = true;
    for (Index head = heads.begin; head < heads.end; ++head) {
      for (Index query = queries.begin; query < queries.end; ++query) {
        look_at(at(mask, block.sequence.batch, head, query, keys.begin), mask.stride[3], count, any, all);
        if (any && !all) return Touch::elements;
      }
    }
    return all ? Touch::nothing : Touch::hides_all;
  }

  /// Words are joined before they are compared, so that compilers take whole registers of them.
  static ATTN_FN void look_at(const std::byte* p, Index stride, Index count, bool& any, bool& all) noexcept {
    constexpr std::uint64_t kEvery = 0x0101010101010101U;  // NumPy's booleans are 0 or 1
    std::uint64_t joined = 0, common = kEvery;
    const Index words = stride == 1 ? count / 8 : 0;
    for (Index i = 0; i < words; ++i) {
      std::uint64_t word = 0;
      __builtin_memcpy(&word, p + 8 * i, 8);
      joined |= word;
      common &= word;
    }
    for (Index i = 8 * words; i < count; ++i) {
      const std::uint64_t repeated = p[i * stride] != std::byte{0} ? kEvery : 0;
      joined |= repeated;
      common &= repeated;
    }
    any |= joined != 0;
    all &= common == kEvery;
  }
};

}  // namespace attncore
