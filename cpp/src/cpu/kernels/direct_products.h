// Few rows' products with keys and values where they lie (decode_scores.h says why they are not packed).
#pragma once

#include "decode_outputs.h"
#include "decode_scores.h"
#include "grouped_scores.h"

namespace attncore {

/// Bits depend on it: it may look at nothing but the sequence's own rows.
template <class Isa, class T, class Item = T>
bool reads_in_place(const Call& call, const Sequence& sequence) noexcept {
  // Packing as many keys as a cache holds costs less than it saves, but for a matrix unit.
  constexpr Index kFew = 8, kMany = kDirectTiles<Isa, Item> ? 0 : 256;
  const Index rows = sequence.queries * call.group;
  return rows <= kFew || (rows <= kMostDirectRows<Isa, Item> && sequence.keys >= kMany);
}

/// The same.
template <class Isa, class T>
bool groups_rows(const Call& call, const Sequence& sequence) noexcept {
  constexpr Index kMostApart = 4;
  return kGroups<Isa, T> > 1 && sequence.queries * call.group > kMostApart;
}

/// C = keep · C + sums, or the sums where more keys follow.
template <class T>
struct Ended {
  const T* keep;
  template <class V>
  ATTN_INLINE V operator()(const T* c, V sum, Index row) const noexcept {
    return keep != nullptr ? load<V>(c) * keep[row] + sum : sum;
  }
};

template <class Isa, class T, class Item>
struct DirectProducts {
  const Call& call;
  const KeySource keys, values;
  const Index reach;
  const bool in_place, grouped;

  DirectProducts(const Call& of, const Task& task) noexcept
      : call(of),
        keys(key_source(of, of.key, task.sequence, task.kv_head)),
        values(key_source(of, of.value, task.sequence, task.kv_head)),
        reach(task.reach),
        in_place(reads_in_place<Isa, T, Item>(of, task.sequence)),
        grouped(groups_rows<Isa, T>(of, task.sequence)) {}

  /// Scores (rows, some keys), scaled.  `packed`: room for the queries as products take them; `room`: for these keys.
  void dot(T* scores, const RowList<const Item>& queries, Range some, const Beside& beside, Item* packed,
           std::byte* room) const noexcept {
    const auto dot_rows = grouped ? dot_grouped_rows<Isa, T, Item, kStride, Scaled<T>>
                                  : dot_few_rows<Isa, T, Item, kStride, Scaled<T>>;
    dot_rows(scores, queries, {keys, some, reach, call.dim, room, beside}, keys.storage, some.size(),
             call.dim, packed, Scaled<T>{static_cast<T>(call.scale)});
  }

  /// C = keep · C + before + the products of some keys' values with their weights, which are `at` keys into P.
  void add(const RowList<T>& c, const T* const* before, Matrix<T> weights, Range some, Index at,
           const Beside& beside, std::byte* room, const T* keep) const noexcept {
    for (Index row = c.size; row < round_up(c.size, rows_at_once<Isa, T>(c.size)); ++row)
      __builtin_memset(weights.row(row), 0, kStride * sizeof(T));
    add_few_rows<Isa, T, Item, kStride>(c, before,
                                        reinterpret_cast<const Item*>(weights.data) + depth_of<T, Item>(at),
                                        {values, some, reach, call.value_dim, room, beside}, values.storage,
                                        some.size(), call.value_dim, Ended<T>{keep});
  }

 private:
  static constexpr Index kStride = Scratch<Isa, T, Item>::score_stride();
};

}  // namespace attncore
