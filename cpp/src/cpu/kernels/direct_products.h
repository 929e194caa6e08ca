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

/// Products of few rows with tokens where they lie, by whatever unit there is.
template <class Isa, class T, class Item>
struct FewRows {
  static constexpr bool kTiles = kDirectTiles<Isa, Item>;  // a matrix unit multiplies grouped rows
  const bool grouped;

  explicit FewRows(bool groups) noexcept : grouped(groups) {}

  /// Rows as the products of grouped ones take them; else nothing.
  void pack(Item* packed, const RowList<const Item>& rows, Index dims) const noexcept {
    if (!grouped) return;
    if constexpr (kTiles) {
      pack_columns<Isa>(packed, rows, dims);
    } else if constexpr (kGroupsRows<Isa, T>) {
      group_rows<Isa>(packed, rows, depth_of<T, Item>(dims));
    }
  }

  /// C (rows, count) = finish(rows · tokensᵀ).  `packed`: what pack left, or room.
  template <class Finish>
  void dot(T* c, const RowList<const Item>& rows, const Tokens<Isa, T>& tokens, DType storage, Index count,
           Index dims, Item* packed, Finish finish) const noexcept {
    if (!grouped) {
      return dot_few_rows<Isa, T, Item, kStride>(c, rows, tokens, storage, count, dims, packed, finish);
    }
    if constexpr (kTiles) {
      dot_tile_rows<Isa, kStride>(c, packed, rows.size, tokens, storage, count, dims, finish);
    } else if constexpr (kGroupsRows<Isa, T>) {
      dot_grouped_rows<Isa, T, Item, kStride>(c, packed, rows.size, tokens, storage, count, dims, finish);
    }
  }

 protected:
  static constexpr Index kStride = Scratch<Isa, T, Item>::score_stride();
};

template <class Isa, class T, class Item>
struct DirectProducts : FewRows<Isa, T, Item> {
  using FewRows<Isa, T, Item>::kTiles, FewRows<Isa, T, Item>::grouped;

  const Call& call;
  const KeySource keys, values;
  const Index reach;
  const bool in_place;

  DirectProducts(const Call& of, const Task& task) noexcept
      : FewRows<Isa, T, Item>(groups_rows<Isa, T>(of, task.sequence)),
        call(of),
        keys(key_source(of, of.key, task.sequence, task.kv_head)),
        values(key_source(of, of.value, task.sequence, task.kv_head)),
        reach(task.reach),
        in_place(reads_in_place<Isa, T, Item>(of, task.sequence)) {}

  /// Queries as dot takes them.
  void pack(Item* packed, const RowList<const Item>& queries) const noexcept {
    FewRows<Isa, T, Item>::pack(packed, queries, call.dim);
  }

  /// Scores (rows, some keys), scaled.  `packed`: what pack left, or room; `room`: for these keys.
  void dot(T* scores, const RowList<const Item>& queries, Range some, const Beside& beside, Item* packed,
           std::byte* room) const noexcept {
    const Tokens<Isa, T> tokens(keys, some, reach, call.dim, room, beside);
    FewRows<Isa, T, Item>::dot(scores, queries, tokens, keys.storage, some.size(), call.dim, packed,
                               Scaled<T>{static_cast<T>(call.scale)});
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
  using FewRows<Isa, T, Item>::kStride;
};

}  // namespace attncore
