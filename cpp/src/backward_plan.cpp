#include "backward_plan.h"

#include <algorithm>
#include <numeric>
#include <queue>

#include "work.h"

namespace attncore {
namespace {

constexpr double kThreadFlops = 1e6;            // work that is worth another thread
constexpr Index kOwnedBytes = Index{16} << 20;  // of one owner's sums for d_query, a thread
constexpr Index kTilesOfRows = 4;               // row tiles of a task, at most: they share packed keys

class BackwardPlanner {
 public:
  BackwardPlanner(const BackwardCall& backward, const Kernels& kernels, const Machine& machine)
      : call_(backward.call), gradients_(backward.gradients), kernels_(kernels) {
    plan_.kernels = &kernels;
    row_tile_ = kernels.backward_sizes(call_, 0).row_tile;
    for (Index batch = 0; batch < call_.batch; ++batch) plan_.sequences.push_back(call_.sequence(batch));
    measure(machine);
  }

  BackwardPlan make() {
    const Gradients& g = gradients_;
    const bool wants_rows = g.d_query.given();
    add_stats();
    add_biases();
    const bool wants_keys = g.d_key.given() || g.d_value.given() || g.d_alibi.given() ||
                            g.d_relative_bias.given() || own_biases_ != 0;
    const std::vector<Index> order = longest_first();
    const std::size_t split = wants_rows && wants_keys ? best_split(order) : order.size();
    for (std::size_t i = 0; i < order.size(); ++i) {
      const Index batch = order[i];
      const bool owned = i >= split && fits(batch);
      if (!owned) unowned_.push_back(batch);
      const Range rows = all_rows(sequence(batch)), keys = all_keys(sequence(batch));
      if (owned) owned_rows_ = max(owned_rows_, rows.end);
      for (Index kv_head = 0; kv_head < call_.kv_heads; ++kv_head) {
        if (owned) {
          add(batch, kv_head, rows, keys, true, true);
        } else if (wants_keys) {
          for (Index key = 0; key < keys.end; key += kernels_.key_tile) {
            add(batch, kv_head, rows, {key, min(key + kernels_.key_tile, keys.end)}, false, true);
          }
        }
      }
    }
    if (wants_rows) add_row_tasks();
    size();
    return std::move(plan_);
  }

 private:
  [[nodiscard]] const Sequence& sequence(Index batch) const {
    return plan_.sequences[static_cast<std::size_t>(batch)];
  }
  /// Those whose gradients are written, zeros past the length: as many as have a place, or, for a bias that is not broadcast,
  /// the call's.
  [[nodiscard]] Range all_rows(const Sequence& s) const {
    return {0, (own_biases_ != 0 ? call_.queries : s.query_place.tokens) * call_.group};
  }
  [[nodiscard]] Range all_keys(const Sequence& s) const {
    return {0, own_biases_ != 0 ? call_.keys : s.key_place.tokens};
  }

  void measure(const Machine& machine) {
    double flops = 0;
    const double item = 2 * static_cast<double>(call_.group * (3 * call_.dim + 2 * call_.value_dim));
    for (Index batch = 0; batch < call_.batch; ++batch) {
      work_.push_back(item * visible_pairs(call_, sequence(batch)));
      flops += work_.back() * static_cast<double>(call_.kv_heads);
    }
    flops_ = flops;
    plan_.threads = std::clamp(static_cast<int>(std::min(flops / kThreadFlops, 1e6)), 1, machine.threads);
  }

  [[nodiscard]] std::vector<Index> longest_first() const {
    std::vector<Index> batches(static_cast<std::size_t>(call_.batch));
    std::iota(batches.begin(), batches.end(), 0);
    std::sort(batches.begin(), batches.end(), [this](Index a, Index b) {
      const double work_a = work_[static_cast<std::size_t>(a)], work_b = work_[static_cast<std::size_t>(b)];
      return work_a != work_b ? work_a > work_b : a < b;
    });
    return batches;
  }

  /// Whether one owner's sums for d_query do.
  [[nodiscard]] bool fits(Index batch) const {
    return all_rows(sequence(batch)).end * call_.dim * item_size(call_.compute()) <= kOwnedBytes;
  }

  struct Time {
    double owners, all;  // until the last owner ends; until all threads could
    [[nodiscard]] double end() const { return std::max(owners, all); }
  };

  /// Of a plan where the first `split` sequences, and those that do not fit, have two passes: seven products by all threads,
  /// beside five by the owners of the others, who come the longest first.
  [[nodiscard]] Time time_of(const std::vector<Index>& order, std::size_t split) const {
    std::priority_queue<double, std::vector<double>, std::greater<>> busy;
    for (int thread = 0; thread < plan_.threads; ++thread) busy.push(0);
    double last = 0, by_owners = 0;
    for (std::size_t i = split; i < order.size(); ++i) {
      const double work = work_[static_cast<std::size_t>(order[i])];
      for (Index kv_head = 0; fits(order[i]) && kv_head < call_.kv_heads; ++kv_head) {
        const double end = busy.top() + work;
        busy.pop();
        busy.push(end);
        last = std::max(last, end);
        by_owners += work;
      }
    }
    return {5 * last, (7 * flops_ - 2 * by_owners) / plan_.threads};
  }

  /// How many of the longest sequences have two passes: where owners of the others cease to be what all wait for.
  [[nodiscard]] std::size_t best_split(const std::vector<Index>& order) const {
    std::size_t split = 0, end = order.size();
    while (split < end) {
      const std::size_t middle = (split + end) / 2;
      const Time time = time_of(order, middle);
      if (time.owners > time.all) {
        split = middle + 1;
      } else {
        end = middle;
      }
    }
    const bool one_less = split > 0 && time_of(order, split - 1).end() <= time_of(order, split).end();
    return one_less ? split - 1 : split;
  }

  void add(Index batch, Index kv_head, Range rows, Range keys, bool owns_rows, bool owns_keys) {
    plan_.tasks.push_back({.sequence = sequence(batch),
                           .kv_head = kv_head,
                           .rows = rows,
                           .keys = keys,
                           .owns_rows = owns_rows,
                           .owns_keys = owns_keys,
                           .own_biases = owns_keys ? own_biases_ : 0});
  }

  void add_stats() {
    for (const Sequence& sequence : plan_.sequences) {
      const Index rows = sequence.queries * call_.group, most = kTilesOfRows * row_tile_;
      for (Index kv_head = 0; kv_head < call_.kv_heads; ++kv_head) {
        for (Index row = 0; row < rows; row += most) {
          plan_.rows.push_back(
              {.sequence = sequence, .kv_head = kv_head, .rows = {row, min(row + most, rows)}});
        }
      }
    }
  }

  /// Of the sequences without one owner.
  void add_row_tasks() {
    Index tiles = 0;
    for (const Index batch : unowned_)
      tiles += call_.kv_heads * ceil_div(all_rows(sequence(batch)).end, row_tile_);
    const Index most = row_tile_ * std::clamp(tiles / (4 * Index{plan_.threads}), Index{1}, kTilesOfRows);
    for (const Index batch : unowned_) {
      const Index rows = all_rows(sequence(batch)).end;
      owned_rows_ = max(owned_rows_, min(most, rows));
      for (Index kv_head = 0; kv_head < call_.kv_heads; ++kv_head) {
        for (Index end = ceil_div(rows, most); end > 0; --end) {  // the last rows see most keys
          add(batch, kv_head, {(end - 1) * most, min(end * most, rows)}, {0, sequence(batch).keys}, true,
              false);
        }
      }
    }
  }

  /// A bias without broadcasting has its gradient from those who own the keys; another's tiles are tasks.
  void add_biases() {
    const Index queries = kernels_.backward_sizes(call_, 0).bias_queries;
    for (std::size_t bias = 0; bias < gradients_.d_biases.size; ++bias) {
      const Tensor& d_bias = gradients_.d_biases.items[bias];
      if (!d_bias.given()) continue;
      const bool repeated[4] = {
          d_bias.stride[0] == 0 && call_.batch != 1, d_bias.stride[1] == 0 && call_.heads != 1,
          d_bias.stride[2] == 0 && call_.queries != 1, d_bias.stride[3] == 0 && call_.keys != 1};
      if (std::none_of(repeated, repeated + 4, [](bool axis) { return axis; })) {
        own_biases_ |= 1U << bias;
        continue;
      }
      for_pieces(call_.batch, d_bias.stride[0] == 0 ? call_.batch : 1, [&](Range batches) {
        for_pieces(call_.kv_heads, d_bias.stride[1] == 0 ? call_.kv_heads : 1, [&](Range kv_heads) {
          for_pieces(call_.queries, d_bias.stride[2] == 0 ? call_.queries : queries, [&](Range rows) {
            for_pieces(call_.keys, d_bias.stride[3] == 0 ? call_.keys : kernels_.key_tile,
                       [&](Range keys) { plan_.biases.push_back({bias, batches, kv_heads, rows, keys}); });
          });
        });
      });
    }
  }

  /// visit(piece) for the pieces of 0 … extent − 1; for an empty extent that is summed over, once.
  template <class Visit>
  static void for_pieces(Index extent, Index piece, Visit visit) {
    if (extent == 0 && piece == 0) visit(Range{0, 0});
    for (Index begin = 0; begin < extent; begin += piece) visit(Range{begin, min(begin + piece, extent)});
  }

  void size() {
    const BackwardSizes sizes = kernels_.backward_sizes(call_, owned_rows_);
    plan_.threads = static_cast<int>(min(plan_.threads, max(1, plan_.size())));
    plan_.first_key_tile.assign(1, 0);
    for (const Sequence& sequence : plan_.sequences) {
      const Index tiles = ceil_div(all_keys(sequence).end, kernels_.key_tile);
      plan_.first_key_tile.push_back(plan_.first_key_tile.back() + tiles);
    }
    if (gradients_.d_alibi.given()) plan_.alibi_shares = call_.group;
    if (gradients_.d_relative_bias.given()) plan_.relative_shares = call_.group * call_.distance_bias.buckets;
    if (gradients_.d_sinks.given()) plan_.sink_shares = call_.group;
    const Index tiles = plan_.first_key_tile.back() * call_.kv_heads;
    const Index shares = tiles * (plan_.alibi_shares + plan_.relative_shares) +
                         static_cast<Index>(plan_.rows.size()) * plan_.sink_shares;
    plan_.stats_bytes = round_up(sizes.stats, 64);
    plan_.shares_bytes = round_up(shares * Index{sizeof(double)}, 64);
    plan_.thread_bytes =
        round_up(plan_.biases.empty() ? sizes.scratch : max(sizes.scratch, sizes.bias_scratch), 64);
    plan_.workspace_bytes = plan_.stats_bytes + plan_.shares_bytes + plan_.threads * plan_.thread_bytes;
  }

  const Call& call_;
  const Gradients& gradients_;
  const Kernels& kernels_;
  Index row_tile_ = 0;
  Index owned_rows_ = 0;        // of a task, at most
  std::vector<Index> unowned_;  // batch entries without one owner
  unsigned own_biases_ = 0;
  std::vector<double> work_;  // of a batch entry's KV head
  double flops_ = 0;
  BackwardPlan plan_;
};

}  // namespace

BackwardPlan make_plan(const BackwardCall& backward, const Kernels& kernels, const Machine& machine) {
  return BackwardPlanner(backward, kernels, machine).make();
}

}  // namespace attncore
