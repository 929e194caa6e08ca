// Rotary position embedding (Su et al. 2021), in place or from one tensor to another.
#pragma once

#include "rotate.h"

namespace attncore {

template <class Isa, class T>
ATTN_INLINE Index rope_head_bytes(const RopeCall& call) noexcept {
  return round_up((call.x.shape[3] + kWidth<Isa, T>)*Index{sizeof(T)}, 64);
}

template <class Isa, class T>
Index rope_scratch(const RopeCall& call) noexcept {
  return round_up(rope_head_bytes<Isa, T>(call) + Turns<Isa, T>::bytes(call.rotation, kRopeTokens), 64);
}

/// A token's sines and cosines serve all heads, and all entries that share its position.
template <class Isa, class T>
void rope_task(const RopeCall& call, const RopeTask& task, std::byte* scratch) noexcept {
  T* const head = reinterpret_cast<T*>(scratch);
  Turns<Isa, T> turns(call.rotation, scratch + rope_head_bytes<Isa, T>(call));
  const Tensor &x = call.x, &out = call.out;
  const Index dim = x.shape[3], first = task.tokens.begin;
  for (Index token = first; token < task.tokens.end; ++token) {
    turns.set_position(call.rotation.position(task.batch, token), token - first);
  }
  for (Index batch = task.batch; batch < task.batch + task.batches; ++batch) {
    for (Index h = 0; h < x.shape[1]; ++h) {
      for (Index token = first; token < task.tokens.end; ++token) {
        load_span<Isa, T>(at(x, batch, h, token), x.stride[3], x.dtype, dim, head);
        turns.rotate(head, token - first);
        store_span<Isa, T>(at(out, batch, h, token), out.stride[3], out.dtype, dim, head);
      }
    }
  }
}

}  // namespace attncore
