// Forward attention of bfloat16 on a matrix unit, beside which the vector unit is at work: a core does not overlap blocks of tile
// products with blocks of vector instructions by itself (1121 cycles instead of 695 with some instructions after each product,
// Sapphire Rapids).  So chunks of keys pass three stages, of three chunks at once:
//
//     step                        t            t + 1          t + 2
//     O += P · V   (tiles)    chunk t − 2    chunk t − 1     chunk t
//     S = Q · Kᵀ   (tiles)    chunk t        chunk t + 1     chunk t + 2
//     S → P        (vectors)  chunk t − 1    chunk t         chunk t + 1       a row, or some, after each product
//
// The scores of chunk t go where the weights of chunk t − 2 were: two buffers of 32 rows × 64 keys, 20 KB, which stay in the first
// cache beside O and Q (tiles stored into the second take twice as long).  O is summed in place, and rescaled before a chunk's
// values are added if a row's maximum has moved.
#pragma once

#include "../tile/tile_stream.h"
#include "pipeline_scratch.h"

namespace attncore {

template <class Isa>
class ForwardPipeline {
 public:
  ForwardPipeline(const Call& call, const Task& task, std::byte* memory) noexcept
      : call_(call),
        task_(task),
        row_at_{call, task},
        rows_(task.rows.size()),
        scratch_(PipelineScratch<Isa>::in(memory, call, rows_)),
        state_(RowState<Isa, float>::in(task.state, call, rows_)),
        scale_(static_cast<float>(call.scale)),
        folds_(is_power_of_two(scale_)),
        pace_(task.ahead.pace(rows_ * ceil_div(task.keys.size(), PipelineScratch<Isa>::chunk(call)))) {
    if (!task.loaded) load_pair_rows<Isa>(call.query, call.dim, row_at_, scratch_.queries, rows_);
    for (int i = 0; i < 2; ++i) {
      stages_[i].scores = scratch_.scores[i];
      stages_[i].keep = scratch_.keep[i];
    }
  }

  void run() noexcept {
    if (task_.first) state_.clear(rows_);
    load_sums();
    const Index key_tile = Isa::template kKeyTile<float>;
    const Range seen = intersect(task_.keys, ScoreSteps::visible(call_, row_at_.block()));
    for (Index first = seen.begin - seen.begin % key_tile; first < seen.end; first += key_tile) {
      if (first % kFoldKeys == 0 && first > 0) fold();
      run_tile({first, min(first + key_tile, seen.end)});
    }
    drain();
    store_sums();
    if (task_.last) finish_rows<Isa, float>(call_, row_at_, state_.whole(rows_), rows_);
  }

 private:
  using V = Vec<Isa, float>;
  using Tile = KeyTile<Isa, float, Bf16Pair>;

  /// A chunk of keys on its way.
  struct Stage {
    Range keys;  // none: the stage is empty
    StepSet steps = 0;
    Panel<const Bf16Pair> panel_keys, panel_values;
    Index first = 0;  // of its keys in their tile
    bool poison = false, rescales = false;
    bool plain = false;  // nothing but the scale changes its scores, and nothing its weights
    Matrix<float> scores;
    float* keep;
    TileFactors<Isa, float> factors;
  };

  /// The vector unit's work of a step, spread over the unit's products: between two of them, the rows that are due.
  struct Beside {
    ForwardPipeline& pipeline;
    Stage* stage;  // null: nothing to do
    Index rows, products, row = 0, credit = 0;

    void operator()() noexcept {
      if (stage == nullptr) return;
      Index end = row;
      for (credit += rows; credit >= products && end < rows; credit -= products) ++end;
      if (end == row) return;
      pipeline.weigh(*stage, {row, end});
      row = end;
    }
    void finish() noexcept {
      if (stage != nullptr) pipeline.weigh(*stage, {row, rows});
    }
  };

  [[nodiscard]] Beside beside(Stage& stage, Index products) noexcept {
    return {*this, stage.keys.empty() ? nullptr : &stage, rows_, products};
  }

  void run_tile(Range keys) noexcept {
    const TileWork work = touch_tile<Isa, float>(call_, row_at_.block(), keys);
    if (work.hidden) return;
    if (task_.packed == nullptr) drain();  // the panel is packed anew
    const Tile tile =
        key_tile_of<Isa, float, Bf16Pair>(call_, task_, keys, Tile::bytes(call_), scratch_.panel);
    const Index chunk = PipelineScratch<Isa>::chunk(call_);
    for (Index first = 0; first < keys.size(); first += chunk) {
      run_chunk(tile, first, {keys.begin + first, min(keys.begin + first + chunk, keys.end)}, work.steps);
    }
  }

  /// A step.
  void run_chunk(const Tile& tile, Index first, Range keys, StepSet steps) noexcept {
    Stage &stage = stages_[turn_], &before = stages_[1 - turn_];
    Beside rows = beside(before, value_products(stage) + score_products(keys));
    add_values(stage, rows);
    stage.keys = keys;
    stage.steps = steps;
    stage.panel_keys = as_const(tile.keys);
    stage.panel_values = as_const(tile.values);
    stage.first = first;
    stage.poison = tile.is_poisoned();
    stage.rescales = false;
    stage.factors.look_up(call_, task_, keys);
    stage.plain = steps == 0 && keys.size() == kPlainKeys && !stage.poison && !call_.dropout.given() &&
                  stage.factors.keys == nullptr && stage.factors.values == nullptr;
    fetch_first_rows(call_, row_at_, rows_, steps, keys);
    score(stage, rows);
    rows.finish();
    turn_ = 1 - turn_;
  }

  /// The last two steps, without new keys.
  void drain() noexcept {
    stream_.flush();
    for (int step = 0; step < 2; ++step) {
      Stage &stage = stages_[turn_], &before = stages_[1 - turn_];
      Beside rows = beside(before, value_products(stage));
      add_values(stage, rows);
      rows.finish();
      stage.keys = {};
      turn_ = 1 - turn_;
    }
    stream_.flush();
  }

  static bool is_power_of_two(float x) noexcept {
    constexpr std::uint32_t kFraction = 0x7fffff;
    return x > 0x1p-32F && x < 0x1p32F && (bit_cast<std::uint32_t>(x) & kFraction) == 0;
  }

  [[nodiscard]] Index row_tiles() const noexcept { return ceil_div(rows_, kTileRows); }
  [[nodiscard]] Index score_products(Range keys) const noexcept {
    return row_tiles() * ceil_div(keys.size(), kTileColumns) * ceil_div(call_.dim, kRunItems);
  }
  [[nodiscard]] Index value_products(const Stage& stage) const noexcept {
    return row_tiles() * ceil_div(call_.value_dim, kTileColumns) * ceil_div(stage.keys.size(), kRunItems);
  }

  /// C = A · B, or C += A · B, of some of the panel's columns, and its depth from `first` on.
  void multiply(Matrix<float> c, Matrix<float> a, Panel<const Bf16Pair> b, Range columns, Index first,
                Index steps, bool adds, Beside& rows) noexcept {
    for (Index column = columns.begin; column < columns.end; column += 2 * kTileColumns) {
      const Index strip = column - column % (Isa::kColumns * kTileColumns);
      const Index stride = strip_registers<Isa, float>(b.columns, strip) * kTileColumns;
      const PairTile items{b.data + strip * b.depth + (column - strip) + first * stride, stride};
      const SumTiles sums{c.data + (column - columns.begin), c.stride, rows_ > kTileRows,
                          columns.end - column > kTileColumns};
      stream_.multiply({reinterpret_cast<const Bf16Pair*>(a.data), a.stride}, items, steps, sums, adds, rows);
    }
  }

  /// S = Q · Kᵀ, unscaled.
  void score(Stage& stage, Beside& rows) noexcept {
    const Range columns{stage.first, stage.first + stage.keys.size()};
    multiply(stage.scores, scratch_.queries, stage.panel_keys, columns, 0, ceil_div(call_.dim, kRunItems),
             false, rows);
  }

  /// S → P of some rows.
  void weigh(Stage& stage, Range rows) noexcept {
    for (Index i = 0; i < pace_ * rows.size(); ++i) task_.ahead.fetch(fetched_++);
    if (!stage.plain) {
      for (Index row = rows.begin; row < rows.end; ++row) weigh(stage, row);
    } else if (folds_) {
      weigh_plain_rows<true>(stage, rows);
    } else {
      weigh_plain_rows<false>(stage, rows);
    }
  }

  template <bool kFolds>
  void weigh_plain_rows(Stage& stage, Range rows) noexcept {
    for (Index row = rows.begin; row < rows.end; ++row) {
      const auto sums =
          weigh_plain<Isa, kFolds>(state_.recent, row, stage.scores.row(row), scale_, stage.keep);
      add_sums(stage, row, sums);
    }
  }

  ATTN_INLINE void add_sums(Stage& stage, Index row, const WeightSums<V>& sums) noexcept {
    const float keep = stage.keep[row];
    stage.rescales |= keep != 1;
    sums_[row].seen = sums_[row].seen * keep + sums.seen;
    sums_[row].exact = sums_[row].exact * keep + sums.exact;
  }

  /// A row's S → P: the scale, softcap, biases and masks where they have work, then the online softmax.
  void weigh(Stage& stage, Index row) noexcept {
    const Range keys = stage.keys;
    float* const scores = stage.scores.row(row);
    fetch_next_row(call_, row_at_, row, rows_, stage.steps, keys);
    for (Index i = 0; i < keys.size(); i += kWidth<Isa, float>)
      store(scores + i, load<V>(scores + i) * scale_);
    const float* const factors =
        stage.factors.apply(call_, row_at_, row, stage.steps, keys, task_.sequence.keys, scores, coins_);
    const bool mark = stage.poison || stage.factors.values != nullptr;
    add_sums(
        stage, row,
        state_.recent.template weigh<TileWeights<Isa>>(row, scores, keys.size(), mark, stage.keep, factors));
  }

  /// O = keep · O + P · V
  void add_values(Stage& stage, Beside& rows) noexcept {
    if (stage.keys.empty()) return;
    const Matrix<float> output = state_.recent.output;
    if (stage.rescales) rescale(output, stage.keep);
    const Index first = stage.first / 2, steps = ceil_div(stage.keys.size(), kRunItems);
    if (!stage.poison)
      return multiply(output, stage.scores, stage.panel_values, {0, call_.value_dim}, first, steps, true,
                      rows);
    stream_.flush();
    const Panel<const Bf16Pair> values = stage.panel_values;
    const Matrix<const Bf16Pair> weights{reinterpret_cast<const Bf16Pair*>(stage.scores.data),
                                         stage.scores.stride};
    gemm_of_visible<Isa, float>(output, weights, values, rows_, steps * kTileDepth, Continued{}, first);
  }

  void rescale(Matrix<float> output, const float* keep) noexcept {
    stream_.flush();
    for (Index row = 0; row < rows_; ++row) {
      if (keep[row] == 1) continue;
      for (Index i = 0; i < call_.value_dim; i += kWidth<Isa, float>)
        store(output.row(row) + i, load<V>(output.row(row) + i) * keep[row]);
    }
  }

  // ---- sums of weights: lane by lane as long as tiles of keys go on ----

  void load_sums() noexcept {
    for (Index row = 0; row < rows_; ++row) {
      V seen{}, exact{};
      seen[0] = state_.recent.sum[row];
      exact[0] = state_.recent.exact_sum[row];
      sums_[row] = {seen, exact};
    }
  }
  void store_sums() noexcept {
    for (Index row = 0; row < rows_; ++row) {
      state_.recent.sum[row] = horizontal_sum<Isa, float>(sums_[row].seen);
      state_.recent.exact_sum[row] = horizontal_sum<Isa, float>(sums_[row].exact);
    }
  }
  void fold() noexcept {
    if (!state_.folds) return;
    drain();
    store_sums();
    state_.fold(rows_);
    load_sums();
  }

  const Call& call_;
  const Task& task_;
  const TaskRows row_at_;
  const Index rows_;
  const PipelineScratch<Isa> scratch_;
  const RowState<Isa, float> state_;
  const float scale_;
  const bool folds_;   // a power of two, positive and far from under- and overflow
  const Index pace_;   // rows of task.ahead to fetch with each row
  Index fetched_ = 0;  // of them
  TileStream<Isa> stream_;
  Stage stages_[2];
  int turn_ = 0;  // the stage of the chunk before the last one
  WeightSums<V> sums_[2 * kTileRows];
  TileCoins<Isa, float> coins_;
};

}  // namespace attncore
