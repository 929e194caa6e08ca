// Forward attention of a task, or of several that read the same keys.
#pragma once

#include "forward.h"
#include "short_row.h"

namespace attncore {

template <class Isa, class T, class Item>
void forward_task(const Call& call, const Task& task, std::byte* scratch) noexcept {
  if constexpr (!kInPairs<T, Item>) {
    if (ShortRow<Isa, T>::run(call, task, scratch)) return;
  }
  ForwardKernel<Isa, T, Item>(call, task, scratch).run();
}

/// Tasks of one tile of keys, where it lies: of sequences that share it, kMostDirectRows rows in all at most, or of KV heads whose
/// tokens lie side by side.
template <class Isa, class T, class Item>
void forward_gang(const Call& call, const Task* tasks, Index count, std::byte* scratch) noexcept {
  using Kernel = ForwardKernel<Isa, T, Item>;
  const bool heads = count > 1 && !tasks[0].in_gang;
  alignas(Kernel) std::byte memory[kMostGangHeads][sizeof(Kernel)];
  Kernel* members[kMostGangHeads];
  Index ready = 0;
  for (Index i = 0; i < count; ++i) {
    members[ready] = new (memory[i]) Kernel(call, tasks[i], scratch);
    const Sizes sizes = Scratch<Isa, T, Item>::sizes(call, tasks[i].rows.size());
    scratch += tasks[i].in_gang ? sizes.gang : sizes.scratch;
    if (members[ready]->begin_gang(scratch)) ++ready;  // the next task's memory is free so far
  }
  if (heads && ready == count && !members[0]->takes_tiles())
    return Kernel::run_heads_tile(members, count, scratch);
  for (Index first = 0, end = 0; first < ready; first = end) {
    do ++end;
    while (end < ready && !heads && members[end]->is_grouped() == members[first]->is_grouped());
    Kernel::run_direct_tile(members + first, end - first, scratch);
  }
}

}  // namespace attncore
