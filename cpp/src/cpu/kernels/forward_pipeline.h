// Forward attention on a matrix unit, of pairs of bfloat16 or of parts, beside which the vector unit is at work: a core does not
// overlap blocks of tile products with blocks of vector instructions by itself (1121 cycles instead of 695 with some instructions
// after each product, Sapphire Rapids).  So chunks of keys pass three stages, of three chunks at once:
//
//     step                        t            t + 1          t + 2
//     O += P · V   (tiles)    chunk t − 2    chunk t − 1     chunk t
//     S = Q · Kᵀ   (tiles)    chunk t        chunk t + 1     chunk t + 2
//     S → P        (vectors)  chunk t − 1    chunk t         chunk t + 1       a row after each product, or each few
//
// The scores of chunk t go where the weights of chunk t − 2 were: two buffers, which stay in the first cache beside O (kChunkKeys;
// tiles stored into the second take twice as long).  O is summed in place, and rescaled before a chunk's values are added if a row's
// maximum has moved; where P · V is summed apart (sums_apart.h), both are one multiply-add.
//
// By counting, with dims of 64: a row's products of 16 cycles, and its instructions between them, of which multiply-adds and
// comparisons of registers start once a cycle there, sums and integers twice, and four to six instructions of any kind:
//
//                  products         instructions   once a cycle     bound
//     pairs       1      16 cycles     109 + 60         45         the vector unit
//     2 parts     3.5    56 cycles     127 + 80         42         both, at 4 instructions a cycle
//     3 parts     6      96 cycles     117 + 130        45         the products
//
// + is the calls, the loads of tiles and, of 3 parts, O.
#pragma once

#include "pipeline_softmax.h"

namespace attncore {

template <class Isa, class Item>
class ForwardPipeline {
 public:
  ForwardPipeline(const Call& call, const Task& task, std::byte* memory) noexcept
      : call_(call),
        task_(task),
        row_at_{call, task},
        rows_(task.rows.size()),
        values_(key_source(call, call.value, task.sequence, task.kv_head)),
        scratch_(PipelineScratch<Isa, Item>::in(memory, call, rows_)),
        state_(RowState<Isa, float>::in(task.state, call, rows_)),
        apart_(state_.recent.output, scratch_.sums, rows_),
        softmax_(call, task, row_at_, state_.recent, scratch_.harmed) {
    if (!task.loaded) {
      if constexpr (kSplit<Item>) {
        load_part_rows<Isa, kParts<Item>>(call.query, call.dim, row_at_, scratch_.queries, rows_,
                                          scratch_.harmed);
      } else {
        load_pair_rows<Isa>(call.query, call.dim, row_at_, scratch_.queries, rows_);
      }
    }
    for (int i = 0; i < 2; ++i) {
      stages_[i].scores = scratch_.scores[i];
      stages_[i].keep = scratch_.keep[i];
    }
  }

  void run() noexcept {
    if (task_.first) state_.clear(rows_);
    softmax_.load();
    const Index key_tile = Isa::template kKeyTile<float>;
    const Range seen = intersect(task_.keys, ScoreSteps::visible(call_, row_at_.block()));
    for (Index first = seen.begin - seen.begin % key_tile; first < seen.end; first += key_tile) {
      if (first % kFoldKeys == 0 && first > 0) fold();
      run_tile({first, min(first + key_tile, seen.end)});
    }
    drain();
    softmax_.store();
    if (task_.last) finish_rows<Isa, float>(call_, row_at_, state_.whole(rows_), rows_);
  }

 private:
  using V = Vec<Isa, float>;
  using Tile = KeyTile<Isa, float, Item>;
  using Stage = PipelineStage<Isa, Item>;
  using Weight = WeightOf<Item>;
  static constexpr bool kApart = kSumsApart<Item>;

  /// The vector unit's work of a step, spread over the unit's products: between two of them, the rows that are due.
  struct Spread {
    ForwardPipeline& pipeline;
    Stage& stage;
    Index rows, products, row = 0, credit = 0;

    ATTN_INLINE void operator()() noexcept {
      credit += rows;
      if (credit >= products) pipeline.work(*this);
    }
    void finish() noexcept {
      credit = (rows - row) * products;
      if (row < rows) pipeline.work(*this);
    }
  };

  [[nodiscard]] Spread spread(Stage& stage, Index products) noexcept {
    return {*this, stage, stage.keys.empty() ? 0 : rows_, max(Index{1}, products)};
  }

  void work(Spread& spread) noexcept {
    Range due{spread.row, spread.row};
    for (; spread.credit >= spread.products; spread.credit -= spread.products) ++due.end;
    spread.row = due.end;
    softmax_.weigh(spread.stage, due);
    if constexpr (kApart) apart_.add_some();
  }

  void run_tile(Range keys) noexcept {
    const TileWork work = touch_tile<Isa, float>(call_, row_at_.block(), keys);
    if (work.hidden) return;
    if (task_.packed == nullptr) drain();  // the panel is packed anew
    const Tile tile = key_tile_of<Isa, float, Item>(call_, task_, keys, Tile::bytes(call_), scratch_.panel);
    for (Index first = 0; first < keys.size(); first += kChunkKeys) {
      const Index begin = keys.begin + first;
      run_chunk(tile, first, {begin, min(begin + kChunkKeys, keys.end)}, work.steps);
    }
  }

  /// A step.
  void run_chunk(const Tile& tile, Index first, Range keys, StepSet steps) noexcept {
    Stage &stage = stages_[turn_], &before = stages_[1 - turn_];
    Spread rows = spread(before, value_products(stage) + score_products(keys));
    add_values(stage, rows);
    stage.begin(tile, first, keys, steps);
    softmax_.look_at(stage);
    fetch_first_rows(call_, row_at_, rows_, steps, keys);
    score(stage, rows);
    rows.finish();
    turn_ = 1 - turn_;
  }

  /// The last two steps, without new keys.
  void drain() noexcept {
    flush();
    for (int step = 0; step < 2; ++step) {
      Stage &stage = stages_[turn_], &before = stages_[1 - turn_];
      Spread rows = spread(before, value_products(stage));
      add_values(stage, rows);
      rows.finish();
      stage.keys = {};
      turn_ = 1 - turn_;
    }
    flush();
  }

  /// What the unit holds is where it belongs.
  void flush() noexcept {
    apart_.advance();
    stream_.flush();
    apart_.finish();
  }

  [[nodiscard]] Index row_tiles() const noexcept { return ceil_div(rows_, kTileRows); }
  [[nodiscard]] Index score_products(Range keys) const noexcept {
    return kProducts<Item> * row_tiles() * ceil_div(keys.size(), kTileColumns) *
           ceil_div(call_.dim, kRunItems);
  }
  [[nodiscard]] Index value_products(const Stage& stage) const noexcept {
    return kProducts<Weight> * row_tiles() * ceil_div(call_.value_dim, kTileColumns) *
           ceil_div(stage.keys.size(), kRunItems);
  }

  /// B's columns, and its depth from `first` on.
  struct Right {
    Panel<Item> panel;
    Range columns;
    Index first, steps;
  };

  /// C = A · B, or, with `keep`, what add_values says.  A: its items.
  template <class A>
  void multiply(Matrix<float> c, Matrix<float> a, const Right& b, const float* keep, Spread& rows) noexcept {
    const PairTile left{reinterpret_cast<const Bf16Pair*>(a.data), a.stride};
    const bool adds = !kApart && keep != nullptr;
    for (Index column = b.columns.begin; column < b.columns.end; column += 2 * kTileColumns) {
      const Index strip = column - column % (Isa::kColumns * kTileColumns);
      const Index stride = strip_registers<Isa, float>(b.panel.columns, strip) * kTileColumns;
      const Bf16Pair* const items = pairs_of(b.panel.data) + strip * b.panel.depth + (column - strip);
      const bool wide = b.columns.end - column > kTileColumns;
      Matrix<float> sums{c.data + (column - b.columns.begin), c.stride};
      if constexpr (kApart) {
        apart_.advance();
        if (keep != nullptr) sums = apart_.hold(column, wide ? 2 : 1, keep);
      }
      stream_.template multiply<A>(left, {items + b.first * stride, stride}, b.steps,
                                   {sums.data, sums.stride, rows_ > kTileRows, wide}, adds, rows);
    }
  }

  /// S = Q · Kᵀ, unscaled.
  void score(Stage& stage, Spread& rows) noexcept {
    const Range columns{stage.first, stage.first + stage.keys.size()};
    const Right keys{stage.tile.keys, columns, 0, ceil_div(call_.dim, kRunItems)};
    multiply<Item>(stage.scores, scratch_.queries, keys, nullptr, rows);
  }

  /// O = keep · O + P · V
  void add_values(Stage& stage, Spread& rows) noexcept {
    if (stage.keys.empty()) return;
    const Matrix<float> output = state_.recent.output;
    if (!kApart && stage.rescales) rescale(output, stage.keep);
    const Index first = depth_of<float, Item>(stage.first), steps = ceil_div(stage.keys.size(), kRunItems);
    const Right values{stage.tile.values, {0, call_.value_dim}, first, steps};
    if (!stage.poison) return multiply<Weight>(output, stage.scores, values, stage.keep, rows);
    flush();
    const Matrix<const Weight> weights{reinterpret_cast<const Weight*>(stage.scores.data),
                                       stage.scores.stride};
    if constexpr (kSplit<Item>) {
      const HarmedKeys harmed{values_, stage.keys, stage.tile.poison, stage.first};
      add_harmed<Isa, Weight, kParts<Item>, !kApart>(output, weights, as_const(stage.tile.values), harmed,
                                                     stage.keep, rows_);
    } else {
      gemm_of_visible<Isa, float>(output, weights, as_const(stage.tile.values), rows_, steps * kTileDepth,
                                  Continued{}, first);
    }
  }

  void rescale(Matrix<float> output, const float* keep) noexcept {
    flush();
    for (Index row = 0; row < rows_; ++row) {
      if (keep[row] == 1) continue;
      for (Index i = 0; i < call_.value_dim; i += kWidth<Isa, float>)
        store(output.row(row) + i, load<V>(output.row(row) + i) * keep[row]);
    }
  }

  void fold() noexcept {
    if (!state_.folds) return;
    drain();
    softmax_.store();
    state_.fold(rows_);
    softmax_.load();
  }

  const Call& call_;
  const Task& task_;
  const TaskRows row_at_;
  const Index rows_;
  const KeySource values_;
  const PipelineScratch<Isa, Item> scratch_;
  const RowState<Isa, float> state_;
  TileStream<Isa> stream_;
  SumsApart<Isa> apart_;
  PipelineSoftmax<Isa, Item> softmax_;
  Stage stages_[2];
  int turn_ = 0;  // the stage of the chunk before the last one
};

}  // namespace attncore
