// One query row against so few keys that a pair of registers holds their scores: a tenth of a microsecond of work,
// which the kernel for few rows (forward.h) would double by what it prepares.  It reads and sums in the same order:
// the bits are the same.
#pragma once

#include "direct_products.h"
#include "rows.h"

namespace attncore {

template <class Isa, class T>
class ShortRow {
 public:
  /// False: nothing is done, this is for the other kernel.
  [[nodiscard]] static bool run(const Call& call, const Task& task, std::byte* memory) noexcept {
    const Index rows =
        task.sequence.queries * call.group;  // of others, one by itself would be summed otherwise
    return rows == 1 && task.rows.size() == 1 && task.keys.size() <= kMostKeys &&
           ShortRow(call, task, memory).run();
  }

 private:
  using V = Vec<Isa, T>;
  static constexpr Index n = kWidth<Isa, T>, kItem = sizeof(T), kMostKeys = 2 * n;

  ShortRow(const Call& call, const Task& task, std::byte* memory) noexcept
      : call_(call), task_(task), row_at_{call, task}, keys_(task.keys.size()), memory_(memory) {}

  [[gnu::noinline]] bool run() noexcept {  // apart from its caller, which has more rows most of the time
    if (!takes_task() || !takes_operands()) return false;
    const Matrix<const T> query = query_row();
    alignas(Isa::kBytes) T scores[kMostKeys];
    with_depth<1>(call_.dim, [&](auto dims) {
      for (Index key = 0; key < keys_; key += n) store(scores + key, scores_of(query.data, key, dims));
    });
    T maximum, sum, exact_sum, keep;
    const OnlineSoftmax<Isa, T> softmax{{}, &maximum, &sum, &exact_sum};
    softmax.clear_sums(1);
    softmax.update(0, scores, keys_, false, &keep, nullptr, {0, keys_});
    if (!add_values(scores, sum == 0 ? T{0} : 1 / sum)) return false;
    finish_sums(call_, row_at_, softmax, 1);
    return true;
  }

  [[nodiscard]] bool takes_task() const noexcept {
    if (keys_ == 0 || task_.keys.begin > 0) return false;
    if (!task_.first || !task_.last || task_.loaded || task_.packed != nullptr) return false;
    const Block block = row_at_.block();
    const TileWork work = ScoreSteps::touch(call_, block, task_.keys);
    return !work.hidden && work.steps == 0;
  }
  /// Numbers of T beside each other, of whole registers, and nothing else that scores, weights or sums depend on.
  [[nodiscard]] bool takes_operands() noexcept {
    if (call_.score.sinks.given() || call_.dropout.given() || call_.pages.given()) return false;
    if (call_.key_scale.given() || call_.value_scale.given()) return false;
    key_ = key_source(call_, call_.key, task_.sequence, task_.kv_head);
    value_ = key_source(call_, call_.value, task_.sequence, task_.kv_head);
    out_ = rows_in_place<T>(call_.out, row_at_).data;
    return lies_in_items<T, T>(key_, call_.dim) && lies_in_items<T, T>(value_, call_.value_dim) &&
           out_ != nullptr && call_.value_dim % n == 0;
  }

  [[nodiscard]] Matrix<const T> query_row() const noexcept {
    Carver from(memory_);
    const Index padded = round_up(call_.dim, n);
    const Matrix<T> room{from.take<T>(padded), padded};
    if (call_.dim % n == 0) return rows_of<Isa, T>(call_.query, call_.dim, row_at_, room, 1, true);
    load_rows<Isa, T>(call_.query, call_.dim, row_at_, room, 1);
    return as_const(room);
  }

  /// A register of them, from key `first` on; past the last one −∞.
  template <class Dims>
  [[nodiscard]] ATTN_INLINE V scores_of(const T* query, Index first, Dims dims) const noexcept {
    constexpr int kFew = min(4, n), kSome = min(8, n);
    const Index count = min(keys_ - first, n);
    V scores = count <= kFew    ? dot<kFew>(query, first, count, dims)
               : count <= kSome ? dot<kSome>(query, first, count, dims)
                                : dot<n>(query, first, count, dims);
    scores = Scaled<T>{static_cast<T>(call_.scale)}(static_cast<const T*>(nullptr), scores, 0);
    return lanes<Isa, T>() < static_cast<T>(count) ? scores : ScoreMath<Isa, T>::hidden();
  }

  template <int kKeys, class Dims>
  [[nodiscard]] ATTN_INLINE V dot(const T* query, Index first, Index count, Dims dims) const noexcept {
    const Rows& next = task_.ahead.rows[Ahead::kKey];
    V sum[kKeys];
    for (Index i = 0; i < kKeys; ++i) {
      const Index key = first + min(i, count - 1);
      V own[1];
      dot_key<Isa, T, T, kStoredAs<T, T>>(own, query, key_.token(key), ahead(next, key), dims);
      sum[i] = own[0];
    }
    return sum_lanes<n, kKeys>(sum);
  }

  /// What to fetch while token `i` is read.
  [[nodiscard]] static ATTN_INLINE const std::byte* ahead(const Rows& next, Index i) noexcept {
    return i < next.count ? next.data + i * next.stride : next.data;
  }

  /// False: a sum is not finite, so that hidden pairs may be at fault.
  bool add_values(const T* weights, T factor) const noexcept {
    for (Index column = 0; column < call_.value_dim;) {
      const Index registers = (call_.value_dim - column) / n;
      const auto add = [&]<int kColumns>() {
        if (registers < kColumns || !add_columns<kColumns>(weights, column, factor)) return false;
        column += kColumns * n;
        return true;
      };
      const bool added = registers >= 8   ? add.template operator()<8>()
                         : registers >= 4 ? add.template operator()<4>()
                         : registers >= 2 ? add.template operator()<2>()
                                          : add.template operator()<1>();
      if (!added) return false;
    }
    return true;
  }

  template <int kColumns>
  [[nodiscard]] ATTN_INLINE bool add_columns(const T* weights, Index column, T factor) const noexcept {
    const Rows& next = task_.ahead.rows[Ahead::kValue];
    V sum[kColumns]{};
    for (Index key = 0; key < keys_; ++key) {
      const auto* const values = reinterpret_cast<const T*>(value_.token(key)) + column;
      const std::byte* const fetched = ahead(next, key) + column * kItem;
      const V weight = broadcast<V>(weights[key]);
      for (int j = 0; j < kColumns; ++j) {
        fetch_later(fetched + j * n * kItem);
        sum[j] = multiply_add<Isa>(weight, load<V>(values + j * n), sum[j]);
      }
    }
    V zero{};  // or NaN
    for (int j = 0; j < kColumns; ++j) zero += sum[j] - sum[j];
    if (horizontal_sum<Isa, T>(zero) != 0) return false;
    for (int j = 0; j < kColumns; ++j) store(out_ + column + j * n, sum[j] * factor + T{0});
    return true;
  }

  const Call& call_;
  const Task& task_;
  const TaskRows row_at_;
  const Index keys_;
  std::byte* const memory_;
  KeySource key_, value_;
  T* out_ = nullptr;
};

}  // namespace attncore
