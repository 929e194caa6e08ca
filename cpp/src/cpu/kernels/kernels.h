// What the back end calls: a table of functions for one ISA and one accumulation type.
#pragma once

#include "../../score/score.h"

namespace attncore {

/// A piece of forward's work: the query rows of one tile against some of their keys.  Row r of a sequence is
/// the query r / group of head kv_head · group + r % group: the heads that share keys are rows beside each
/// other.
struct Task {
  Sequence sequence;
  Index kv_head = 0;
  Range rows;
  Range keys;         // begins at a multiple of the key tile
  bool first = true;  // the rows' first keys: begin with an empty state
  bool last = true;   // their last keys: write out and lse

  std::byte* state = nullptr;         // Sizes::state bytes
  const std::byte* packed = nullptr;  // the tiles of `keys`, Sizes::panel bytes each; none: pack them here
};

/// Bytes of memory that a task of so many rows needs.
struct Sizes {
  Index scratch, state, panel;
};

/// A piece of attention_weights' work: rows of one KV head's queries, in the order of Task, but of the chosen
/// queries: row r is query chosen[r / group].
struct WeightsTask {
  Sequence sequence;
  Index kv_head = 0;
  Range rows;
  const Weights* weights = nullptr;

  bool (*stopped)(void* crew, int thread) = nullptr;  // whether the call was cancelled: asked now and then
  void* crew = nullptr;
  int thread = 0;

  [[nodiscard]] ATTN_INLINE Index query(Index chosen) const noexcept {
    const Tensor& list = weights->rows;
    return list.given() ? read_int(at(list, 0, 0, chosen), list.dtype) : chosen;
  }
};

struct Kernels {
  const char* name;
  Index row_block, key_block, key_tile;  // rows of a register block, keys of a strip, keys of a tile

  Sizes (*sizes)(const Call&, Index rows) noexcept;
  void (*pack)(const Call&, const Sequence&, Index kv_head, Range keys,
               std::byte* panel) noexcept;  // one key tile
  void (*forward)(const Call&, const Task&, std::byte* scratch) noexcept;
  /// Merges the states of `parts` tasks, in their order, and writes out and lse; task.state is the first.
  void (*combine)(const Call&, const Task&, Index parts) noexcept;
  void (*weights)(const Call&, const WeightsTask&, std::byte* scratch) noexcept;
  /// The floating-point operations of `rounds` rounds of multiply-adds in registers, which it does.
  double (*multiply_adds)(Index rounds) noexcept;
};

/// An ISA: its tables for float and double accumulation.
struct IsaTable {
  const char* name;
  bool (*supported)() noexcept;
  Kernels f32, f64;
  [[nodiscard]] const Kernels& kernels(DType compute) const noexcept {
    return compute == DType::f64 ? f64 : f32;
  }
};

}  // namespace attncore
