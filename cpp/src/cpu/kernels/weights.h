// The probabilities themselves, for chosen rows: one pass over the keys finds each row's maximum and sum, a
// second one writes exp(score − maximum) / sum, or keeps the largest.  No memory but the result's.
#pragma once

#include "forward.h"
#include "rotate.h"

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
    if (r.query < task_.sequence.queries) {
      load_span<Isa, T>(at(q, r.entry, r.head, r.token), q.stride[3], q.dtype, call_.dim, out);
    } else {
      __builtin_memset(out, 0, static_cast<std::size_t>(call_.dim) * sizeof(T));
    }
  }

  [[nodiscard]] std::byte* result(const Tensor& t, Index row, Index at_key) const noexcept {
    return at(t, task_.sequence.batch, row_at(row).head, chosen(row), at_key);
  }

  void clear_result(Index row) const noexcept {
    const Weights& w = *task_.weights;
    const Index count = w.probabilities.shape[3];
    if (w.indices.given()) {
      const Ranks ranks = this->ranks(row);
      for (Index i = 0; i < count; ++i) ranks.put(i, {0, -1});
      return;
    }
    std::byte* const line = result(w.probabilities, row, 0);
    for (Index i = 0; i < count; i += kWidth<Isa, T>)
      put_register(line, i, min(kWidth<Isa, T>, count - i), Vec<Isa, T>{});
  }

  /// `line`: a row's probabilities from some key on.
  ATTN_INLINE void put_register(std::byte* line, Index i, Index count,
                                Vec<Isa, T> probability) const noexcept {
    const Index stride = task_.weights->probabilities.stride[3];
    store_items<Isa, T, kDType<T>>(line + i * stride, stride, count, probability);
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
    const auto each_register = [&](auto visit) {
      for (Index i = 0; i < keys.size(); i += kWidth<Isa, T>) {
        const V score = load<V>(scores + i);
        visit(i, min(kWidth<Isa, T>, keys.size() - i), score, attncore::exp<Isa, T>(score - origin) / sum);
      }
    };
    if (task_.weights->indices.given()) {
      const Ranks ranks = this->ranks(row);
      return each_register([&](Index i, Index count, V score, V probability) {
        ranks.insert(keys.begin + i, count, score, probability);
      });
    }
    std::byte* const line = result(task_.weights->probabilities, row, keys.begin);
    each_register([&](Index i, Index count, V, V probability) { put_register(line, i, count, probability); });
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

  /// A row of the result.
  struct Ranks {
    std::byte *probabilities, *keys;
    Index stride, key_stride, size;

    [[nodiscard]] Found operator[](Index place) const noexcept {
      return {read<T>(probabilities + place * stride), read<Index>(keys + place * key_stride)};
    }
    void put(Index place, const Found& item) const noexcept {
      __builtin_memcpy(probabilities + place * stride, &item.probability, sizeof item.probability);
      __builtin_memcpy(keys + place * key_stride, &item.key, sizeof item.key);
    }
    /// Lets `item` sink from the root of a heap of `heap` places.
    void sink(Index heap, const Found& item) const noexcept {
      Index place = 0;
      for (Index child = 1; child < heap; child = 2 * place + 1) {
        if (child + 1 < heap && (*this)[child + 1].after((*this)[child])) ++child;
        if (!(*this)[child].after(item)) break;
        put(place, (*this)[child]);
        place = child;
      }
      put(place, item);
    }
    /// Keys come in rising order: of equal ones, those that are there stay.
    void insert(Index key, Index count, Vec<Isa, T> score, Vec<Isa, T> probability) const noexcept {
      const Found last = (*this)[0];
      if (last.key >= 0 && !AnyAbove<Isa, T>::of(probability, last.probability)) return;
      for (Index lane = 0; lane < count; ++lane) {
        const Found item{probability[lane], key + lane};
        if (score[lane] == -static_cast<T>(__builtin_inf())) continue;
        if ((*this)[0].after(item)) sink(size, item);
      }
    }
  };

  [[nodiscard]] Ranks ranks(Index row) const noexcept {
    const Tensor &p = task_.weights->probabilities, &i = task_.weights->indices;
    return {result(p, row, 0), result(i, row, 0), p.stride[3], i.stride[3], p.shape[3]};
  }

  void sort(Index row) const noexcept {
    const Ranks ranks = this->ranks(row);
    for (Index last = ranks.size - 1; last > 0; --last) {
      const Found smallest = ranks[0];
      ranks.sink(last, ranks[last]);
      ranks.put(last, smallest);
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
