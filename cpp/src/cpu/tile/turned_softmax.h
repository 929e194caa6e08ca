// The online softmax of scores that lie turned, (keys, rows): a register has one key's scores of several rows, a row in each lane, so
// that nothing goes from lane to lane.  The bits are OnlineSoftmax's: what it sums in one lane is summed in one register here, and
// registers are folded as it folds lanes.
#pragma once

#include "band.h"
#include "pairs.h"

namespace attncore {

/// The sums of some rows, a row in each lane: register i is what lane i of a row's own register is in OnlineSoftmax.
template <class Isa, class T>
struct TurnedSums {
  using V = Vec<Isa, T>;
  static constexpr Index n = kWidth<Isa, T>;
  V of_lane[n]{};

  [[nodiscard]] ATTN_INLINE V& operator[](Index i) noexcept { return of_lane[i % n]; }
  [[nodiscard]] ATTN_INLINE V total() noexcept {
    for (Index half = n / 2; half > 0; half /= 2) {
      for (Index i = 0; i < half; ++i) of_lane[i] = of_lane[i] + of_lane[i + half];
    }
    return of_lane[0];
  }
};

/// rounded_exp with an origin in each lane.
template <class Isa>
class TurnedExp {
 public:
  using V = Vec<Isa, float>;
  explicit ATTN_INLINE TurnedExp(V origin) noexcept
      : origin_(origin),
        in_base_2_(in_register(origin * kLog2e)),
        far_(AnyAbove<Isa, float>::of(absolute(origin), kFarOrigin)) {}
  [[nodiscard]] ATTN_INLINE V operator()(V x) const noexcept {
    const V near = PowerOfTwo<Isa>::of(x * kLog2e - in_base_2_);
    if (!far_) [[likely]]
      return near;
    return absolute(origin_) > kFarOrigin ? PowerOfTwo<Isa>::of((x - origin_) * kLog2e) : near;
  }

 private:
  static constexpr float kLog2e = ExpConstants<float>::kLog2e;
  V origin_, in_base_2_;
  bool far_;
};

/// As many rows of a softmax as a register has lanes, from `row` on; of a tile's scores, (keys, rows), from their column on.
template <class Isa, class T>
class TurnedRows {
 public:
  using V = Vec<Isa, T>;

  TurnedRows(const OnlineSoftmax<Isa, T>& softmax, Index row, Matrix<T> scores, const Band& band) noexcept
      : softmax_(softmax),
        row_(row),
        scores_{scores.data + row, scores.stride},
        keys_(band.keys),
        seen_{0, keys_} {
    if (!band.whole) hide(band);
  }

  /// Scores → weights, in place; keep = the factors of what the rows have summed so far.  A hidden key's weight is 0, or −0 with `mark`.
  void weigh(bool mark, T* keep) const noexcept {
    const V factor = follow(), origin = this->origin();
    TurnedSums<Isa, T> sums;
    for (Index key = seen_.begin; key < seen_.end; ++key) {
      const V score = at(key), weight = attncore::exp<Isa, T>(score - origin);
      sums[key] += weight;
      store(scores_.row(key), mark ? marked(score, weight) : weight);
    }
    fill_unseen(mark ? -V{} : V{}, 1);
    store(keep, factor);
    store(softmax_.exact_sum + row_, add(softmax_.sum + row_, factor, sums.total()));
  }

  /// The same of weights that are rounded to bfloat16 and lie two by two: (pairs of keys, rows), over the scores of half as many keys.
  void weigh_pairs(bool mark, T* keep) const noexcept {
    const V factor = follow(), hidden = mark ? -V{} : V{};
    const TurnedExp<Isa> exp(origin());
    TurnedSums<Isa, T> seen, exact;
    const auto weight_of = [&](Index key) {
      if (key >= keys_) return hidden;
      const V score = at(key), weight = exp(score);
      exact[key] += weight;
      return mark ? marked(score, weight) : weight;
    };
    for (Index key = seen_.begin; key < seen_.end; key += 2) {
      const V first = weight_of(key);
      const U32<Isa> pairs = narrow_lanes<Isa>(first, weight_of(key + 1));
      store(static_cast<void*>(scores_.row(key / 2)), pairs);
      V& sum = seen[key / 2];
      sum = add_both<Isa>(pairs, sum);
    }
    fill_unseen(bit_cast<V>(narrow_lanes<Isa>(hidden, hidden)), 2);
    store(keep, factor);
    add(softmax_.sum + row_, factor, seen.total());
    add(softmax_.exact_sum + row_, factor, exact.total());
  }

 private:
  [[nodiscard]] ATTN_INLINE V at(Index key) const noexcept { return load<V>(scores_.row(key)); }
  static ATTN_INLINE V marked(V score, V weight) noexcept { return score == -infinity() ? -V{} : weight; }

  /// Scores that the band leaves out become −inf; keys that no row sees are left to fill_unseen.
  void hide(const Band& band) noexcept {
    constexpr Index n = kWidth<Isa, T>;
    const V lane = lanes<Isa, T>();
    seen_ = band.keys_of({row_, min(row_ + n, band.rows)});
    seen_ = {seen_.begin / 2 * 2, min(round_up(seen_.end, 2), keys_)};
    for (Index key = seen_.begin; key < seen_.end; ++key) {
      const Range rows = band.rows_of({key, key + 1});
      const V hidden = broadcast<V>(-infinity());
      const V from = lane < static_cast<T>(rows.begin - row_) ? hidden : at(key);
      store(scores_.row(key), lane < static_cast<T>(rows.end - row_) ? from : hidden);
    }
  }
  ATTN_INLINE void fill_unseen(V hidden, Index keys_in_item) const noexcept {
    for (Index i = 0; i < seen_.begin / keys_in_item; ++i) store(scores_.row(i), hidden);
    for (Index i = ceil_div(seen_.end, keys_in_item); i < ceil_div(keys_, keys_in_item); ++i)
      store(scores_.row(i), hidden);
  }

  /// The new maxima; returns the factors of what the rows have summed so far.
  [[nodiscard]] ATTN_INLINE V follow() const noexcept {
    V even = broadcast<V>(-infinity()), odd = even;
    for (Index key = seen_.begin; key < seen_.end; key += 2) {
      even = maximum(at(key), even);
      odd = maximum(at(min(key + 1, seen_.end - 1)), odd);
    }
    const V highest = maximum(even, odd), before = load<V>(softmax_.maximum + row_);
    const auto grows = highest > before + T{kMaximumLag};
    store(softmax_.maximum + row_, grows ? highest : before);
    const V factor = before == -infinity() ? V{} : attncore::exp<Isa, T>(before - highest);
    return grows ? factor : V{} + T{1};
  }
  [[nodiscard]] ATTN_INLINE V origin() const noexcept {
    const V maximum = load<V>(softmax_.maximum + row_);
    return maximum == -infinity() ? V{} : maximum;
  }
  static ATTN_INLINE V add(T* sum, V factor, V more) noexcept {
    const V total = load<V>(sum) * factor + more;
    store(sum, total);
    return total;
  }
  static ATTN_INLINE constexpr T infinity() noexcept { return static_cast<T>(__builtin_inf()); }

  const OnlineSoftmax<Isa, T>& softmax_;
  const Index row_;
  const Matrix<T> scores_;
  const Index keys_;
  Range seen_;
};

}  // namespace attncore
