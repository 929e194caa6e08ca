// The back end on the processor: who runs what.

#include "../backend.h"
#include "../machine.h"
#include "backward_run.h"
#include "cpu_layers.h"
#include "crew.h"
#include "dispatch.h"
#include "forward_run.h"
#include "memory.h"

namespace attncore {
namespace {

Plan plan(const Call& call, const Options& options) {
  return make_plan(call, current_table().forward_kernels(call), Machine{threads_of(options)});
}

void weights(const WeightsCall& weights_call, const Options& options) {
  const auto& [call, weights, numbers] = weights_call;
  const Kernels& kernels = current_table().kernels(call.compute());
  const Index chosen = weights.probabilities.shape[2];
  const Index rows = chosen * call.group;
  const Index tile = min(8 * kernels.row_block, rows);
  if (rows == 0) return;
  const Index tiles = ceil_div(rows, tile);
  const Index tasks = call.batch * call.kv_heads * tiles;
  const Sizes sizes = kernels.sizes(call, tile);
  const Index bytes = sizes.scratch + sizes.panel + sizes.state;
  const double products = static_cast<double>(call.batch * call.heads) * static_cast<double>(chosen) *
                          static_cast<double>(call.keys) * static_cast<double>(call.dim);
  const int threads = worthwhile_threads(products, tasks, options);

  Memory memory(options, threads * bytes);
  std::byte* const scratch = memory.take(threads * bytes);
  Crew crew(threads, options);
  crew.run(tasks, [&](Index number, int thread) {
    const Index head = number / tiles;
    const Index first = number % tiles * tile, batch = head / call.kv_heads;
    const Index first_number = weights.rows.shape[0] > 1 ? batch * chosen : 0;
    const WeightsTask task{.sequence = call.sequence(batch),
                           .kv_head = head % call.kv_heads,
                           .rows = {first, min(first + tile, rows)},
                           .weights = &weights,
                           .numbers = numbers.empty() ? nullptr : numbers.data() + first_number,
                           .poll = crew.poll_for(thread)};
    kernels.weights(call, task, scratch + thread * bytes);
  });
}

}  // namespace

extern constinit const Backend cpu_backend{plan,     run_forward, weights, run_backward,
                                           multiply, sum_rows,    rope};

}  // namespace attncore
