// What the backward passes share: the gradient of the scores of one tile, recomputed from (query, key, lse).
//
// For a row with scores s, weights P = exp(s − lse) and coins Z (dropout's factors, or 1):
//
//     out = Σ P Z v        dP = Z (d_out · v)        dS = P (dP − delta),  delta = d_out · out − d_lse
//
// (Dao et al. 2022, appendix B.4).  lse in its dtype may lack the digits that P needs: rows where it is large carry
// their own maximum and sum instead (backward_rows.h), as `origin` and `factor`: P = factor · exp(s − origin).
//
// Items are T, or bfloat16 two by two along the depth of each product: then P · Z and dS are rounded to it for theirs.
#pragma once

#include "backward_scratch.h"

namespace attncore {

/// One tile at a time: the keys and rows that are loaded.
template <class Isa, class T, class Item>
class BackwardTile {
 public:
  BackwardTile(const BackwardCall& backward, const Sequence& sequence, Index kv_head, std::byte* scratch,
               std::byte* stats) noexcept
      : call_(backward.call),
        d_out_(backward.gradients.d_out),
        task_{.sequence = sequence, .kv_head = kv_head},
        scratch_(BackwardScratch<Isa, T, Item>::in(scratch, backward.call)),
        stats_(RowStats<T>::in(stats, backward.call, sequence, kv_head)),
        in_place_(is_read_in_place(backward.call, sequence)) {}

  /// Which keys of the tile `keys` the rows see, if any, and what the steps do there.
  struct Seen {
    Range keys;
    StepSet steps = 0;
    Band band = {};
  };
  [[nodiscard]] Seen look(Range rows, Range keys) const noexcept {
    if (rows.empty()) return {{keys.begin, keys.begin}};
    const Block block = block_of(call_, task_.sequence, task_.kv_head, rows);
    const Range seen = intersect(keys, ScoreSteps::visible(call_, block));
    if (seen.empty()) return {{keys.begin, keys.begin}};
    const Range padded{keys.begin, keys.begin + round_up(seen.end - keys.begin, kWidth<Isa, T>)};
    const TileWork work = ScoreSteps::touch(call_, block, padded);
    if (work.hidden) return {{keys.begin, keys.begin}};
    const Range tile{keys.begin, seen.end};
    return {tile, work.steps, band_of(call_, block, rows, tile)};
  }

  void load_keys(Range keys) noexcept { load_tokens(scratch_.keys_transposed, call_.key, keys, call_.dim); }
  void load_values(Range keys) noexcept {
    load_tokens(scratch_.values_transposed, call_.value, keys, call_.value_dim);
  }

  /// Query and d_out of the rows.
  void load_rows(Range rows) noexcept {
    task_.rows = rows;
    const TaskRows row_at{call_, task_};
    queries_ = load_items_of(call_.query, call_.dim, row_at, scratch_.queries, rows.size());
    d_outs_ = load_items_of(d_out_, call_.value_dim, row_at, scratch_.d_out, rows.size());
  }

  /// Scores of the loaded rows and keys, with the steps applied; visit(row, its Row, scores, the columns that have some, whether
  /// `slopes` has slopes).
  template <class Visit>
  void score(const Seen& seen, Visit visit) const noexcept {
    const Range keys = seen.keys;
    const TaskRows row_at{call_, task_};
    const Index rows = task_.rows.size();
    fetch_first_rows(call_, row_at, rows, seen.steps, keys);
    multiply(scratch_.weights, queries_, call_.key, scratch_.keys_transposed, call_.dim, seen,
             Scaled<T>{static_cast<T>(call_.scale)});
    for (Index row = 0; row < rows; ++row) {
      T* const scores = scratch_.weights.row(row);
      fetch_next_row(call_, row_at, row, rows, seen.steps, keys);
      bool sloped = false;
      const Row r = row_at(row);
      const Range columns = seen_of<Isa, T>(seen.band, keys, row);
      if (seen.steps != 0) {
        const auto slope = [&](auto slope_at) {
          sloped = true;
          for (Index i = columns.begin; i < columns.end; i += kWidth<Isa, T>) {
            store(scratch_.slopes + i, slope_at(load<V>(scores + i)));
          }
        };
        apply_steps<Isa, T>(call_, r, seen.steps, keys, task_.sequence.keys, columns, scores, slope);
      }
      visit(row, r, scores, columns, sloped);
    }
  }

  /// The tile's weights · coins and the gradient of its scores; visit(Row, d_scores) sees the latter before the steps'
  /// slopes.  Hidden pairs are −0 in both.
  template <class Visit>
  void differentiate(const Seen& seen, Visit visit) const noexcept {
    multiply(scratch_.d_scores, d_outs_, call_.value, scratch_.values_transposed, call_.value_dim, seen,
             Stored<T>{});
    TileCoins<Isa, T> coins;
    score(seen, [&](Index row, const Row& r, T* scores, Range columns, bool sloped) {
      T* const d_scores = scratch_.d_scores.row(row);
      const T* const factors = call_.dropout.given() ? coins.of(call_.dropout, r, seen.keys) : nullptr;
      hide(scores, d_scores, {0, columns.begin});
      weigh(row, scores, d_scores, columns, factors);
      hide(scores, d_scores, {columns.end, seen.keys.size()});
      visit(r, d_scores);
      if (sloped) multiply_by_slopes(d_scores, columns);
    });
  }

  /// Where items are pairs, rounds the tile's weights and d_scores to pairs, over themselves.
  void make_operands(const Seen& seen) const noexcept {
    if constexpr (kInPairs<T, Item>) {
      for (Index row = 0; row < task_.rows.size(); row += 2) pair_rows(row, seen.keys.size());
    }
  }

  [[nodiscard]] const BackwardScratch<Isa, T, Item>& scratch() const noexcept { return scratch_; }
  [[nodiscard]] Matrix<const Item> queries() const noexcept { return queries_; }
  [[nodiscard]] Matrix<const Item> d_out() const noexcept { return d_outs_; }
  [[nodiscard]] Range rows() const noexcept { return task_.rows; }
  [[nodiscard]] bool in_place() const noexcept { return in_place_; }

 private:
  using V = Vec<Isa, T>;

  /// Whether keys and values lie where forward reads them, for too few rows to pack them: scores have its bits then, whose
  /// roundings lse has.  (Pairs are rounded more than by the order of sums.)
  static bool is_read_in_place(const Call& call, const Sequence& sequence) noexcept {
    if constexpr (kInPairs<T, Item>) return false;
    return backward_rows(call, Isa::kRows) >= kMostDirectRows<Isa, Item> &&
           reads_in_place<Isa, T, Item>(call, sequence);
  }

  void load_tokens(Panel<Item>& panel, const Tensor& t, Range keys, Index dims) noexcept {
    if (in_place_) return;
    panel.columns = keys.size();
    pack_items_transposed<Isa, T>(panel, key_source(call_, t, task_.sequence, task_.kv_head), keys.begin,
                                  dims);
  }

  /// C = finish(the loaded rows · tokensᵀ), of tokens that lie in `t`, or transposed in `panel`.
  template <class Finish>
  void multiply(Matrix<T> c, Matrix<const Item> rows, const Tensor& t, Panel<Item> panel, Index dims,
                const Seen& seen, Finish finish) const noexcept {
    const Index count = task_.rows.size(), columns = seen.keys.size();
    if (!in_place_) {
      return gemm<Isa, T>(c, rows, as_const(panel), count, columns, depth_of<T, Item>(dims), finish,
                          SeenScores{seen.band});
    }
    if constexpr (!kInPairs<T, Item>) {
      const KeySource source = key_source(call_, t, task_.sequence, task_.kv_head);
      const Tokens<Isa, T> tokens(source, seen.keys, task_.sequence.keys, dims,
                                  reinterpret_cast<std::byte*>(panel.data));
      RowList<const Item> list;
      for (Index row = 0; row < count; ++row) list.add(rows.row(row));
      const FewRows<Isa, T, Item> few{groups_rows<Isa, T>(call_, task_.sequence)};
      few.pack(scratch_.few_rows, list, dims);
      few.dot(c.data, list, tokens, source.storage, columns, dims, scratch_.few_rows, finish);
    }
  }

  static ATTN_INLINE Matrix<const Item> load_items_of(const Tensor& t, Index dims, const TaskRows& row_at,
                                                      Matrix<Item> room, Index rows) noexcept {
    return rows_of<Isa, T, Item>(t, dims, row_at, {reinterpret_cast<T*>(room.data), room.stride}, rows, true);
  }

  /// Rows `row` and `row` + 1, rounded: by rows over the first of them.
  ATTN_INLINE void pair_rows(Index row, Index count) const noexcept {
    constexpr Index n = kWidth<Isa, T>;
    const bool alone = row + 1 == task_.rows.size();
    T* const weights = scratch_.weights.row(row);
    T* const d_scores = scratch_.d_scores.row(row);
    const Index next = alone ? 0 : scratch_.weights.stride;
    if (count % 2 != 0) d_scores[count] = d_scores[next + count] = -T{0};  // a half without a key
    const auto narrow = [](const T* from) {
      return MultiplyPairs<Isa>::narrow(load<V>(from), load<V>(from + n));
    };
    for (Index i = 0; i < count; i += 2 * n) {
      const U32<Isa> none{}, even = narrow(d_scores + i), odd = narrow(d_scores + next + i);
      store_paired<Isa>(weights + i, narrow(weights + i), alone ? none : narrow(weights + next + i));
      store_paired<Isa>(d_scores + i, even, alone ? none : odd);
      store(scratch_.d_scores_by_keys.row(row) + i / 2, even);
      if (!alone) store(scratch_.d_scores_by_keys.row(row + 1) + i / 2, odd);
    }
  }

  static ATTN_INLINE void hide(T* weights, T* d_scores, Range columns) noexcept {
    for (Index i = columns.begin; i < columns.end; i += kWidth<Isa, T>) {
      store(weights + i, -V{});
      store(d_scores + i, -V{});
    }
  }

  /// Scores → P · Z and d_out · v → dS, in place.
  ATTN_INLINE void weigh(Index row, T* scores, T* d_scores, Range columns, const T* coins) const noexcept {
    const Index at = task_.rows.begin + row;
    const T origin = stats_.origin[at], factor = stats_.factor[at], delta = stats_.delta[at];
    const V hidden_mark = -V{};
    for (Index i = columns.begin; i < columns.end; i += kWidth<Isa, T>) {
      const V score = load<V>(scores + i);
      V weight = attncore::exp<Isa, T>(score - origin) * factor;
      V d_weight = load<V>(d_scores + i);
      V kept = weight;
      if (coins != nullptr) {
        const V coin = load<V>(coins + i);
        kept = weight * coin;
        d_weight = d_weight * coin;
      }
      const auto hidden = score == -static_cast<T>(__builtin_inf());
      store(scores + i, hidden ? hidden_mark : kept);
      store(d_scores + i, hidden ? hidden_mark : weight * (d_weight - delta) + T{0});
    }
  }

  ATTN_INLINE void multiply_by_slopes(T* d_scores, Range columns) const noexcept {
    for (Index i = columns.begin; i < columns.end; i += kWidth<Isa, T>) {
      const V d = load<V>(d_scores + i);  // −0 stays, whatever the slope: a hidden key may be NaN
      store(d_scores + i, d == 0 ? d : d * load<V>(scratch_.slopes + i) + T{0});
    }
  }

  const Call& call_;
  const Tensor& d_out_;
  Task task_;  // its rows: those that are loaded
  BackwardScratch<Isa, T, Item> scratch_;
  RowStats<T> stats_;
  bool in_place_;
  Matrix<const Item> queries_{}, d_outs_{};
};

}  // namespace attncore
