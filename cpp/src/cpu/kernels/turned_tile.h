// A tile of keys that nobody packs: Sᵀ = K·Qᵀ takes them where they lie, row after row; queries are what is packed, once for all tiles of
// a task.  A register holds a key's scores of several rows (turned_softmax.h), and O += (Pᵀ)ᵀ·V reads weights by columns.  Sums have the
// order of the other way, S = Q·Kᵀ, so that bits are the same.
//
// It is for tiles that one task alone meets, as few rows do, whose scores become weights as they are, within the band that causality,
// windows and segments leave.
#pragma once

#include "../tile/turned_softmax.h"
#include "token_walk.h"

namespace attncore {

template <class Isa, class T, class Item>
class TurnedTile {
 public:
  TurnedTile(const Call& call, const Task& task, const Scratch<Isa, T, Item>& scratch, Index rows) noexcept
      : call_(call),
        task_(task),
        rows_(rows),
        depth_(depth_of<T, Item>(call.dim)),
        scores_{scratch.scores.data, scratch.padded(rows)},
        room_(reinterpret_cast<Item*>(scratch.panel)) {}

  /// Whether the keys can be taken so.  Lanes without a row are multiplied too, which beyond a third costs more than packing keys.
  [[nodiscard]] bool takes(Range keys) noexcept {
    const bool possible = task_.packed == nullptr && rows_ <= Isa::template kKeyTile<T> &&
                          !call_.dropout.given() && !call_.key_scale.given() && !call_.value_scale.given();
    const Index products = scores_.stride * keys.size();
    const Index packed_products = rows_ * round_up(keys.size(), kWidth<Isa, T>);
    if (!possible || 3 * products > 4 * packed_products) return false;
    source_ = key_source(call_, call_.key, task_.sequence, task_.kv_head);
    const bool in_runs = source_.pages == nullptr || source_.page_size >= kFewInPage;
    return in_runs && lies_in_items<T, Item>(source_, call_.dim);
  }

  /// O += P·V or so, with `end()` saying how it ends once the weights are there; `scaled` says how scores do.
  template <class Scale, class End>
  void run(Matrix<const Item> queries, const Band& band, Range keys, const OnlineSoftmax<Isa, T>& softmax,
           T* keep, Matrix<T> output, Scale scaled, End end) noexcept {
    dot(queries, band, keys, scaled);
    bool finite = true;
    const Panel<const Item> values = this->values(keys, band.whole, finite);
    weigh(softmax, band, !finite, keep);
    const Transposed<const Item> weights{reinterpret_cast<const Item*>(scores_.data), scores_.stride};
    const Index depth = depth_of<T, Item>(keys.size());
    const auto finish = end();
    if (!finite) return gemm_of_visible<Isa, T>(output, weights, values, rows_, depth, finish);
    gemm<Isa, T>(output, weights, values, rows_, call_.value_dim, depth, finish,
                 SeenWeights<kNumbers<T, Item>>{band});
  }

  /// The room was used for something else.
  void forget() noexcept { packed_ = false; }

 private:
  static constexpr Index kItem = sizeof(Item);
  static constexpr Index kFewInPage = 16;          // keys: products of fewer at a time would be slow
  static constexpr Index kAhead = 2 * Isa::kRows;  // keys further are fetched

  void pack_queries(Matrix<const Item> queries) noexcept {
    queries_ = {room_, rows_, depth_};
    pack_items_transposed<Isa, T>(queries_, source_of<T>(queries), 0, call_.dim);
    packed_ = true;
  }

  /// Sᵀ, as far as it is seen, and between what is.
  template <class Finish>
  void dot(Matrix<const Item> queries, const Band& band, Range keys, Finish finish) noexcept {
    if (!packed_) pack_queries(queries);
    TokenWalk walk(source_, keys.begin, keys.end);
    const bool near = task_.keys.size() <= Isa::template kKeyTile<T>;
    for (Index at = 0, run = 0; at < keys.size(); at += run) {
      run = min(walk.run(), keys.size() - at);
      const Index stride = walk.stride();
      const Matrix<const Item> some{reinterpret_cast<const Item*>(walk.take(run)), stride / kItem};
      const auto multiply = [&](auto a) {
        gemm<Isa, T>({scores_.row(at), scores_.stride}, a, as_const(queries_), run, rows_, depth_, finish,
                     SeenTurnedScores{band, at});
      };
      near ? multiply(some) : multiply(Streamed<Item>{some, kAhead * stride});
    }
  }

  /// Sᵀ → Pᵀ
  void weigh(const OnlineSoftmax<Isa, T>& softmax, const Band& band, bool mark, T* keep) const noexcept {
    for (Index row = 0; row < rows_; row += kWidth<Isa, T>) {
      const TurnedRows<Isa, T> rows(softmax, row, scores_, band);
      if constexpr (kInPairs<T, Item>) {
        rows.weigh_pairs(mark, keep + row);
      } else {
        rows.weigh(mark, keep + row);
      }
    }
  }

  /// Where they lie, if they lie as a panel does; else packed.  Whether they are finite matters where some are hidden.
  [[nodiscard]] Panel<const Item> values(Range keys, bool all_seen, bool& finite) const noexcept {
    const KeySource source = key_source(call_, call_.value, task_.sequence, task_.kv_head);
    const Index columns = call_.value_dim, count = keys.size();
    if constexpr (!kInPairs<T, Item>) {
      if (const T* const in_place = values_in_place<Isa, T>(source, keys.begin, columns)) {
        finite = all_seen || all_finite<Isa>(in_place, count * columns);
        return {in_place, columns, count, columns};
      }
    }
    const Index after = panel_items<Isa, Item>(Isa::template kKeyTile<T>, depth_);
    const Panel<Item> panel{room_ + after, columns, depth_of<T, Item>(count)};
    finite = pack_values<Isa, T>(panel, source, keys.begin, count) || all_seen;
    return as_const(panel);
  }

  const Call& call_;
  const Task& task_;
  const Index rows_, depth_;
  const Matrix<T> scores_;
  Item* const room_;       // a key tile's: queries, values
  Panel<Item> queries_{};  // (dim, rows): Qᵀ
  bool packed_ = false;
  KeySource source_;
};

}  // namespace attncore
