// Packed sequences: each has the bits that it has alone, forward and backward, on every ISA, from any number of threads; and
// plans keep all threads busy, whatever the lengths.  Nothing is timed: work is counted, and claimed as threads would.
#include <algorithm>
#include <cmath>
#include <vector>

#include "backward_plan.h"
#include "check.h"
#include "cpu/dispatch.h"
#include "kit.h"
#include "plan.h"
#include "score/steps.h"
#include "work.h"

namespace {

using namespace attncore;

// ---- balance ----

/// Sequences of given lengths, without arrays: plans read lengths only.
struct Lengths {
  std::vector<Index> cumulative{0};
  Index heads, kv_heads, dim;

  Lengths(const std::vector<Index>& lengths, Index heads, Index kv_heads, Index dim)
      : heads(heads), kv_heads(kv_heads), dim(dim) {
    for (const Index length : lengths) cumulative.push_back(cumulative.back() + length);
  }

  [[nodiscard]] Problem problem() const {
    Index number = 0;
    const auto tensor = [&](Index of_heads, Index dims) {
      const auto* const data = reinterpret_cast<const void*>(++number << 44);
      return Tensor::contiguous(data, DType::f32, {1, of_heads, cumulative.back(), dims});
    };
    Problem p;
    p.query = tensor(heads, dim), p.key = tensor(kv_heads, dim), p.value = tensor(kv_heads, dim);
    p.out = tensor(heads, dim), p.lse = tensor(heads, 1);
    const auto entries = static_cast<Index>(cumulative.size());
    p.packing.query_tokens = Tensor::contiguous(cumulative.data(), DType::i64, {entries, 1, 1, 1});
    p.packing.key_tokens = p.packing.query_tokens;
    p.score.causal = true;
    return p;
  }
};

/// Threads that claim tasks in their order, as soon as they are free.
class Clocks {
 public:
  explicit Clocks(int threads) : free_(static_cast<std::size_t>(threads), 0.0) {}
  /// Runs a task that waits for something; when it ends.
  double run(double work, double ready = 0) {
    double& clock = *std::min_element(free_.begin(), free_.end());
    clock = std::max(clock, ready) + work;
    return clock;
  }
  [[nodiscard]] double end() const { return *std::max_element(free_.begin(), free_.end()); }

 private:
  std::vector<double> free_;
};

constexpr Index kRegister = 16;  // keys, at most

// Work in multiply-adds: the two products of a pair and its softmax; what a key's packing takes.
double pair_work(const Call& call, int products) { return products * static_cast<double>(call.dim) + 30; }
double packing_work(const Call& call, Index keys) { return 16.0 * static_cast<double>(keys * call.dim); }

/// Pairs of a tile, with the rows and keys that fill registers.
double pairs(const Call& call, const Kernels& kernels, const Section& s, Range rows, Range keys) {
  const Range seen = intersect(keys, ScoreSteps::visible(call, block_of(call, s.sequence, s.kv_head, rows)));
  return static_cast<double>(round_up(rows.size(), kernels.row_block)) *
         static_cast<double>(round_up(seen.size(), kRegister));
}

/// The time of forward's plan.
double forward_time(const Call& call, const Kernels& kernels, int threads) {
  const Plan plan = make_plan(call, kernels, Machine{threads});
  Clocks clocks(plan.threads);
  std::vector<double> packed(static_cast<std::size_t>(plan.blocks)), used(packed);
  for (const Batch& batch : plan.batches) {
    const Section& s = plan.sections[static_cast<std::size_t>(batch.section)];
    const auto block = static_cast<std::size_t>(batch.block);
    if (batch.packs) {
      const double ready =
          batch.block < plan.block_slots ? 0 : used[block - static_cast<std::size_t>(plan.block_slots)];
      for (Index key = batch.keys.begin; key < batch.keys.end; key += kernels.key_tile) {
        const Index keys = min(kernels.key_tile, batch.keys.end - key);
        packed[block] = std::max(packed[block], clocks.run(packing_work(call, keys), ready));
      }
    } else if (s.shared) {
      for (Index tile = s.tiles; tile-- > 0;) {
        const double work = pairs(call, kernels, s, s.tile(tile), batch.keys) * pair_work(call, 2);
        used[block] = std::max(used[block], clocks.run(work, packed[block]));
      }
    } else {
      for (Index task = 0; task < s.kv_heads * s.parts; ++task) {
        const Index part = task % s.parts;
        const Range keys{s.keys.begin + part * s.part_keys,
                         min(s.keys.begin + (part + 1) * s.part_keys, s.keys.end)};
        clocks.run(pairs(call, kernels, s, s.rows, keys) * pair_work(call, 2) +
                   packing_work(call, keys.size()));
      }
    }
  }
  return clocks.end();
}

double backward_time(const BackwardCall& backward, const Kernels& kernels, int threads) {
  const Call& call = backward.call;
  const BackwardPlan plan = make_plan(backward, kernels, Machine{threads});
  Clocks clocks(plan.threads);
  for (const BackwardTask& task : plan.tasks) {
    double work = 0;
    const Index rows = kernels.backward_sizes(call, 0).row_tile;
    for (Index key = task.keys.begin; key < task.keys.end; key += kernels.key_tile) {
      const Range keys{key, min(key + kernels.key_tile, task.keys.end)};
      for (Index row = task.rows.begin; row < task.rows.end; row += rows) {
        const Section s{.sequence = task.sequence, .kv_head = task.kv_head};
        work += pairs(call, kernels, s, {row, min(row + rows, task.rows.end)}, keys);
      }
    }
    clocks.run(work * pair_work(call, 2 + 2 * int{task.owns_keys} + int{task.owns_rows}) +
               packing_work(call, task.keys.size()));
  }
  return clocks.end();
}

std::vector<Index> lognormal(Index count, Index mean, double sigma) {
  Random random;
  std::vector<Index> lengths;
  for (Index i = 0; i < count; ++i) {
    double normal = 0;  // a sum of 12 that are uniform in ± ½ has variance 1
    for (int term = 0; term < 12; ++term) normal += static_cast<double>(random.number()) / 2;
    const double length = static_cast<double>(mean) * std::exp(sigma * normal - sigma * sigma / 2);
    lengths.push_back(static_cast<Index>(length));
  }
  return lengths;
}

struct Rates {
  double forward, backward;
};

/// Pairs by time.
Rates rates(const Lengths& lengths, const Kernels& kernels, int threads) {
  const Problem problem = lengths.problem();
  const Call call = validate(problem);
  double visible = 0;
  for (Index entry = 0; entry < call.batch; ++entry)
    visible += visible_pairs(call, call.sequence(entry)) * static_cast<double>(call.heads);
  Gradients gradients;
  Index number = 10;
  const auto like = [&](Tensor t) {
    t.data = reinterpret_cast<void*>(++number << 44);
    return t;
  };
  gradients.d_out = like(problem.out), gradients.d_query = like(problem.query);
  gradients.d_key = like(problem.key), gradients.d_value = like(problem.value);
  return {visible / forward_time(call, kernels, threads),
          visible / backward_time(validate(problem, gradients), kernels, threads)};
}

/// Lognormal lengths against equal ones.
void balance(const Kernels& kernels) {
  constexpr Index kHeads[][3] = {{8, 8, 64}, {8, 2, 128}, {1, 1, 64}, {32, 8, 128}, {8, 1, 64}};
  for (const auto& [heads, kv_heads, dim] : kHeads) {
    for (const Index count : {16, 64}) {
      for (const Index mean : {256, 1000}) {
        const Lengths equal(std::vector<Index>(static_cast<std::size_t>(count), mean), heads, kv_heads, dim);
        for (const double sigma : {0.5, 1.0}) {
          const Lengths mixed(lognormal(count, mean, sigma), heads, kv_heads, dim);
          const Rates ours = rates(mixed, kernels, 2), best = rates(equal, kernels, 2);
          CHECK(ours.forward > 0.9 * best.forward);
          CHECK(ours.backward > 0.9 * best.backward);
        }
      }
    }
  }
}

// ---- bits ----

/// Arrays of packed sequences, (token, head, dim), and what is computed of them.
struct Arrays {
  static constexpr Index kHeads = 6, kKvHeads = 2, kDim = 20, kValueDim = 9;
  static constexpr Index kRows[] = {0, 4};  // whose weights are asked for
  using Floats = std::vector<float>;
  std::vector<Index> queries{0}, keys{0};  // cumulative
  Index longest = 0;                       // of keys
  Floats slopes, query, key, value, d_out, out, lse, d_query, d_key, d_value;
  Floats weights;  // (entry, head, row, key), 0 where a sequence has none

  Arrays(std::initializer_list<std::array<Index, 2>> lengths, Random& random) {
    for (const auto& [of_queries, of_keys] : lengths) {
      queries.push_back(queries.back() + of_queries);
      keys.push_back(keys.back() + of_keys);
      longest = std::max(longest, of_keys);
    }
    weights.resize(lengths.size() * std::size_t(kHeads * 2 * longest));
    const auto fill = [&](Floats& array, Index items) { array = noise(items, random); };
    fill(slopes, kHeads), fill(lse, queries.back() * kHeads);
    fill(query, queries.back() * kHeads * kDim), fill(key, keys.back() * kKvHeads * kDim);
    fill(value, keys.back() * kKvHeads * kValueDim), fill(d_out, queries.back() * kHeads * kValueDim);
    out = d_out, d_query = query, d_key = key, d_value = value;
  }

  /// Tokens first … last − 1 of an array.
  static Tensor tokens(Floats& array, Index first, Index last, Index heads, Index dim) {
    Tensor t =
        Tensor::contiguous(array.data() + first * heads * dim, DType::f32, {1, last - first, heads, dim});
    std::swap(t.shape[1], t.shape[2]), std::swap(t.stride[1], t.stride[2]);
    return t;
  }

  /// Forward and backward of the entries first … last − 1: packed, or one by itself.
  void run(Index first, Index last, bool packed, const Options& options) {
    const auto at = [](const std::vector<Index>& of, Index i) { return of[static_cast<std::size_t>(i)]; };
    const Index q = at(queries, first), q_end = at(queries, last), k = at(keys, first),
                k_end = at(keys, last);
    Problem p;
    p.query = tokens(query, q, q_end, kHeads, kDim), p.out = tokens(out, q, q_end, kHeads, kValueDim);
    p.key = tokens(key, k, k_end, kKvHeads, kDim), p.value = tokens(value, k, k_end, kKvHeads, kValueDim);
    p.lse = tokens(lse, q, q_end, kHeads, 1);
    p.score.causal = true;
    p.score.alibi = Tensor::contiguous(slopes.data(), DType::f32, {1, kHeads, 1, 1});
    if (packed) {
      const auto ints = [](const std::vector<Index>& of) {
        return Tensor::contiguous(of.data(), DType::i64, {static_cast<Index>(of.size()), 1, 1, 1});
      };
      p.packing = {.query_tokens = ints(queries), .key_tokens = ints(keys)};
    }
    forward(p, options);
    Gradients g;
    g.d_out = tokens(d_out, q, q_end, kHeads, kValueDim), g.d_query = tokens(d_query, q, q_end, kHeads, kDim);
    g.d_key = tokens(d_key, k, k_end, kKvHeads, kDim);
    g.d_value = tokens(d_value, k, k_end, kKvHeads, kValueDim);
    backward(p, g, options);
    const auto batch = static_cast<Index>(queries.size()) - 1;
    Weights w;
    w.probabilities = Tensor::contiguous(weights.data(), DType::f32, {batch, kHeads, 2, longest});
    if (!packed) {
      w.probabilities.data = attncore::at(w.probabilities, first, 0);
      w.probabilities.shape = {1, kHeads, std::min<Index>((q_end - q + 3) / 4, 2), k_end - k};
    }
    w.rows = Tensor::contiguous(kRows, DType::i64, {1, 1, w.probabilities.shape[2], 1});
    attention_weights(p, w, options);
  }

  [[nodiscard]] std::vector<Floats> results() const { return {out, lse, d_query, d_key, d_value, weights}; }
};

/// Each sequence has the bits that it has alone.
void bits() {
  Random random;
  Arrays arrays({{0, 3}, {5, 9}, {300, 280}, {0, 0}, {77, 0}, {1, 700}, {130, 2300}, {2, 2}}, random);
  const auto entries = static_cast<Index>(arrays.queries.size()) - 1;
  for (Index entry = 0; entry < entries; ++entry) arrays.run(entry, entry + 1, false, {});
  const auto alone = arrays.results();
  for (int threads = 1; threads <= 4; ++threads) {
    Random other;
    arrays.out.assign(arrays.out.size(), other.number());
    for (auto* const result : {&arrays.lse, &arrays.d_query, &arrays.d_key, &arrays.d_value, &arrays.weights})
      result->assign(result->size(), other.number());
    arrays.run(0, entries, true, {.num_threads = threads});
    const auto packed = arrays.results();
    for (std::size_t i = 0; i < alone.size(); ++i) {
      CHECK(same_bits(alone[i], packed[i]));
    }
  }
}

}  // namespace

int main() {
  for (const IsaTable* table : available_tables()) {
    use_isa(table->name);
    std::printf("%s\n", table->name);
    bits();
    balance(*table->f32);
  }
  return finish();
}
