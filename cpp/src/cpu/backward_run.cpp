#include "backward_run.h"

#include "../backward_plan.h"
#include "../number.h"
#include "crew.h"
#include "dispatch.h"
#include "memory.h"

namespace attncore {
namespace {

class BackwardRun {
 public:
  BackwardRun(const BackwardCall& backward, const BackwardPlan& plan, const Options& options)
      : backward_(backward),
        call_(backward.call),
        plan_(plan),
        crew_(plan.threads, options),
        memory_(options, plan.workspace_bytes),
        threads_(memory_.take(plan.threads * plan.thread_bytes)),
        stats_(memory_.take(plan.stats_bytes)),
        shares_(reinterpret_cast<double*>(memory_.take(plan.shares_bytes))) {
    const Index tiles = plan.first_key_tile.back() * call_.kv_heads;
    alibi_shares_ = shares_;
    relative_shares_ = alibi_shares_ + tiles * plan.alibi_shares;
    sink_shares_ = relative_shares_ + tiles * plan.relative_shares;
  }

  void run() {
    unready_ = static_cast<Index>(plan_.rows.size());
    crew_.run(plan_.size(), [this](Index number, int thread) { run_task(number, thread); });
    add_shares(backward_.gradients.d_alibi, alibi_shares_, 1);
    add_shares(backward_.gradients.d_relative_bias, relative_shares_, call_.distance_bias.buckets);
    add_sink_shares();
  }

 private:
  void run_task(Index number, int thread) noexcept {
    const auto rows = static_cast<Index>(plan_.rows.size()), tasks = static_cast<Index>(plan_.tasks.size());
    std::byte* const scratch = threads_ + thread * plan_.thread_bytes;
    if (number < rows) {
      BackwardTask task = prepared(plan_.rows[static_cast<std::size_t>(number)], thread);
      if (plan_.sink_shares > 0) task.sink_shares = sink_shares_ + number * plan_.sink_shares;
      plan_.kernels->backward_rows(backward_, task, scratch);
      --unready_;
      return;
    }
    if (!crew_.wait(thread, [&] { return unready_ == 0; })) return;
    if (number < rows + tasks) {
      plan_.kernels->backward(
          backward_, prepared(plan_.tasks[static_cast<std::size_t>(number - rows)], thread), scratch);
      return;
    }
    BackwardBiasTask task = plan_.biases[static_cast<std::size_t>(number - rows - tasks)];
    task.sequences = plan_.sequences.data();
    task.stats = stats_;
    task.poll = crew_.poll_for(thread);
    plan_.kernels->backward_bias(backward_, task, scratch);
  }

  [[nodiscard]] BackwardTask prepared(BackwardTask task, int thread) noexcept {
    const Index tile = plan_.first_share(call_, task.sequence.batch, task.kv_head);
    if (task.owns_keys && plan_.alibi_shares > 0)
      task.alibi_shares = alibi_shares_ + tile * plan_.alibi_shares;
    if (task.owns_keys && plan_.relative_shares > 0) {
      task.relative_shares = relative_shares_ + tile * plan_.relative_shares;
    }
    task.stats = stats_;
    task.poll = crew_.poll_for(thread);
    return task;
  }

  /// A gradient over (1 or batch, head, 1, items) from its shares over (batch, KV head, key tile, group, items).
  void add_shares(const Tensor& gradient, const double* shares, Index items) const {
    if (!gradient.given()) return;
    const Index entries = gradient.stride[0] == 0 ? 1 : call_.batch;
    const Index summed = gradient.stride[0] == 0 ? call_.batch : 1;
    for (Index entry = 0; entry < entries; ++entry) {
      for (Index head = 0; head < call_.heads; ++head) {
        for (Index item = 0; item < items; ++item) {
          double sum = 0;
          for (Index batch = entry; batch < entry + summed; ++batch) {
            const Index first = plan_.first_share(call_, batch, head / call_.group);
            for (Index tile = first; tile < first + plan_.key_tiles(batch); ++tile) {
              sum += shares[(tile * call_.group + head % call_.group) * items + item];
            }
          }
          write_number(sum, at(gradient, entry, head, 0, item), gradient.dtype);
        }
      }
    }
  }

  void add_sink_shares() const {
    const Tensor& gradient = backward_.gradients.d_sinks;
    if (!gradient.given()) return;
    std::vector<double> sums(static_cast<std::size_t>(call_.heads), 0);
    for (std::size_t i = 0; i < plan_.rows.size(); ++i) {
      for (Index head = 0; head < call_.group; ++head) {
        const Index of_all = plan_.rows[i].kv_head * call_.group + head;
        sums[static_cast<std::size_t>(of_all)] += sink_shares_[static_cast<Index>(i) * call_.group + head];
      }
    }
    for (Index head = 0; head < call_.heads; ++head) {
      write_number(sums[static_cast<std::size_t>(head)], at(gradient, 0, head), gradient.dtype);
    }
  }

  const BackwardCall& backward_;
  const Call& call_;
  const BackwardPlan& plan_;
  Crew crew_;
  Memory memory_;
  std::byte* threads_;
  std::byte* stats_;
  double *shares_, *alibi_shares_, *relative_shares_, *sink_shares_;
  std::atomic<Index> unready_{0};
};

}  // namespace

void run_backward(const BackwardCall& backward, const Options& options) {
  const Kernels& kernels = current_table().gradient_kernels(backward.call.query.dtype);
  const BackwardPlan plan = make_plan(backward, kernels, Machine{threads_of(options)});
  BackwardRun(backward, plan, options).run();
}

}  // namespace attncore
