// The vector unit's share of forward_pipeline.h: scores of a chunk of keys become weights, row by row.
#pragma once

#include "harmed.h"
#include "pipeline_scratch.h"

namespace attncore {

/// A chunk of keys on its way.
template <class Isa, class Item>
struct PipelineStage {
  using Tile = KeyTile<Isa, float, Item>;

  Range keys;  // none: the stage is empty
  StepSet steps = 0;
  Tile tile;
  Index first = 0;                      // of its keys in their tile
  bool poison = false, harmed = false;  // in the tile's values; among its keys or the queries (harmed.h)
  bool rescales = false;
  bool plain = false;  // nothing but the scale changes its scores, and nothing its weights
  Matrix<float> scores;
  float* keep;
  TileFactors<Isa, float> factors;

  void begin(const Tile& its, Index first_key, Range its_keys, StepSet its_steps) noexcept {
    keys = its_keys;
    steps = its_steps;
    tile = its;
    first = first_key;
    poison = its.is_poisoned();
    harmed = rescales = false;
  }
};

template <class Isa, class Item>
class PipelineSoftmax {
 public:
  using Stage = PipelineStage<Isa, Item>;

  /// `harmed`: of queries in parts, which are loaded before the first chunk.
  PipelineSoftmax(const Call& call, const Task& task, const TaskRows& row_at,
                  const OnlineSoftmax<Isa, float>& softmax, const std::uint32_t* harmed) noexcept
      : call_(call),
        task_(task),
        row_at_(row_at),
        rows_(task.rows.size()),
        keys_(key_source(call, call.key, task.sequence, task.kv_head)),
        softmax_(softmax),
        harmed_(harmed),
        scale_(static_cast<float>(call.scale)),
        folds_(folds_into_exponent(scale_)),
        pace_(task.ahead.pace(rows_ * ceil_div(task.keys.size(), kChunkKeys))) {}

  /// Sums of weights are kept here from now on.
  void load() noexcept { sums_.load(softmax_, rows_); }
  void store() const noexcept { sums_.store(softmax_, rows_); }

  /// Before any of its rows.
  void look_at(Stage& stage) noexcept {
    if constexpr (kSplit<Item>) {
      stage.harmed = any_key(stage.tile.poisoned_keys, stage.tile.kWords);
      for (Index row = 0; row < rows_; ++row) stage.harmed |= harmed_[row] != 0;
    }
    stage.factors.look_up(call_, task_, stage.keys);
    stage.plain = stage.steps == 0 && stage.keys.size() == kChunkKeys && !stage.poison && !stage.harmed &&
                  !call_.dropout.given() && stage.factors.keys == nullptr && stage.factors.values == nullptr;
  }

  /// S → P of some rows.
  ATTN_INLINE void weigh(Stage& stage, Range rows) noexcept {
    if (pace_ > 0) fetch_ahead(rows.size());
    if (!stage.plain) {
      weigh_rows(stage, rows);
    } else if (!kSplit<Item> && folds_) {
      weigh_plain_rows<!kSplit<Item>>(stage, rows);
    } else {
      weigh_plain_rows<false>(stage, rows);
    }
  }

 private:
  using V = Vec<Isa, float>;

  template <bool kFolds>
  ATTN_INLINE void weigh_plain_rows(Stage& stage, Range rows) noexcept {
    for (Index row = rows.begin; row < rows.end; ++row) {
      add_sums(stage, row,
               weigh_plain<Isa, TileWeights<Isa, Item>, kChunkKeys, kFolds>(
                   softmax_, row, stage.scores.row(row), scale_, stage.keep));
    }
  }

  ATTN_INLINE void add_sums(Stage& stage, Index row, const WeightSums<V>& sums) noexcept {
    const float keep = stage.keep[row];
    if constexpr (!kSumsApart<Item>) stage.rescales |= keep != 1;
    sums_.add(row, keep, sums);
  }

  // What follows stays out of the plain rows' way, whose registers it would spill.
  [[gnu::noinline]] void fetch_ahead(Index rows) noexcept {
    for (Index i = 0; i < pace_ * rows; ++i) task_.ahead.fetch(fetched_++);
  }

  /// The scale, softcap, biases and masks where they have work, then the online softmax.
  [[gnu::noinline]] void weigh_rows(Stage& stage, Range rows) noexcept {
    for (Index row = rows.begin; row < rows.end; ++row) weigh_row(stage, row);
  }
  void weigh_row(Stage& stage, Index row) noexcept {
    const Range keys = stage.keys;
    float* const scores = stage.scores.row(row);
    fetch_next_row(call_, row_at_, row, rows_, stage.steps, keys);
    for (Index i = 0; i < keys.size(); i += kWidth<Isa, float>)
      attncore::store(scores + i, attncore::load<V>(scores + i) * scale_);
    if constexpr (kSplit<Item>) {
      const HarmedKeys harmed{keys_, keys, stage.tile.poisoned_keys, stage.first};
      if (stage.harmed) score_harmed<Isa>(call_, row_at_(row), harmed_[row] != 0, harmed, scores);
    }
    const float* const factors = stage.factors.apply(call_, row_at_, row, stage.steps, keys,
                                                     task_.sequence.keys, {0, keys.size()}, scores, coins_);
    const bool mark = stage.poison || stage.factors.values != nullptr;
    using Kept = TileWeights<Isa, Item>;
    add_sums(
        stage, row,
        softmax_.template weigh<Kept>(row, scores, keys.size(), mark, stage.keep, factors, {0, keys.size()}));
  }

  const Call& call_;
  const Task& task_;
  const TaskRows& row_at_;
  const Index rows_;
  const KeySource keys_;
  const OnlineSoftmax<Isa, float> softmax_;
  const std::uint32_t* const harmed_;
  const float scale_;
  const bool folds_;   // into the exponent
  const Index pace_;   // rows of task.ahead to fetch with each row
  Index fetched_ = 0;  // of them
  LaneSums<Isa, Item> sums_;
  TileCoins<Isa, float> coins_;
};

}  // namespace attncore
