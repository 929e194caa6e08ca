// Decoding in bfloat16 by kernels of tiles: few query rows of a KV head, against keys where they lie.
#pragma once

#include "tile_case.h"

namespace attncore {
namespace {

/// Keys of each entry, some of which all entries share, in pages of so many slots; 0: one after another.
struct DecodeShape {
  Shape n;
  Index slots = 0, shared = 0;
};

/// Pages stand in any order, and what is no token is NaN.
struct DecodeCase : TileCase {
  Index slots, pages = 0;             // of all entries
  std::vector<std::int32_t> table;    // (batch, pages of an entry)
  std::vector<std::int32_t> lengths;  // of keys
  std::vector<std::int32_t> query_lengths;

  explicit DecodeCase(const DecodeShape& shape) : TileCase(shape.n), slots(shape.slots) {
    lengths.assign(static_cast<std::size_t>(n.batch), static_cast<std::int32_t>(n.keys));
    if (slots > 0) page(shape.shared);
  }

  [[nodiscard]] Tensor ints(const std::vector<std::int32_t>& items, Index width = 1) const {
    return Tensor::contiguous(items.data(), DType::i32, {n.batch, 1, 1, width});
  }

  /// A call of one entry alone.
  [[nodiscard]] Problem entry(Index i) const {
    Problem one = problem;
    for (Tensor* const t : {&one.query, &one.out, &one.lse, &one.paging.block_table, &one.score.key_lengths,
                            &one.score.query_lengths}) {
      if (!t->given()) continue;
      t->data = at(*t, i, 0);
      t->shape[0] = 1;
    }
    return one;
  }

 private:
  void page(Index shared) {
    const Index own = n.keys / slots + 1, same = shared / slots;
    pages = same + n.batch * (own - same);
    while (pages % 7 == 0) ++pages;
    const auto place = [&](Index number) { return static_cast<std::int32_t>((number * 7 + 3) % pages); };
    for (Index i = 0; i < n.batch * own; ++i) {
      const Index entry = i / own, number = i % own;
      table.push_back(place(number < same ? number : number + entry * (own - same)));
    }
    k = pool(n.dim);
    v = pool(n.value_dim);
    problem.key = Tensor::contiguous(k.data(), DType::bf16, {pages, n.kv_heads, slots, n.dim});
    problem.value = Tensor::contiguous(v.data(), DType::bf16, {pages, n.kv_heads, slots, n.value_dim});
    problem.paging.block_table = ints(table, own);
    problem.score.key_lengths = ints(lengths);
  }

  [[nodiscard]] Halves pool(Index dims) const {
    Random random;
    Halves items(static_cast<std::size_t>(pages * n.kv_heads * slots * dims), std::uint16_t{0xffff});
    const Index own = static_cast<Index>(table.size()) / n.batch;
    for (Index entry = 0; entry < n.batch; ++entry) {
      for (Index token = 0; token < lengths[static_cast<std::size_t>(entry)]; ++token) {
        for (Index head = 0; head < n.kv_heads; ++head) {
          const Index page = table[static_cast<std::size_t>(entry * own + token / slots)];
          const Halves numbers = noise_of_halves(dims, random);
          std::copy(numbers.begin(), numbers.end(),
                    items.begin() + ((page * n.kv_heads + head) * slots + token % slots) * dims);
        }
      }
    }
    return items;
  }
};

}  // namespace
}  // namespace attncore
