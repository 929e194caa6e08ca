// The end of a task whose keys were split: the states of its parts become one, in their order.
#pragma once

#include "forward.h"

namespace attncore {

template <class Isa, class T>
void combine_parts(const Call& call, const Task& task, Index parts) noexcept {
  const Index rows = task.rows.size();
  const Index bytes = Scratch<Isa, T>::sizes(call, rows).state;
  const auto whole = OnlineSoftmax<Isa, T>::in(task.state, rows, call.value_dim);
  for (Index part = 1; part < parts; ++part) {
    whole.merge(OnlineSoftmax<Isa, T>::in(task.state + part * bytes, rows, call.value_dim), rows);
  }
  finish_rows<Isa, T>(call, TaskRows{call, task}, whole, rows);
}

}  // namespace attncore
