// The online softmax (Milakov & Gimelshein 2018; Dao et al. 2022): rows see their keys tile by tile and keep
//
//     maximum = max of the scores so far,  sum = Σ exp(score − maximum),  output = Σ exp(score − maximum) ·
//     value
//
// so that a tile with a larger maximum only rescales what is there, and states of disjoint keys merge exactly.
// `maximum` lags behind: it follows the scores only when they pass it by more than kMaximumLag, so that the common tile needs
// one comparison of registers and rescales nothing.  Maxima are kept in natural units: in base 2 a score of finfo.min would
// overflow.
#pragma once

#include "carve.h"
#include "gemm.h"
#include "math.h"

namespace attncore {

/// Weights reach exp of it, e⁵ = 148: far from any overflow, and no digit is lost.
inline constexpr int kMaximumLag = 5;

/// How weights are kept: as they are.
template <class Isa, class T>
struct PlainWeights {
  static constexpr bool kRounded = false;
  static constexpr bool kGrows = false;  // take more memory than their scores
  using V = Vec<Isa, T>;
  static ATTN_INLINE V exp(V score, T origin, T unit = 1) noexcept {
    return attncore::exp<Isa, T>(score * unit - origin);
  }
  /// Writes the weights of keys i … over their scores, two registers, and adds them to `sum` as products see them, one after the
  /// other: `weigh` adds what takes its place under dropout in that order too, so that lse knows nothing of dropout, to the bit.
  static ATTN_INLINE void keep(T* scores, Index i, V first, V second, V& sum) noexcept {
    store(scores + i, first);
    store(scores + i + kWidth<Isa, T>, second);
    sum += first;
    sum += second;
  }
  static ATTN_INLINE void keep_numbers(T* scores, Index i, V first, V second, V& sum) noexcept {
    keep(scores, i, first, second, sum);
  }
};

/// The columns of the registers that hold these, two by two.
template <class Isa, class T>
ATTN_INLINE Range in_pairs_of_registers(Range columns) noexcept {
  constexpr Index kTwo = 2 * kWidth<Isa, T>;
  return {columns.begin / kTwo * kTwo, round_up(columns.end, kTwo)};
}

/// What a tile's keys add to a row, lane by lane.
template <class V>
struct WeightSums {
  V seen;   // of the weights as products see them
  V exact;  // before they were rounded, and without dropout
};

/// The state of a task's rows, in memory of bytes(rows, value_dim).  It can outlive the task.
template <class Isa, class T>
struct OnlineSoftmax {
  Matrix<T> output;  // (rows, value_dim), padded to registers
  T* maximum;        // (rows), −inf: nothing seen yet
  T* sum;            // (rows), of the weights as products see them: rounded where these are
  T* exact_sum;      // (rows), for log_sum_exp

  static ATTN_INLINE Index padded(Index items) noexcept {
    return round_up(items, Isa::kBytes / Index{sizeof(T)});
  }

  static ATTN_INLINE OnlineSoftmax carve(Carver& from, Index rows, Index value_dim) noexcept {
    const Index stride = padded(value_dim), each = padded(rows);
    return {
        {from.take<T>(rows * stride), stride}, from.take<T>(each), from.take<T>(each), from.take<T>(each)};
  }
  static ATTN_INLINE Index bytes(Index rows, Index value_dim) noexcept {
    Carver counted;
    (void)carve(counted, rows, value_dim);
    return counted.used();
  }
  static ATTN_INLINE OnlineSoftmax in(std::byte* memory, Index rows, Index value_dim) noexcept {
    Carver from(memory);
    return carve(from, rows, value_dim);
  }

  void clear(Index rows) const noexcept {
    __builtin_memset(output.data, 0, static_cast<std::size_t>(rows * output.stride) * sizeof(T));
    clear_sums(rows);
  }
  void clear_sums(Index rows) const noexcept {
    for (Index row = 0; row < rows; ++row) {
      maximum[row] = -infinity();
      sum[row] = exact_sum[row] = 0;
    }
  }

  /// exp(score − base) would be NaN for −inf − (−inf): rows that have seen nothing are measured from 0.
  static ATTN_INLINE T base(T maximum) noexcept { return maximum == -infinity() ? T{0} : maximum; }

  /// Scores of one row → weights, in place; keep = the factor of what the row has summed so far.  A hidden
  /// key's weight is 0; with `mark` it is −0, as gemm_of_visible needs.  `factors`: dropout's factors, which the sums
  /// know nothing of.  Registers go two by two: there is room for one more than the columns fill.  The last go first where
  /// weights grow: what is written is read by then.  Columns outside of `seen`, which
  /// begins with a pair of registers, are hidden, and their scores not read.
  template <class Weights = PlainWeights<Isa, T>>
  ATTN_INLINE WeightSums<Vec<Isa, T>> weigh(Index row, T* scores, Index columns, bool mark, T* keep,
                                            const T* factors, Range seen) const noexcept {
    using V = Vec<Isa, T>;
    constexpr Index n = kWidth<Isa, T>;
    const Index end = round_up(columns, 2 * n);
    if (end - columns >= n) store(scores + end - n, broadcast<V>(-infinity()));
    keep[row] = follow(row, scores, seen);

    const T origin = base(maximum[row]);
    WeightSums<V> sums{};
    const auto exp_of_score = [&](V score) {
      const V weight = Weights::exp(score, origin);
      if (factors != nullptr || Weights::kRounded) sums.exact += weight;
      return weight;
    };
    // Most tiles: a loop without questions.
    if (columns == end && seen.size() == end && !mark && factors == nullptr) {
      for (Index at = 0; at < end; at += 2 * n) {
        const Index i = Weights::kGrows ? end - 2 * n - at : at;
        const V first = exp_of_score(load<V>(scores + i));
        Weights::keep(scores, i, first, exp_of_score(load<V>(scores + i + n)), sums.seen);
      }
      return sums;
    }
    constexpr T kLeast = Weights::kRounded ? T(0x1p-126) : T{0};  // what rounding may make −0
    const auto weight_of = [&](Index i) {
      const V score = load<V>(scores + i);
      V weight = exp_of_score(score);
      if (factors != nullptr) {
        weight *= load<V>(factors + i);
        weight = weight <= 0 && weight >= -kLeast ? V{} : weight;  // −0 would be the mark
      }
      if (mark) weight = score == -infinity() ? -V{} : weight;
      return weight;
    };
    const V hidden = mark ? -V{} : V{};
    for (Index at = 0; at < end; at += 2 * n) {
      const Index i = Weights::kGrows ? end - 2 * n - at : at;
      if (i < seen.begin || i >= seen.end) {
        Weights::keep(scores, i, hidden, hidden, sums.seen);
        continue;
      }
      const V first = weight_of(i);
      Weights::keep(scores, i, first, i + n < columns ? weight_of(i + n) : hidden, sums.seen);
    }
    if (factors != nullptr) sums.seen = sums.exact;
    return sums;
  }

  /// The same, with the sums added to the row's.
  template <class Weights = PlainWeights<Isa, T>>
  ATTN_INLINE void update(Index row, T* scores, Index columns, bool mark, T* keep, const T* factors,
                          Range seen) const noexcept {
    const auto sums = weigh<Weights>(row, scores, columns, mark, keep, factors, seen);
    add<Weights>(row, keep[row], sums);
  }

  template <class Weights>
  ATTN_INLINE void add(Index row, T keep, const WeightSums<Vec<Isa, T>>& sums) const noexcept {
    sum[row] = sum[row] * keep + horizontal_sum<Isa, T>(sums.seen);
    exact_sum[row] =
        Weights::kRounded ? exact_sum[row] * keep + horizontal_sum<Isa, T>(sums.exact) : sum[row];
  }

  /// The new maximum; returns the factor of what the row has summed so far.
  ATTN_INLINE T raise(Index row, T highest) const noexcept {
    const T before = maximum[row];
    maximum[row] = highest;
    return before == -infinity() ? T{0} : exp_of(before - highest);
  }

  /// 1 / sum, or 0 where nothing was seen; `factor` is padded to registers.
  void divide(T* factor, Index rows) const noexcept {
    using V = Vec<Isa, T>;
    for (Index row = 0; row < rows; row += kWidth<Isa, T>) {
      const V total = load<V>(sum + row);
      store(factor + row, total == 0 ? V{} : 1 / total);
    }
  }

  /// Adds the state of other keys: what this row and that row would be had they seen all.
  void merge(const OnlineSoftmax& other, Index rows) const noexcept {
    using V = Vec<Isa, T>;
    for (Index row = 0; row < rows; ++row) {
      const T highest = other.maximum[row] > maximum[row] ? other.maximum[row] : maximum[row];
      const T mine = exp_of(maximum[row] - base(highest));
      const T theirs = exp_of(other.maximum[row] - base(highest));
      maximum[row] = highest;
      sum[row] = sum[row] * mine + other.sum[row] * theirs;
      exact_sum[row] = exact_sum[row] * mine + other.exact_sum[row] * theirs;
      for (Index i = 0; i < output.stride; i += kWidth<Isa, T>) {
        T* const at = output.row(row) + i;
        store(at, load<V>(at) * mine + load<V>(other.output.row(row) + i) * theirs);
      }
    }
  }

  /// A sink is a key with this score and a zero value.
  ATTN_INLINE void add_sink(Index row, T logit) const noexcept {
    const T highest = logit > maximum[row] ? logit : maximum[row];
    const T mine = exp_of(maximum[row] - base(highest));
    maximum[row] = highest;
    sum[row] = sum[row] * mine + exp_of(logit - base(highest));
    exact_sum[row] = exact_sum[row] * mine + exp_of(logit - base(highest));
    for (Index i = 0; i < output.stride; ++i) output.row(row)[i] *= mine;
  }

  /// log Σ exp(score); −inf where nothing was seen.
  ATTN_INLINE T log_sum_exp(Index row) const noexcept {
    if (exact_sum[row] == 0) return -infinity();
    if constexpr (sizeof(T) == 8) {
      return maximum[row] + __builtin_log(exact_sum[row]);
    } else {
      return maximum[row] + __builtin_logf(exact_sum[row]);
    }
  }

 private:
  /// Lets the maximum follow scores that are far above it; returns the factor of what the row has summed so far.
  ATTN_INLINE T follow(Index row, const T* scores, Range seen) const noexcept {
    using V = Vec<Isa, T>;
    constexpr Index n = kWidth<Isa, T>;
    if (seen.empty()) return 1;
    V even = load<V>(scores + seen.begin), odd = load<V>(scores + seen.begin + n);
    for (Index i = seen.begin + 2 * n; i < seen.end; i += 2 * n) {
      even = maximum_of(load<V>(scores + i), even);
      odd = maximum_of(load<V>(scores + i + n), odd);
    }
    const V highest = maximum_of(even, odd);
    if (!AnyAbove<Isa, T>::of(highest, maximum[row] + kMaximumLag))
      return 1;  // nearly always, after the first tile
    return raise(row, horizontal_max<Isa, T>(highest));
  }

  static ATTN_INLINE constexpr T infinity() noexcept { return static_cast<T>(__builtin_inf()); }
  static ATTN_INLINE Vec<Isa, T> maximum_of(Vec<Isa, T> a, Vec<Isa, T> b) noexcept {
    return attncore::maximum(a, b);
  }
  static ATTN_INLINE T exp_of(T x) noexcept { return attncore::exp<Isa, T>(broadcast<Vec<Isa, T>>(x))[0]; }
};

/// OnlineSoftmax::weigh for a row of plain scores, unscaled, of so many keys: the same bits.  kFolds: `scale` is a power of two, so that
/// exp applies it without a rounding (folds_into_exponent).
template <class Isa, class Weights, Index kKeys, bool kFolds>
ATTN_INLINE WeightSums<Vec<Isa, float>> weigh_plain(const OnlineSoftmax<Isa, float>& softmax, Index row,
                                                    float* scores, float scale, float* keep) noexcept {
  using V = Vec<Isa, float>;
  constexpr Index n = kWidth<Isa, float>, kRegisters = kKeys / n;
  const float unit = kFolds ? scale : 1;
  V score[kRegisters];
  for (Index i = 0; i < kRegisters; ++i)
    score[i] = kFolds ? load<V>(scores + i * n) : in_register(load<V>(scores + i * n) * scale);  // rounded
  V highest = score[0];
  for (Index i = 1; i < kRegisters; ++i) highest = maximum(score[i], highest);
  keep[row] = 1;
  if (AnyAbove<Isa, float>::of(highest, (softmax.maximum[row] + kMaximumLag) / unit)) [[unlikely]]
    keep[row] = softmax.raise(row, horizontal_max<Isa, float>(highest) * unit);

  const float origin = softmax.base(softmax.maximum[row]);
  WeightSums<V> sums{};
  for (Index at = 0; at < kRegisters; at += 2) {
    const Index i = Weights::kGrows ? kRegisters - 2 - at : at;
    V weights[2];
    for (Index j = 0; j < 2; ++j) {
      weights[j] = Weights::exp(score[i + j], origin, unit);
      if constexpr (Weights::kRounded) sums.exact += weights[j];
    }
    Weights::keep_numbers(scores, i * n, weights[0], weights[1], sums.seen);
  }
  return sums;
}

}  // namespace attncore
