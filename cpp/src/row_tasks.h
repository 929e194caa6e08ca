// Rows of (batch, head, token, dim) tensors, shared among threads.
#pragma once

#include "cpu/crew.h"
#include "cpu/memory.h"

namespace attncore {

inline constexpr Index kRowsATask = 64;

inline Index row_count(const Tensor& t) noexcept { return t.shape[0] * t.shape[1] * t.shape[2]; }

/// Row number `row`, the tokens of a head following each other.
inline std::byte* row_at(const Tensor& t, Index row) noexcept {
  const Index token = row % t.shape[2], head = row / t.shape[2] % t.shape[1];
  return at(t, row / t.shape[2] / t.shape[1], head, token);
}

/// Of a pass that, stopped halfway, would leave some rows with a sum and others without.
inline Options uninterrupted(const Options& options) {
  Options same = options;
  same.cancelled = nullptr;
  return same;
}

/// run(rows) for blocks of the rows of `t`, on as many threads as the work is worth.
template <class Run>
void for_rows(const Tensor& t, Index rows_a_task, const Options& options, Run run) {
  constexpr Index kItemsAThread = 1 << 15;
  const Index rows = row_count(t), worth = ceil_div(rows * t.shape[3], kItemsAThread);
  Crew crew(static_cast<int>(max(1, min(threads_of(options), worth))), options);
  crew.run(ceil_div(rows, rows_a_task),
           [&](Index task, int) { run(Range{task * rows_a_task, min(rows, (task + 1) * rows_a_task)}); });
}

}  // namespace attncore
