// What a task works with: packed key tiles, scratch memory, its rows.
#pragma once

#include "../../score/steps.h"
#include "../tile/parts.h"
#include "../tile/score_math.h"
#include "items.h"
#include "kernels.h"

namespace attncore {

/// Rows of a sequence and KV head, up to which keys and values may be read where they lie.
inline constexpr Index kDirectRows = 16;

/// Whether they are multiplied by a matrix unit, which takes twice as many.
template <class Isa, class Item>
inline constexpr bool kDirectTiles = HasTiles<Isa> && std::is_same_v<Item, Bf16Pair>;
template <class Isa, class Item>
inline constexpr Index kMostDirectRows = (kDirectTiles<Isa, Item> ? 2 : 1) * kDirectRows;

/// The depth of a product over so many dims or keys.
template <class T, class Item>
ATTN_INLINE Index depth_of(Index count) noexcept {
  if constexpr (kSplit<Item>) return parts_depth<kParts<Item>>(count);
  return kInPairs<T, Item> ? ceil_div(count, 2) : count;
}

/// Of a packed panel: for a matrix unit a multiple of kTileDepth.
template <class Isa, class T, class Item>
ATTN_INLINE Index panel_depth(Index count) noexcept {
  const Index depth = depth_of<T, Item>(count);
  return kInPairs<T, Item> && HasTiles<Isa> ? round_up(depth, kTileDepth) : depth;
}

/// The panels of one key tile, in Sizes::panel bytes.
template <class Isa, class T, class Item>
struct KeyTile {
  static constexpr Index kKeys = Isa::template kKeyTile<T>, kWords = kSplit<Item> ? kKeys / kKeyBits : 1;

  Panel<Item> keys;    // (dim, keys): Kᵀ
  Panel<Item> values;  // (keys, value_dim)
  KeyBits* poison;     // 0, or 1 if values hold Inf or NaN; of parts a bit for each key whose value is harmed
  KeyBits* poisoned_keys;  // the same of keys, where there are parts

  static ATTN_INLINE KeyTile in(std::byte* memory, const Call& call, Index count) noexcept {
    const Index dims = panel_depth<Isa, T, Item>(call.dim), depth = panel_depth<Isa, T, Item>(count);
    Item* const keys = reinterpret_cast<Item*>(memory);
    Item* const values = keys + panel_items<Isa, Item>(count, dims);
    auto* const end = reinterpret_cast<KeyBits*>(values + panel_items<Isa, Item>(call.value_dim, depth));
    return {{keys, count, dims}, {values, call.value_dim, depth}, end, end + kWords};
  }
  static ATTN_INLINE Index bytes(const Call& call) noexcept {
    const Index keys = panel_items<Isa, Item>(kKeys, panel_depth<Isa, T, Item>(call.dim));
    const Index values = panel_items<Isa, Item>(call.value_dim, panel_depth<Isa, T, Item>(kKeys));
    // Few rows are not rounded, and may copy a tile's keys or values here.
    const Index copies = call.precision == Precision::medium ? kKeys * max(call.dim, call.value_dim) : 0;
    const Index words = kSplit<Item> ? 2 * kWords : 1;
    return round_up(max(keys + values + words, copies) * Index{sizeof(Item)}, 64);
  }
  [[nodiscard]] ATTN_INLINE bool is_poisoned() const noexcept { return any_key(poison, kWords); }
};

/// The panels of parts; which keys and values are harmed is looked up where some are.
template <class Isa, int n>
void pack_split_tile(const KeyTile<Isa, float, Part<n>>& tile, const KeySource& k, const KeySource& v,
                     Range keys, Index dim) noexcept {
  __builtin_memset(tile.poison, 0, 2 * tile.kWords * sizeof(KeyBits));
  with_part_storage(k.storage, [&]<DType kStorage>() {
    if (!pack_parts_transposed<Isa, kStorage>(tile.keys, k, keys.begin, dim)) {
      find_harmed<Isa, kStorage>(k, keys.begin, keys.size(), dim, tile.poisoned_keys);
    }
    if (!pack_parts<Isa, kStorage>(tile.values, v, keys.begin, keys.size())) {
      find_harmed<Isa, kStorage>(v, keys.begin, keys.size(), tile.values.columns, tile.poison);
    }
  });
}

/// Packs keys transposed, of so many dims, where pairs are of bfloat16.
template <class Isa, class T, class Item>
ATTN_INLINE void pack_items_transposed(Panel<Item> panel, const KeySource& source, Index first,
                                       Index dims) noexcept {
  if constexpr (kInPairs<T, Item>) {
    pack_pairs_transposed<Isa, DType::bf16>(panel, source, first, dims);
  } else {
    pack_transposed<Isa, T>(panel, source, first);
  }
}
/// Packs so many keys, not transposed.  Returns whether all items are finite.
template <class Isa, class T, class Item>
ATTN_INLINE bool pack_items(Panel<Item> panel, const KeySource& source, Index first, Index keys) noexcept {
  if constexpr (kInPairs<T, Item>) {
    return pack_pairs<Isa, DType::bf16>(panel, source, first, keys);
  } else {
    return pack_rows<Isa, T>(panel, source, first);
  }
}

/// Packs values, as they are stored.  Returns whether all items are finite.
template <class Isa, class T, class Item>
bool pack_values(Panel<Item> panel, const KeySource& source, Index first, Index keys) noexcept {
  if constexpr (kInPairs<T, Item>) {
    return with_pair_storage(source.storage, [&]<DType kStorage>() {
      return pack_pairs<Isa, kStorage>(panel, source, first, keys);
    });
  } else {
    return pack_rows<Isa, T>(panel, source, first);
  }
}

template <class Isa, class T, class Item>
void pack_key_tile(const Call& call, const Sequence& sequence, Index kv_head, Range keys,
                   std::byte* memory) noexcept {
  const auto tile = KeyTile<Isa, T, Item>::in(memory, call, keys.size());
  const KeySource k = key_source(call, call.key, sequence, kv_head);
  const KeySource v = key_source(call, call.value, sequence, kv_head);
  if constexpr (kSplit<Item>) {
    pack_split_tile<Isa>(tile, k, v, keys, call.dim);
  } else {
    if constexpr (kInPairs<T, Item>) {
      with_pair_storage(k.storage, [&]<DType kStorage>() {
        pack_pairs_transposed<Isa, kStorage>(tile.keys, k, keys.begin, call.dim);
      });
    } else {
      pack_transposed<Isa, T>(tile.keys, k, keys.begin);
    }
    *tile.poison = pack_values<Isa, T>(tile.values, v, keys.begin, keys.size()) ? 0 : 1;
  }
}

/// Values where they lie, if products can take them from there: key after key, whole registers.  Else nothing.
template <class Isa, class T>
ATTN_INLINE const T* values_in_place(const KeySource& v, Index first, Index columns) noexcept {
  const bool whole = columns % kWidth<Isa, T> == 0 && v.token_stride == columns * Index{sizeof(T)};
  const bool lies = whole && v.pages == nullptr && lies_in_items<T, T>(v, columns);
  return lies ? reinterpret_cast<const T*>(v.token(first)) : nullptr;
}

/// The panels of a key tile that nobody shares, packed into `memory` but for values that lie as a panel does.
template <class Isa, class T, class Item>
KeyTile<Isa, T, Item> own_key_tile(const Call& call, const Sequence& sequence, Index kv_head, Range keys,
                                   std::byte* memory) noexcept {
  auto tile = KeyTile<Isa, T, Item>::in(memory, call, keys.size());
  if constexpr (!kInPairs<T, Item>) {
    const KeySource v = key_source(call, call.value, sequence, kv_head);
    if (const T* const values = values_in_place<Isa, T>(v, keys.begin, call.value_dim)) {
      pack_transposed<Isa, T>(tile.keys, key_source(call, call.key, sequence, kv_head), keys.begin);
      *tile.poison = all_finite<Isa>(values, keys.size() * call.value_dim) ? 0 : 1;
      tile.values.data = const_cast<T*>(values);  // read only
      tile.values.stride = call.value_dim;
      return tile;
    }
  }
  pack_key_tile<Isa, T, Item>(call, sequence, kv_head, keys, memory);
  return tile;
}

/// The panels of a key tile: packed before for all who share them, or packed here.
template <class Isa, class T, class Item>
ATTN_INLINE KeyTile<Isa, T, Item> key_tile_of(const Call& call, const Task& task, Range keys,
                                              Index panel_bytes, std::byte* room) noexcept {
  if (task.packed == nullptr) {
    return own_key_tile<Isa, T, Item>(call, task.sequence, task.kv_head, keys, room);
  }
  const Index number = (keys.begin - task.keys.begin) / Isa::template kKeyTile<T>;
  std::byte* const panel = const_cast<std::byte*>(task.packed) + number * panel_bytes;  // read only
  return KeyTile<Isa, T, Item>::in(panel, call, min(Isa::template kKeyTile<T>, task.keys.end - keys.begin));
}

template <class Isa, class T>
struct RowState {
  OnlineSoftmax<Isa, T> recent;  // since the last multiple of kFoldKeys
  OnlineSoftmax<Isa, T> before;
  bool folds;  // whether there is a `before`

  static ATTN_INLINE Index bytes(const Call& call, Index rows) noexcept {
    const Index one = round_up(OnlineSoftmax<Isa, T>::bytes(rows, call.value_dim), 64);
    return call.keys > kFoldKeys ? 2 * one : one;
  }
  static ATTN_INLINE RowState in(std::byte* memory, const Call& call, Index rows) noexcept {
    const bool folds = call.keys > kFoldKeys;
    std::byte* const second = folds ? memory + bytes(call, rows) / 2 : memory;
    return {OnlineSoftmax<Isa, T>::in(memory, rows, call.value_dim),
            OnlineSoftmax<Isa, T>::in(second, rows, call.value_dim), folds};
  }
  void clear(Index rows) const noexcept {
    recent.clear(rows);
    if (folds) before.clear(rows);
  }
  void fold(Index rows) const noexcept {
    if (!folds) return;
    before.merge(recent, rows);
    recent.clear(rows);
  }
  /// The state of all keys: merged as fold() would, so that it has the same bits whether other rows of the tile went on.
  ATTN_INLINE OnlineSoftmax<Isa, T> whole(Index rows) const noexcept {
    if (!folds) return recent;
    before.merge(recent, rows);
    return before;
  }
};

/// What a task works in: its scratch, carved up.
template <class Isa, class T, class Item = T>
struct Scratch {
  static constexpr Index kMost = kMostDirectRows<Isa, Item>;

  Matrix<T> queries;           // (rows, dim)
  Matrix<T> scores;            // (rows, key tile)
  Matrix<const Item> weights;  // over the scores
  T* keep;                     // (rows)
  Item* direct;      // for few rows: interleave_rows, group_rows, pack_columns; sums of a part of the tile
  std::byte* panel;  // one key tile, where panels are not shared

  static ATTN_INLINE Index padded(Index items) noexcept { return OnlineSoftmax<Isa, T>::padded(items); }
  // A register more than the tile: rows at distances of a power of two would share a few cache sets.
  static constexpr Index score_stride() noexcept { return Isa::template kKeyTile<T> + kWidth<Isa, T>; }

  // Few rows: those of a gang's other tasks, or that are not there, stand after one's own.
  static ATTN_INLINE Index score_rows(Index rows, Index gang_rows) noexcept {
    if (rows > kMost) return rows;
    const Index few = max(rows, gang_rows);
    if (kDirectTiles<Isa, Item>) return round_up(few, kDirectRows);
    Index at_once = 1;  // or several times so many
    while (at_once < few) at_once *= 2;
    return at_once;
  }
  static ATTN_INLINE Scratch carve(Carver& from, const Call& call, Index rows, Index gang_rows) noexcept {
    const Index stride = padded(call.dim), all = score_rows(rows, gang_rows);
    T* const queries = from.take<T>(rows * stride);
    // Turned ones are (keys, rows).
    T* const scores = from.take<T>(max(all * score_stride(), padded(rows) * Isa::template kKeyTile<T>));
    T* const keep = from.take<T>(padded(rows));
    const Index dims = kDirectTiles<Isa, Item> ? round_up(call.dim, kRunItems) : stride;
    T* const direct = from.take<T>(rows <= kMost ? all * max(dims, padded(call.value_dim)) : 0);
    return {{queries, stride},
            {scores, score_stride()},
            {reinterpret_cast<const Item*>(scores), score_stride()},
            keep,
            reinterpret_cast<Item*>(direct),
            nullptr};
  }
  static ATTN_INLINE Index bytes(const Call& call, Index rows, Index gang_rows) noexcept {
    Carver counted;
    (void)carve(counted, call, rows, gang_rows);
    return round_up(counted.used(), 64);
  }

  /// Never less than for fewer rows: a plan asks for its largest row tile.
  static ATTN_INLINE Sizes sizes(const Call& call, Index rows) noexcept {
    const Index few = min(rows, kMost);
    return {max(bytes(call, rows, 0), bytes(call, few, 0)), bytes(call, few, kMost),
            RowState<Isa, T>::bytes(call, rows), KeyTile<Isa, T, Item>::bytes(call)};
  }

  /// Scores and weights become another's rows from `row` on.
  ATTN_INLINE void share_scores(const Scratch& other, Index row) noexcept {
    scores.data = other.scores.row(row);
    weights.data = other.weights.row(row);
  }

  static ATTN_INLINE Scratch in(std::byte* memory, const Call& call, Index rows,
                                Index gang_rows = 0) noexcept {
    Carver from(memory);
    Scratch scratch = carve(from, call, rows, gang_rows);
    scratch.panel = memory + sizes(call, rows).scratch;
    return scratch;
  }
};

/// The rows of a task.
struct TaskRows {
  const Call& call;
  const Task& task;
  ATTN_INLINE Row operator()(Index row) const noexcept {
    const Index at = task.rows.begin + row;
    const Index query = call.group == 1 ? at : at / call.group;  // a division costs as much as an exp
    const Index head = task.kv_head * call.group + (at - query * call.group);
    return row_of(task.sequence, head, query);
  }
  ATTN_INLINE Block block() const noexcept {
    Block block = block_of(call, task.sequence, task.kv_head, task.rows);
    block.notes = task.notes;
    return block;
  }
};

}  // namespace attncore
