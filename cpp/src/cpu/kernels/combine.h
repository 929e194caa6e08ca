// The end of a task whose keys were split: the states of its parts become one, in their order.
#pragma once

#include "forward.h"

namespace attncore {

template <class Isa, class T>
void combine_parts(const Call& call, const Task& task, Index parts) noexcept {
  const Index rows = task.rows.size();
  const Index bytes = RowState<Isa, T>::bytes(call, rows);
  const auto whole = RowState<Isa, T>::in(task.state, call, rows).whole(rows);
  for (Index part = 1; part < parts; ++part) {
    whole.merge(RowState<Isa, T>::in(task.state + part * bytes, call, rows).whole(rows), rows);
  }
  finish_rows<Isa, T>(call, TaskRows{call, task}, whole, rows);
}

}  // namespace attncore
