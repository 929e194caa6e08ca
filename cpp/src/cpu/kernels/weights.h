// The probabilities themselves, for chosen rows: one pass over the keys finds each row's maximum and sum, a
// second one writes exp(score − maximum) / sum, or keeps the largest.  No memory but the result's.
#pragma once

#include "forward.h"

namespace attncore {

template <class Isa, class T>
class WeightsKernel {
 public:
  WeightsKernel(const Call& call, const WeightsTask& task, std::byte* memory) noexcept
      : call_(call),
        task_(task),
        rows_(task.rows.size()),
        scratch_(Scratch<Isa, T>::in(memory, call, rows_)),
        softmax_(OnlineSoftmax<Isa, T>::in(scratch_.panel + Scratch<Isa, T>::sizes(call, rows_).panel, rows_,
                                           0)) {}

  void run() const noexcept {
    softmax_.clear(rows_);
    for (Index row = 0; row < rows_; ++row) {
      load_query(row);
      clear_result(row);
    }
    for_each_tile([&](Index row, T* scores, Range keys) {
      softmax_.update(row, scores, keys.size(), false, scratch_.keep, nullptr, {0, keys.size()});
    });
    add_sinks<Isa, T>(call_, softmax_, rows_, [&](Index row) { return row_at(row).head; });
    for_each_tile([&](Index row, T* scores, Range keys) { write(row, scores, keys); });
    for (Index row = 0; task_.weights->indices.given() && row < rows_; ++row) sort(row);
  }

 private:
  [[nodiscard]] Index chosen(Index row) const noexcept { return (task_.rows.begin + row) / call_.group; }

  [[nodiscard]] Row row_at(Index row) const noexcept {
    const Index query = task_.query(chosen(row));
    const Index head = task_.kv_head * call_.group + (task_.rows.begin + row) % call_.group;
    return row_of(task_.sequence, head, query);
  }

  /// The hull of the chosen queries that exist.
  [[nodiscard]] Block block() const noexcept {
    Block block = block_of(call_, task_.sequence, task_.kv_head, {0, 0});
    block.queries = {kUnbounded, 0};
    for (Index row = 0; row < rows_; ++row) {
      const Index query = task_.query(chosen(row));
      if (query >= task_.sequence.queries) continue;
      block.queries = {min(block.queries.begin, query), max(block.queries.end, query + 1)};
    }
    return block;
  }

  void load_query(Index row) const noexcept {
    const Row r = row_at(row);
    const Tensor& q = call_.query;
    T* const out = scratch_.queries.row(row);
    const bool exists = r.query < task_.sequence.queries;
    for (Index dim = 0; dim < call_.dim; ++dim) {
      out[dim] = exists ? load_scalar<Isa, T>(at(q, r.entry, r.head, r.token, dim), q.dtype) : T{0};
    }
  }

  [[nodiscard]] std::byte* result(const Tensor& t, Index row, Index at_key) const noexcept {
    return at(t, task_.sequence.batch, row_at(row).head, chosen(row), at_key);
  }

  void clear_result(Index row) const noexcept {
    const Weights& w = *task_.weights;
    const T zero = 0;
    const Index none = -1;
    for (Index i = 0; i < w.probabilities.shape[3]; ++i) {
      __builtin_memcpy(result(w.probabilities, row, i), &zero, sizeof zero);
      if (w.indices.given()) __builtin_memcpy(result(w.indices, row, i), &none, sizeof none);
    }
  }

  /// visit(row, scores, keys) for every row that exists, tile by tile.
  template <class Visit>
  void for_each_tile(Visit visit) const noexcept {
    const Block rows = block();
    if (rows.queries.empty()) return;
    const Index key_tile = Isa::template kKeyTile<T>;
    const Range seen = ScoreSteps::visible(call_, rows);
    const KeySource source = key_source(call_, call_.key, task_.sequence, task_.kv_head);
    const Band any_rows;  // chosen ones leave no band
    for (Index first = seen.begin - seen.begin % key_tile; first < seen.end; first += key_tile) {
      const Range keys{first, min(first + key_tile, seen.end)};
      const TileWork work =
          ScoreSteps::touch(call_, rows, {first, first + round_up(keys.size(), kWidth<Isa, T>)});
      if (work.hidden) continue;
      if (task_.poll()) return;
      const Panel<T> panel{reinterpret_cast<T*>(scratch_.panel), keys.size(), call_.dim};
      pack_transposed<Isa, T>(panel, source, keys.begin);
      gemm<Isa, T>(scratch_.scores, as_const(scratch_.queries), as_const(panel), rows_, keys.size(),
                   call_.dim, Scaled<T>{static_cast<T>(call_.scale)}, SeenScores{any_rows});
      for (Index row = 0; row < rows_; ++row) {
        const Row r = row_at(row);
        if (r.query >= task_.sequence.queries) continue;
        T* const scores = scratch_.scores.row(row);
        if (work.steps != 0) {
          apply_steps<Isa, T>(call_, r, work.steps, keys, task_.sequence.keys, {0, keys.size()}, scores);
        }
        visit(row, scores, keys);
      }
    }
  }

  void write(Index row, T* scores, Range keys) const noexcept {
    using V = Vec<Isa, T>;
    const T origin = softmax_.base(softmax_.maximum[row]);
    const T sum = softmax_.sum[row] == 0 ? T{1} : softmax_.sum[row];
    const Weights& w = *task_.weights;
    for (Index i = 0; i < keys.size(); i += kWidth<Isa, T>) {
      const V score = load<V>(scores + i);
      const V probability = attncore::exp<Isa, T>(score - origin) / sum;
      for (Index lane = 0; lane < min(kWidth<Isa, T>, keys.size() - i); ++lane) {
        const T p = probability[lane];
        if (w.indices.given()) {
          if (score[lane] != -static_cast<T>(__builtin_inf())) insert(row, {p, keys.begin + i + lane});
        } else {
          __builtin_memcpy(result(w.probabilities, row, keys.begin + i + lane), &p, sizeof p);
        }
      }
    }
  }

  // ---- the largest: the result's own memory is a heap whose root is the smallest of them, sorted at the end ----

  struct Found {
    T probability;
    Index key;  // −1: none yet
    /// Of equal ones the higher key comes later.
    [[nodiscard]] bool after(const Found& other) const noexcept {
      if (key < 0 || other.key < 0) return key < other.key;
      return probability < other.probability || (probability == other.probability && key > other.key);
    }
  };

  [[nodiscard]] Found found(Index row, Index place) const noexcept {
    const Weights& w = *task_.weights;
    return {read<T>(result(w.probabilities, row, place)), read<Index>(result(w.indices, row, place))};
  }

  void put(Index row, Index place, const Found& item) const noexcept {
    const Weights& w = *task_.weights;
    __builtin_memcpy(result(w.probabilities, row, place), &item.probability, sizeof item.probability);
    __builtin_memcpy(result(w.indices, row, place), &item.key, sizeof item.key);
  }

  /// Lets `item` sink from the root of a heap of `size` places.
  void sink(Index row, Index size, const Found& item) const noexcept {
    Index place = 0;
    for (Index child = 1; child < size; child = 2 * place + 1) {
      if (child + 1 < size && found(row, child + 1).after(found(row, child))) ++child;
      if (!found(row, child).after(item)) break;
      put(row, place, found(row, child));
      place = child;
    }
    put(row, place, item);
  }

  void insert(Index row, const Found& item) const noexcept {
    if (found(row, 0).after(item)) sink(row, task_.weights->probabilities.shape[3], item);
  }

  void sort(Index row) const noexcept {
    for (Index last = task_.weights->probabilities.shape[3] - 1; last > 0; --last) {
      const Found smallest = found(row, 0);
      sink(row, last, found(row, last));
      put(row, last, smallest);
    }
  }

  template <class Item>
  static Item read(const std::byte* p) noexcept {
    Item item;
    __builtin_memcpy(&item, p, sizeof item);
    return item;
  }

  const Call& call_;
  const WeightsTask& task_;
  Index rows_;
  Scratch<Isa, T> scratch_;
  OnlineSoftmax<Isa, T> softmax_;
};

template <class Isa, class T>
void weights_task(const Call& call, const WeightsTask& task, std::byte* scratch) noexcept {
  WeightsKernel<Isa, T>(call, task, scratch).run();
}

}  // namespace attncore
