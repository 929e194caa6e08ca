// Plans keep all threads busy, whatever the sequences' lengths.  Nothing is timed: work is counted, and claimed as threads would.
#include <algorithm>
#include <cmath>
#include <vector>

#include "backward_plan.h"
#include "check.h"
#include "cpu/dispatch.h"
#include "cpu/shares.h"
#include "plan.h"
#include "random.h"
#include "score/steps.h"
#include "work.h"

namespace {

using namespace attncore;

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
  /// Runs tasks that don't wait.
  void run_shares(const std::vector<double>& works) {
    Shares shares(static_cast<Index>(works.size()), static_cast<int>(free_.size()));
    for (std::size_t done = 0; done < works.size(); ++done) {
      const auto first = std::min_element(free_.begin(), free_.end());
      *first += works[static_cast<std::size_t>(shares.claim(static_cast<int>(first - free_.begin())))];
    }
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

/// Of a batch's tasks, which don't wait.
std::vector<double> works_of(const Call& call, const Plan& plan, const Batch& batch) {
  const Section* s = &plan.sections[static_cast<std::size_t>(batch.section)];
  std::vector<double> works;
  const auto add = [&](Range rows, Range keys) {
    works.push_back(pairs(call, *plan.kernels, *s, rows, keys) * pair_work(call, 2) +
                    packing_work(call, keys.size()));
  };
  if (!s->alone) {
    for (Index task = 0; task < s->kv_heads * s->parts; ++task) {
      const Index begin = s->keys.begin + task % s->parts * s->part_keys;
      add(s->rows, {begin, min(begin + s->part_keys, s->keys.end)});
    }
    return works;
  }
  for (const Section* const end = s + batch.sections; s < end; ++s)
    for (Index head = 0; head < s->kv_heads; ++head) add(s->rows, s->keys);
  std::vector<double> runs(static_cast<std::size_t>(ceil_div(static_cast<Index>(works.size()), batch.run)));
  for (std::size_t head = 0; head < works.size(); ++head)
    runs[head / static_cast<std::size_t>(batch.run)] += works[head];
  return runs;
}

/// Of all tasks of a plan that don't wait.
std::vector<double> works_of(const Call& call, const Plan& plan) {
  std::vector<double> works;
  for (const Batch& batch : plan.batches) {
    const std::vector<double> more = works_of(call, plan, batch);
    works.insert(works.end(), more.begin(), more.end());
  }
  CHECK(static_cast<Index>(works.size()) == plan.tasks);
  return works;
}

/// The time of forward's plan.
double forward_time(const Call& call, const Kernels& kernels, int threads) {
  const Plan plan = make_plan(call, kernels, Machine{threads});
  Clocks clocks(plan.threads);
  if (!plan.waits()) {
    clocks.run_shares(works_of(call, plan));
    return clocks.end();
  }
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
      for (const double work : works_of(call, plan, batch)) clocks.run(work);
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
  constexpr Index kSequences[][2] = {{16, 256}, {16, 1000}, {64, 256}, {64, 1000}, {900, 9}};  // mean length
  for (const auto& [heads, kv_heads, dim] : kHeads) {
    for (const auto& [count, mean] : kSequences) {
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

}  // namespace

int main() {
  for (const IsaTable* table : available_tables()) balance(*table->f32);
  return finish();
}
