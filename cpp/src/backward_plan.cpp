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
    plan_.key_tiles = ceil_div(call_.keys, kernels.key_tile);
    row_tile_ = kernels.backward_sizes(call_, 0).row_tile;
    for (Index batch = 0; batch < call_.batch; ++batch) plan_.sequences.push_back(call_.sequence(batch));
    most_rows_ = call_.queries * call_.group;
    measure(machine);
  }

  BackwardPlan make() {
    const Gradients& g = gradients_;
    const bool wants_rows = g.d_query.given();
    add_stats();
    add_biases();
    const bool wants_keys = g.d_key.given() || g.d_value.given() || g.d_alibi.given() ||
                            g.d_relative_bias.given() || own_biases_ != 0;
    const bool one_owner = wants_rows && wants_keys && owners_fill_threads();
    for (const Index batch : longest_first()) {
      for (Index kv_head = 0; kv_head < call_.kv_heads; ++kv_head) {
        const Range rows = all_rows(sequence(batch)), keys = all_keys(sequence(batch));
        if (one_owner) {
          add(batch, kv_head, rows, keys, true, true);
        } else if (wants_keys) {
          for (Index key = 0; key < keys.end; key += kernels_.key_tile) {
            add(batch, kv_head, rows, {key, min(key + kernels_.key_tile, keys.end)}, false, true);
          }
        }
      }
    }
    if (wants_rows && !one_owner) add_row_tasks();
    size(one_owner ? most_rows_ : owned_rows_);
    return std::move(plan_);
  }

 private:
  [[nodiscard]] const Sequence& sequence(Index batch) const {
    return plan_.sequences[static_cast<std::size_t>(batch)];
  }
  /// With those that do not exist, whose gradients are zeros: as many as have a place, or a gradient of a bias that is not
  /// broadcast.
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

  /// Five products by owners, the longest first, against seven by all threads.
  [[nodiscard]] bool owners_fill_threads() const {
    if (most_rows_ * call_.dim * item_size(call_.compute()) > kOwnedBytes) return false;
    if (plan_.threads == 1) return true;
    std::priority_queue<double, std::vector<double>, std::greater<>> busy;
    for (int thread = 0; thread < plan_.threads; ++thread) busy.push(0);
    double last = 0;
    for (const Index batch : longest_first()) {
      for (Index kv_head = 0; kv_head < call_.kv_heads; ++kv_head) {
        const double end = busy.top() + work_[static_cast<std::size_t>(batch)];
        busy.pop();
        busy.push(end);
        last = std::max(last, end);
      }
    }
    return 5 * last <= 7 * flops_ / plan_.threads;
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

  void add_row_tasks() {
    const Index tiles = call_.batch * call_.kv_heads * ceil_div(most_rows_, row_tile_);
    const Index most = row_tile_ * std::clamp(tiles / (4 * Index{plan_.threads}), Index{1}, kTilesOfRows);
    owned_rows_ = min(most, most_rows_);
    for (const Index batch : longest_first()) {
      for (Index kv_head = 0; kv_head < call_.kv_heads; ++kv_head) {
        const Index rows = all_rows(sequence(batch)).end;
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

  void size(Index owned_rows) {
    const BackwardSizes sizes = kernels_.backward_sizes(call_, owned_rows);
    const Index owners = call_.batch * call_.kv_heads;
    plan_.threads = static_cast<int>(min(plan_.threads, max(1, plan_.size())));
    if (gradients_.d_alibi.given()) plan_.alibi_shares = plan_.key_tiles * call_.group;
    if (gradients_.d_relative_bias.given()) {
      plan_.relative_shares = plan_.key_tiles * call_.group * call_.distance_bias.buckets;
    }
    if (gradients_.d_sinks.given()) plan_.sink_shares = call_.group;
    const Index shares = owners * (plan_.alibi_shares + plan_.relative_shares) +
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
  Index row_tile_ = 0, most_rows_ = 0, owned_rows_ = 0;
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
