// Forward attention of one task: tiles of keys, an online softmax, no score matrix
// (Rabe & Staats 2021; Dao et al. 2022).
#pragma once

#include "direct_products.h"
#include "rows.h"
#include "score_tile.h"
#include "turned_tile.h"

namespace attncore {

template <class Isa, class T, class Item>
class ForwardKernel {
 public:
  ForwardKernel(const Call& call, const Task& task, std::byte* memory) noexcept
      : call_(call),
        task_(task),
        row_at_{call, task},
        rows_(task.rows.size()),
        scratch_(Scratch<Isa, T, Item>::in(memory, call, rows_, task.in_gang ? kMost : 0)),
        state_(RowState<Isa, T>::in(task.state, call, rows_)),
        direct_(call, task),
        turned_(call, task, scratch_, rows_),
        pace_(task.ahead.pace(rows_ * ceil_div(task.keys.size(), kKeys))) {
    queries_ = rows_of<Isa, T, Item>(call.query, call.dim, row_at_, scratch_.queries, rows_, !task.loaded,
                                     direct_.in_place);
  }

  void run() noexcept {
    const Range seen = intersect(task_.keys, ScoreSteps::visible(call_, row_at_.block()));
    if constexpr (!kInPairs<T, Item>) {
      if (run_only_tile({0, seen.end})) return;
    }
    if (task_.first) state_.clear(rows_);
    for (Index first = seen.begin - seen.begin % kKeys; first < seen.end; first += kKeys) {
      if (!begin_tile({first, min(first + kKeys, seen.end)})) continue;
      if constexpr (kPacks) {
        if (!direct_.in_place) {
          run_packed_tile(state_.recent.output, [&] { return accumulated(); });
          continue;
        }
      }
      ForwardKernel* const self = this;
      run_direct_tile(&self, 1, scratch_.panel);
    }
    if (task_.last) finish_rows<Isa, T>(call_, row_at_, state_.whole(rows_), rows_);
  }

  /// For a gang: the task's one tile.  True: it sees all of it, and waits for run_direct_tile; else it is done.  `room`: for a key tile.
  bool begin_gang(std::byte* room) noexcept {
    if (task_.first) state_.clear(rows_);
    const Range seen = intersect(task_.keys, ScoreSteps::visible(call_, row_at_.block()));
    if (seen.empty() || !begin_tile({task_.keys.begin, seen.end})) return false;
    if (tile_.end == task_.keys.end) return true;
    ForwardKernel* const self = this;
    run_direct_tile(&self, 1, room);
    return false;
  }

  [[nodiscard]] bool is_grouped() const noexcept { return direct_.grouped; }
  [[nodiscard]] bool takes_tiles() const noexcept { return direct_.kTiles && direct_.grouped; }

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
    const Range keys = one.tile_;
    if (!one.packed_) one.direct_.pack(one.scratch_.direct, queries);
    one.packed_ = true;  // a gang has one tile
    one.direct_.dot(one.scratch_.scores.data, queries, keys, {}, one.scratch_.direct, room);
    T keep[kMost];
    weigh(members, count, keep);
    one.direct_.add(outputs, nullptr, one.scratch_.scores, keys, 0, {}, room, keep);
  }

  /// The rows of several KV heads, whose tokens lie beside each other, against a whole tile of keys: some tokens of each head, then the
  /// next ones, so that memory is read in its order.
  static void run_heads_tile(ForwardKernel* const* members, Index count, std::byte* room) noexcept {
    const Index keys = members[0]->tile_.size();
    const Index of_keys = members[1]->direct_.keys.data - members[0]->direct_.keys.data;
    const Index of_values = members[1]->direct_.values.data - members[0]->direct_.values.data;
    for (Index at = 0, some = at_once(count * of_keys); at < keys; at += some) {
      for (Index i = 0; i < count; ++i)
        members[i]->dot_some({at, min(at + some, keys)}, {count, of_keys, i}, room);
    }
    for (Index i = 0; i < count; ++i) members[i]->weigh(true);
    for (Index at = 0, some = at_once(count * of_values); at < keys; at += some) {
      for (Index i = 0; i < count; ++i)
        members[i]->add_some({at, min(at + some, keys)}, {count, of_values, i}, room);
    }
  }

 private:
  /// Tokens of so many bytes: the second cache holds them and the next ones.
  static Index at_once(Index bytes) noexcept {
    constexpr Index kFewest = 8, kMany = 32, kBytes = 128 << 10;
    return bytes * kMany <= kBytes ? kMany : max(kFewest, kBytes / bytes / kFewest * kFewest);
  }

  static constexpr Index kKeys = Isa::template kKeyTile<T>;
  using Weights = std::conditional_t<kInPairs<T, Item>, PairWeights<Isa>, PlainWeights<Isa, T>>;
  static constexpr Index kMost = kMostDirectRows<Isa, Item>;
  // If 8 registers hold a tile's row, it is scaled there, on its way to exp, not by the product.
  static constexpr bool kScaledLater = kKeys / kWidth<Isa, T> <= 8;
  static constexpr bool kPacks = !kInPairs<T, Item> || !HasTiles<Isa>;  // or forward_pipeline.h does

  [[nodiscard]] Range in_tile(Range some) const noexcept {
    return {tile_.begin + some.begin, tile_.begin + some.end};
  }
  void dot_some(Range some, const Beside& beside, std::byte* room) const noexcept {
    RowList<const Item> queries;
    for (Index row = 0; row < rows_; ++row) queries.add(queries_.row(row));
    if (some.begin == 0) direct_.pack(scratch_.direct, queries);
    direct_.dot(scratch_.scores.data + some.begin, queries, in_tile(some), beside, scratch_.direct, room);
  }
  /// The tile's sums wait where queries were until all its keys are there.
  void add_some(Range some, const Beside& beside, std::byte* room) const noexcept {
    const bool last = some.end == tile_.size();
    RowList<T> sums, outputs;
    for (Index row = 0; row < rows_; ++row) {
      sums.add(reinterpret_cast<T*>(scratch_.direct) + row * scratch_.padded(call_.value_dim));
      outputs.add(state_.recent.output.row(row));
    }
    direct_.add(last ? outputs : sums, some.begin > 0 ? sums.at : nullptr, scratch_.scores, in_tile(some),
                some.begin, beside, room, last ? scratch_.keep : nullptr);
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

  /// If all keys are one tile, P · V goes straight to `out`.  The same bits: in any FMA, 0 · keep + sum is the sum.
  bool run_only_tile(Range keys) noexcept {
    const bool only = task_.first && task_.last && !keys.empty() && keys.size() <= kKeys;
    const bool whole = call_.value_dim % kWidth<Isa, T> == 0 && !call_.score.sinks.given();
    if (!only || !whole || direct_.in_place) return false;
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
    band_ = band_of(call_, row_at_.block(), task_.rows, keys);
    if (turned_.takes(keys) && is_banded()) {
      return turned_.run(queries_, band_, keys, state_.recent, scratch_.keep, output, scaled(), end);
    }
    turned_.forget();
    const Index panel_bytes = KeyTile<Isa, T, Item>::bytes(call_);
    const auto tile = key_tile_of<Isa, T, Item>(call_, task_, keys, panel_bytes, scratch_.panel);
    const bool poison = tile.is_poisoned();
    gemm<Isa, T>(scratch_.scores, queries_, as_const(tile.keys), rows_, keys.size(), tile.keys.depth,
                 packed_scores(), SeenScores{band_});
    weigh_packed(poison);
    const auto values = as_const(tile.values);
    const auto finish = end();
    const Index depth = depth_of<T, Item>(keys.size());
    if (poison) return gemm_of_visible<Isa, T>(output, scratch_.weights, values, rows_, depth, finish);
    gemm<Isa, T>(output, scratch_.weights, values, rows_, call_.value_dim, depth, finish,
                 SeenWeights<kNumbers<T, Item>>{band_});
  }

  /// Whether scores become weights as they are, but for what the band hides; the padding of a register is not looked at.
  [[nodiscard]] bool is_banded() const noexcept {
    const Block block = row_at_.block();
    if (ScoreSteps::only_band(call_, block, steps_)) return true;
    return tile_.size() % kWidth<Isa, T> != 0 &&
           ScoreSteps::only_band(call_, block, ScoreSteps::touch(call_, block, tile_).steps);
  }

  /// S → P: scales, softcap, biases and masks where they have work, then the online softmax; `mark`: hidden pairs become −0.
  void weigh(bool mark) noexcept {
    const Range keys = tile_;
    TileFactors<Isa, T> factors;
    TileCoins<Isa, T> coins;
    factors.look_up(call_, task_, keys);
    for (Index row = 0; row < rows_; ++row) {
      T* const scores = scratch_.scores.row(row);
      fetch_next_row(call_, row_at_, row, rows_, steps_, keys);
      for (Index i = 0; i < pace_; ++i) task_.ahead.fetch(fetched_++);
      const Range seen = seen_of<Isa, T>(band_, keys, row);
      const T* const of_row =
          factors.apply(call_, row_at_, row, steps_, keys, task_.sequence.keys, seen, scores, coins);
      state_.recent.template update<Weights>(row, scores, keys.size(), mark || factors.values != nullptr,
                                             scratch_.keep, of_row, seen);
    }
  }

  /// The same of packed_scores().  Where a scale is all that is to be done, as in most tiles, weigh_plain applies it.
  void weigh_packed(bool mark) noexcept {
    if constexpr (kScaledLater) {
      const bool plain = steps_ == 0 && !mark && band_.whole && tile_.size() == kKeys &&
                         !call_.dropout.given() && !call_.key_scale.given() && !call_.value_scale.given();
      const float scale = scaled().scale;
      if (plain) return folds_into_exponent(scale) ? weigh_plain_rows<true>() : weigh_plain_rows<false>();
      for (Index row = 0; row < rows_; ++row)
        multiply_by<Isa, T>(scratch_.scores.row(row), scale, seen_of<Isa, T>(band_, tile_, row));
    }
    weigh(mark);
  }
  template <bool kFolds>
  void weigh_plain_rows() noexcept {
    for (Index row = 0; row < rows_; ++row) {
      for (Index i = 0; i < pace_; ++i) task_.ahead.fetch(fetched_++);
      const auto sums = weigh_plain<Isa, Weights, kKeys, kFolds>(state_.recent, row, scratch_.scores.row(row),
                                                                 scaled().scale, scratch_.keep);
      state_.recent.template add<Weights>(row, scratch_.keep[row], sums);
    }
  }

  [[nodiscard]] Scaled<T> scaled() const noexcept { return {static_cast<T>(call_.scale)}; }
  [[nodiscard]] auto packed_scores() const noexcept {
    if constexpr (kScaledLater) {
      return Stored<T>{};
    } else {
      return scaled();
    }
  }
  [[nodiscard]] Accumulated<T> accumulated() const noexcept { return {scratch_.keep}; }

  const Call& call_;
  const Task& task_;
  const TaskRows row_at_;
  const Index rows_;
  Scratch<Isa, T, Item> scratch_;
  const RowState<Isa, T> state_;
  const DirectProducts<Isa, T, Item> direct_;
  TurnedTile<Isa, T, Item> turned_;
  bool packed_ = false;           // whether direct_.pack has packed the queries
  const Index pace_;              // rows of task.ahead to fetch with each row
  Index fetched_ = 0;             // of them
  Matrix<const Item> queries_{};  // (rows, dim)
  Range tile_;                    // the keys at work
  StepSet steps_ = 0;             // with work in tile_
  Band band_;                     // of tile_, where it is packed; else all of it
};

}  // namespace attncore
