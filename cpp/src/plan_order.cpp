#include "plan_order.h"

#include <algorithm>
#include <vector>

namespace attncore {
namespace {

void add(Plan& plan, Batch batch, Index tasks) {
  if (tasks == 0) return;
  batch.first_task = plan.tasks;
  plan.tasks += tasks;
  plan.batches.push_back(batch);
}

/// Short ones are claimed some at a time, as long as there are enough tasks for threads to end at about the same time.
void add_alone(Plan& plan, Batch batch, Index heads) {
  constexpr Index kFewestTasks = 16;                                            // of a thread
  constexpr double kMostBytes = 64 << 10;                                       // of operands, a task
  const double bytes = std::max(1.0, plan.bytes / static_cast<double>(heads));  // if there is nothing else
  const Index most = static_cast<Index>(std::max(1.0, kMostBytes / bytes));
  batch.run = std::clamp(heads / (kFewestTasks * plan.threads), Index{1}, most);
  add(plan, batch, ceil_div(heads, batch.run));
}

}  // namespace

const Batch& Plan::batch_of(Index number) const noexcept {
  const auto is_before = [](Index one, const Batch& batch) { return one < batch.first_task; };
  return *(std::upper_bound(batches.begin(), batches.end(), number, is_before) - 1);
}

void order_batches(Plan& plan) {
  std::vector<Batch> runs;
  runs.reserve(plan.sections.size() + plan.gangs.size());
  std::sort(plan.gangs.begin(), plan.gangs.end(), [](const Gang& a, const Gang& b) {
    return a.sections[0] != b.sections[0] ? a.sections[0] < b.sections[0] : a.part < b.part;
  });
  std::size_t gang = 0;
  for (std::size_t i = 0; i < plan.sections.size(); ++i) {
    const Section& section = plan.sections[i];
    const auto number = static_cast<Index>(i);
    if (section.alone && i > 0 && plan.sections[i - 1].alone) {
      ++runs.back().sections;
      continue;
    }
    for (; gang < plan.gangs.size() && plan.gangs[gang].sections[0] == number; ++gang)
      runs.push_back({.section = number, .gang = static_cast<Index>(gang)});
    Batch batch{.section = number};
    if (!section.shared) runs.push_back(batch);
    for (Index key = section.keys.begin; section.shared && key < section.keys.end; key += section.part_keys) {
      batch.keys = {key, min(key + section.part_keys, section.keys.end)};
      batch.block = plan.blocks++;
      runs.push_back(batch);
    }
  }
  plan.batches.reserve(runs.size() + static_cast<std::size_t>(plan.blocks));
  auto ahead = runs.begin();
  const auto add_packing = [&] {
    ahead = std::find_if(ahead, runs.end(), [](const Batch& batch) { return batch.block >= 0; });
    if (ahead == runs.end()) return;
    Batch packing = *ahead++;
    packing.packs = true;
    add(plan, packing, ceil_div(packing.keys.size(), plan.kernels->key_tile));
  };
  add_packing();
  for (const Batch& run : runs) {
    if (run.block >= 0) add_packing();
    const Section& section = plan.section(run.section);
    if (section.alone) {
      add_alone(plan, run, run.sections * section.kv_heads);
    } else {
      add(plan, run, run.gang >= 0 ? 1 : section.kv_heads * section.tasks_of_head());
    }
  }
}

}  // namespace attncore
