// Few rows' products with keys and values where they lie (decode_scores.h says why they are not packed).
#pragma once

#include "decode_outputs.h"
#include "decode_scores.h"
#include "grouped_scores.h"
#include "tile_outputs.h"

namespace attncore {

inline constexpr Index kMostApart = 4;  // rows of which each has registers of its own

/// Bits depend on it: it may look at nothing but the sequence's rows and keys.
template <class Isa, class T, class Item = T>
bool reads_in_place(const Call& call, const Sequence& sequence) noexcept {
  // Packing as many keys as a cache holds costs less than it saves, but for a matrix unit.
  constexpr Index kFew = 8, kSome = kGroupsRows<Isa, T> ? 24 : 64, kMany = 256;
  const Index rows = sequence.queries * call.group, keys = sequence.keys;
  if (kDirectTiles<Isa, Item> || rows <= kMostApart) return rows <= kMostDirectRows<Isa, Item>;
  return keys >= kMany ? rows <= kMostDirectRows<Isa, Item> : keys >= kSome && rows <= kFew;
}

/// The same.
template <class Isa, class T>
bool groups_rows(const Call& call, const Sequence& sequence) noexcept {
  return kGroupsRows<Isa, T> && sequence.queries * call.group > kMostApart;
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
  static constexpr bool kTiles = kDirectTiles<Isa, Item>;  // a matrix unit multiplies grouped rows

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

  /// Queries as the products of grouped rows take them; else nothing.
  void pack(Item* packed, const RowList<const Item>& queries) const noexcept {
    if (!grouped) return;
    if constexpr (kTiles) {
      pack_columns<Isa>(packed, queries, call.dim);
    } else if constexpr (kGroupsRows<Isa, T>) {
      group_rows<Isa>(packed, queries, depth_of<T, Item>(call.dim));
    }
  }

  /// Scores (rows, some keys), scaled.  `packed`: what pack left, or room; `room`: for these keys.
  void dot(T* scores, const RowList<const Item>& queries, Range some, const Beside& beside, Item* packed,
           std::byte* room) const noexcept {
    const Tokens<Isa, T> tokens(keys, some, reach, call.dim, room, beside);
    const Scaled<T> scaled{static_cast<T>(call.scale)};
    const Index count = some.size(), dim = call.dim;
    if (!grouped) {
      return dot_few_rows<Isa, T, Item, kStride>(scores, queries, tokens, keys.storage, count, dim, packed,
                                                 scaled);
    }
    if constexpr (kTiles) {
      dot_tile_rows<Isa, kStride>(scores, packed, queries.size, tokens, keys.storage, count, dim, scaled);
    } else if constexpr (kGroupsRows<Isa, T>) {
      dot_grouped_rows<Isa, T, Item, kStride>(scores, packed, queries.size, tokens, keys.storage, count, dim,
                                              scaled);
    }
  }

  /// C = keep · C + before + the products of some keys' values with their weights, which are `at` keys into P.
  void add(const RowList<T>& c, const T* const* before, Matrix<T> weights, Range some, Index at,
           const Beside& beside, std::byte* room, const T* keep) const noexcept {
    const Tokens<Isa, T> tokens(values, some, reach, call.value_dim, room, beside);
    const auto* const p = reinterpret_cast<const Item*>(weights.data) + depth_of<T, Item>(at);
    const Index count = some.size(), dim = call.value_dim;
    if constexpr (kTiles) {
      if (grouped)
        return add_tile_rows<Isa, kStride>(c, p, tokens, values.storage, count, dim, Ended<T>{keep});
    }
    for (Index row = c.size; row < round_up(c.size, rows_at_once<Isa, T>(c.size)); ++row)
      __builtin_memset(weights.row(row), 0, kStride * sizeof(T));
    add_few_rows<Isa, T, Item, kStride>(c, before, p, tokens, values.storage, count, dim, Ended<T>{keep});
  }

 private:
  static constexpr Index kStride = Scratch<Isa, T, Item>::score_stride();
};

}  // namespace attncore
