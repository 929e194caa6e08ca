// Forward attention of one task: tiles of keys, an online softmax, no score matrix
// (Rabe & Staats 2021; Dao et al. 2022).
#pragma once

#include "decode_outputs.h"
#include "decode_scores.h"
#include "grouped_scores.h"
#include "rows.h"
#include "score_tile.h"
#include "tile_outputs.h"

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
template <class Isa>
bool groups_rows(const Call& call, const Sequence& sequence) noexcept {
  constexpr Index kMostApart = 4;
  return kGroupsRows<Isa> && sequence.queries * call.group > kMostApart;
}

template <class Isa, class T, class Item>
class ForwardKernel {
 public:
  ForwardKernel(const Call& call, const Task& task, std::byte* memory) noexcept
      : call_(call),
        task_(task),
        row_at_{call, task},
        rows_(task.rows.size()),
        scratch_(Scratch<Isa, T, Item>::in(memory, call, rows_)),
        state_(RowState<Isa, T>::in(task.state, call, rows_)),
        keys_(key_source(call, call.key, task.sequence, task.kv_head)),
        values_(key_source(call, call.value, task.sequence, task.kv_head)),
        direct_(reads_in_place<Isa, T, Item>(call, task.sequence)),
        grouped_(groups_rows<Isa>(call, task.sequence)),
        pace_(task.ahead.pace(rows_ * ceil_div(task.keys.size(), Isa::template kKeyTile<T>))) {
    if constexpr (kInPairs<T, Item>) {
      queries_ = {reinterpret_cast<const Item*>(scratch_.queries.data), scratch_.queries.stride};
      if (!task.loaded) load_pair_rows<Isa>(call.query, call.dim, row_at_, scratch_.queries, rows_);
    } else {
      queries_ = rows_of<Isa, T>(call.query, call.dim, row_at_, scratch_.queries, rows_, !task.loaded);
    }
  }

  void run() noexcept {
    const Index key_tile = Isa::template kKeyTile<T>;
    const Range seen = intersect(task_.keys, ScoreSteps::visible(call_, row_at_.block()));
    if constexpr (!kInPairs<T, Item>) {
      if (run_only_tile({0, seen.end})) return;
    }
    if (task_.first) state_.clear(rows_);
    for (Index first = seen.begin - seen.begin % key_tile; first < seen.end; first += key_tile) {
      if (!begin_tile({first, min(first + key_tile, seen.end)})) continue;
      if constexpr (kPacks) {
        if (!direct_) {
          run_packed_tile(state_.recent.output, [&] { return accumulated(); });
          continue;
        }
      }
      ForwardKernel* const self = this;
      run_direct_tile(&self, 1, scratch_.panel);
    }
    if (task_.last) finish_rows<Isa, T>(call_, row_at_, state_.whole(rows_), rows_);
  }

  /// For a gang: the task's one tile.  True: it sees all of it, and waits for run_direct_tile; else it is done.
  bool begin_gang() noexcept {
    if (task_.first) state_.clear(rows_);
    const Range seen = intersect(task_.keys, ScoreSteps::visible(call_, row_at_.block()));
    if (seen.empty() || !begin_tile({task_.keys.begin, seen.end})) return false;
    if (tile_.end == task_.keys.end) return true;
    ForwardKernel* const self = this;
    run_direct_tile(&self, 1, scratch_.panel);
    return false;
  }

  [[nodiscard]] bool is_grouped() const noexcept { return grouped_; }

  /// The rows of `count` tasks, grouped all or none, kMost in all at most, against the tile of keys that they share, where it lies.
  /// `room`: for a key tile.
  static void run_direct_tile(ForwardKernel* const* members, Index count, std::byte* room) noexcept {
    ForwardKernel& one = *members[0];
    RowList<const Item> queries;
    RowList<T> outputs;
    for (Index i = 0; i < count; ++i) {
      members[i]->scratch_.share_scores(one.scratch_, outputs.size);
      for (Index row = 0; row < members[i]->rows_; ++row) {
        queries.add(members[i]->queries_.row(row));
        outputs.add(members[i]->state_.recent.output.row(row));
      }
    }
    one.dot_rows(queries, room);
    T keep[kMost];
    weigh(members, count, keep);
    one.add_rows(outputs, Accumulated<T>{keep}, room);
  }

 private:
  using Weights = std::conditional_t<kInPairs<T, Item>, PairWeights<Isa>, PlainWeights<Isa, T>>;
  static constexpr Index kStride = Scratch<Isa, T, Item>::score_stride(), kMost = kMostDirectRows<Isa, Item>;
  static constexpr bool kPacks = !kInPairs<T, Item> || !HasTiles<Isa>;  // or forward_pipeline.h does

  /// S = scale · Q · Kᵀ.  Rows that are packed for it are so once: a gang has one tile.
  void dot_rows(const RowList<const Item>& rows, std::byte* room) noexcept {
    const Index keys = tile_.size(), dim = call_.dim;
    const Tokens<Isa, T> tokens(keys_, tile_, task_.reach, dim, room);
    T* const scores = scratch_.scores.data;
    Item* const packed = scratch_.direct;
    if (!grouped_) {
      return dot_few_rows<Isa, T, Item, kStride>(scores, rows, tokens, keys_.storage, keys, dim, packed,
                                                 scaled());
    }
    if constexpr (kDirectTiles<Isa, Item>) {
      if (!packed_) pack_columns<Isa>(packed, rows, dim);
      dot_tile_rows<Isa, kStride>(scores, packed, rows.size, tokens, keys_.storage, keys, dim, scaled());
    } else if constexpr (kGroupsRows<Isa>) {
      if (!packed_) group_rows<Isa>(packed, rows, depth_of<T, Item>(dim));
      dot_grouped_rows<Isa, T, Item, kStride>(scores, packed, rows.size, tokens, keys_.storage, keys, dim,
                                              scaled());
    }
    packed_ = true;
  }

  /// O = keep · O + P · V
  void add_rows(const RowList<T>& rows, Accumulated<T> finish, std::byte* room) const noexcept {
    const Index keys = tile_.size(), dim = call_.value_dim;
    const Tokens<Isa, T> tokens(values_, tile_, task_.reach, dim, room);
    const auto weights = reinterpret_cast<const Item*>(scratch_.weights.data);
    if constexpr (kDirectTiles<Isa, Item>) {
      if (grouped_) {
        return add_tile_rows<Isa, kStride>(rows, weights, tokens, values_.storage, keys, dim, finish);
      }
    }
    for (Index row = rows.size; row < round_up(rows.size, rows_at_once<Isa, T>(rows.size)); ++row)
      __builtin_memset(scratch_.scores.row(row), 0, kStride * sizeof(T));
    add_few_rows<Isa, T, Item, kStride>(rows, weights, tokens, values_.storage, keys, dim, finish);
  }

  /// S → P of each; keep: of their rows.
  static ATTN_INLINE void weigh(ForwardKernel* const* members, Index count, T* keep) noexcept {
    for (Index i = 0, row = 0; i < count; row += members[i++]->rows_) {
      members[i]->weigh(true);
      for (Index j = 0; j < members[i]->rows_; ++j) keep[row + j] = members[i]->scratch_.keep[j];
    }
  }

  /// False: nothing in the tile is seen.
  bool begin_tile(Range keys) noexcept {
    if (keys.begin % kFoldKeys == 0 && keys.begin > 0) state_.fold(rows_);
    const TileWork work = touch_tile<Isa, T>(call_, row_at_.block(), keys);
    tile_ = keys;
    steps_ = work.steps;
    if (!work.hidden) fetch_first_rows(call_, row_at_, rows_, steps_, keys);
    return !work.hidden;
  }

  /// Where all keys are one tile, its product writes out itself.  The same bits: in any FMA, 0 · keep + sum is the sum.
  bool run_only_tile(Range keys) noexcept {
    const bool only = task_.first && task_.last && !keys.empty() && keys.size() <= Isa::template kKeyTile<T>;
    const bool whole = call_.value_dim % kWidth<Isa, T> == 0 && !call_.score.sinks.given();
    if (!only || !whole || direct_) return false;
    const Matrix<T> out = rows_in_place<T>(call_.out, row_at_);
    if (out.data == nullptr || !begin_tile(keys)) return false;
    const auto& softmax = state_.recent;
    softmax.clear_sums(rows_);
    run_packed_tile(out, [&] {
      softmax.divide(scratch_.keep, rows_);
      return ScaledRows<T>{scratch_.keep};
    });
    finish_sums(call_, row_at_, softmax, rows_);
    return true;
  }

  /// `end`, called once the weights are there, says how their product with values ends.
  template <class End>
  void run_packed_tile(Matrix<T> output, End end) noexcept {
    const Range keys = tile_;
    const Index panel_bytes = KeyTile<Isa, T, Item>::bytes(call_);
    const auto tile = key_tile_of<Isa, T, Item>(call_, task_, keys, panel_bytes, scratch_.panel);
    const bool poison = tile.is_poisoned();
    gemm<Isa, T>(scratch_.scores, queries_, as_const(tile.keys), rows_, keys.size(), tile.keys.depth,
                 scaled());
    weigh(poison);
    const auto values = as_const(tile.values);
    const auto finish = end();
    const Index depth = depth_of<T, Item>(keys.size());
    if (poison) return gemm_of_visible<Isa, T>(output, scratch_.weights, values, rows_, depth, finish);
    gemm<Isa, T>(output, scratch_.weights, values, rows_, call_.value_dim, depth, finish);
  }

  /// S → P: scales, softcap, biases and masks where they have work, then the online softmax; `mark`: hidden pairs become −0.
  void weigh(bool mark) noexcept {
    const Range keys = tile_;
    factors_.look_up(call_, task_, keys);
    for (Index row = 0; row < rows_; ++row) {
      T* const scores = scratch_.scores.row(row);
      fetch_next_row(call_, row_at_, row, rows_, steps_, keys);
      for (Index i = 0; i < pace_; ++i) task_.ahead.fetch(fetched_++);
      const T* const factors =
          factors_.apply(call_, row_at_, row, steps_, keys, task_.sequence.keys, scores, coins_);
      state_.recent.template update<Weights>(row, scores, keys.size(), mark || factors_.values != nullptr,
                                             scratch_.keep, factors);
    }
  }

  [[nodiscard]] Scaled<T> scaled() const noexcept { return {static_cast<T>(call_.scale)}; }
  [[nodiscard]] Accumulated<T> accumulated() const noexcept { return {scratch_.keep}; }

  const Call& call_;
  const Task& task_;
  const TaskRows row_at_;
  const Index rows_;
  Scratch<Isa, T, Item> scratch_;
  const RowState<Isa, T> state_;
  const KeySource keys_, values_;
  const bool direct_, grouped_;
  bool packed_ = false;           // whether grouped rows are
  const Index pace_;              // rows of task.ahead to fetch with each row
  Index fetched_ = 0;             // of them
  Matrix<const Item> queries_{};  // (rows, dim)
  Range tile_;                    // of keys: the one at work, and the score steps that have work there
  StepSet steps_ = 0;
  TileCoins<Isa, T> coins_;
  TileFactors<Isa, T> factors_;
};

template <class Isa, class T, class Item>
void forward_task(const Call& call, const Task& task, std::byte* scratch) noexcept {
  ForwardKernel<Isa, T, Item>(call, task, scratch).run();
}

/// Tasks of several sequences that share their keys, one tile, where it lies; kDirectRows rows in all at most.
template <class Isa, class T, class Item>
void forward_gang(const Call& call, const Task* tasks, Index count, std::byte* scratch) noexcept {
  using Kernel = ForwardKernel<Isa, T, Item>;
  alignas(Kernel) std::byte memory[kDirectRows][sizeof(Kernel)];
  Kernel* members[kDirectRows];
  Index ready = 0;
  for (Index i = 0; i < count; ++i) {
    members[ready] = new (memory[i]) Kernel(call, tasks[i], scratch);
    scratch += Scratch<Isa, T, Item>::sizes(call, tasks[i].rows.size()).scratch;
    if (members[ready]->begin_gang()) ++ready;
  }
  for (Index first = 0, end = 0; first < ready; first = end) {
    while (end < ready && members[end]->is_grouped() == members[first]->is_grouped()) ++end;
    Kernel::run_direct_tile(members + first, end - first, scratch);
  }
}

}  // namespace attncore
