// A plan: which rows meet which keys, in what pieces and order.  It is a pure function of the call, the kernels'
// tile sizes and the machine.  What it decides by the machine (threads, rows of a tile, super-blocks, sections)
// leaves the bits alone.
//
// A *section* is one sequence, one KV head and a range of its query rows.  Sections run in their order.  Where KV heads have sections alike
// whose tasks share nothing, one entry of the plan stands for all of them: threads pass each other each line of a plan, so it is short.
//
// In a *shared* section there are several row tiles.  Keys come in super-blocks, each packed once and used by all
// row tiles; the rows' state waits in the section's memory from one super-block to the next.
//
// A section that is *alone* has few keys, and one task runs all its row tiles: several of them meet keys that the task packs, a super-block
// at most, into its thread's own memory.  Where there are many sections, this spares the threads the traffic between their caches.  While it
// multiplies, it fetches what the next one reads.
//
// In any other there is one row tile, which packs for itself.  If the rows are few (decoding), its keys are
// split into parts of a size that depends on the sequence alone; each part leaves a state, and the last one
// to end merges them.  Parts that several sequences read from the same pages are one task, a *gang*; so are those of a sequence's KV heads
// where each token's heads lie beside each other.
//
// A *batch* is a run of tasks, claimed one by one (crew.h): the packing of a super-block's key tiles,
// or the row tiles against it, or the parts of a split, of one head after another, or a gang, or the heads of
// sections that are alone, some a task.  Packing stands one super-block ahead of its use.
#pragma once

#include <vector>

#include "cpu/kernels/kernels.h"
#include "machine.h"

namespace attncore {

struct Section {
  Sequence sequence;
  Index kv_head = 0, kv_heads = 1;  // the first, and how many have it; one if it is shared, or in a gang
  Range rows;                       // in the order of Task
  Index tile_rows = 0;              // rows of a row tile
  Index tiles = 1;                  // row tiles
  bool shared = false, alone = false;
  Index parts = 1;       // split: parts of the keys
  Index gang_parts = 0;  // split: the first of them, which gangs run
  Index part_keys = 0;   // split: keys of a part; shared: keys of a super-block
  Range keys;            // what any row sees, from a multiple of part_keys on
  // The first head's number among the sections whose state waits (in slot number % state_slots), or −1.
  Index state_slot = -1;
  // Shared: among the row tiles of all such sections with state, whose progress is counted.
  Index first_tile = 0;

  /// Of its state: row tiles, or parts.
  [[nodiscard]] Index states() const noexcept { return shared ? tiles : parts; }
  [[nodiscard]] Range tile(Index i) const noexcept {
    return {rows.begin + i * tile_rows, min(rows.begin + (i + 1) * tile_rows, rows.end)};
  }
  /// Its row tiles meet keys that are packed once for all of them.
  [[nodiscard]] bool packs_once() const noexcept { return alone && tiles > 1; }
  /// Tasks of a head: row tiles (of one super-block), or the parts that no gang runs.
  [[nodiscard]] Index tasks_of_head() const noexcept { return shared ? tiles : parts - gang_parts; }
  /// The section of head kv_head + i only.
  [[nodiscard]] Section of_head(Index i) const noexcept {
    Section one = *this;
    one.kv_head += i;
    one.kv_heads = 1;
    if (state_slot >= 0) one.state_slot += i;
    return one;
  }
};

/// Sections that read part `part` of their keys together: sequences with the same pages, or KV heads whose tokens lie side by side.
struct Gang {
  Index part = 0;
  std::vector<Index> sections;
  bool heads = false;
};

struct Batch {
  Index section = 0;
  Index sections = 1;    // alone: from that one on, all heads of each
  Index run = 1;         // alone: of their heads, one after another, so many are a task
  Index gang = -1;       // this gang's task
  Range keys;            // shared: of the super-block
  Index block = -1;      // shared: number of the super-block, over all sections
  bool packs = false;    // packs the key tiles of its super-block
  Index first_task = 0;  // number of its first task; the next batch's is where it ends
};

struct Plan {
  const Kernels* kernels = nullptr;
  std::vector<Section> sections;
  std::vector<Gang> gangs;  // in the order of their first sections
  std::vector<Batch> batches;
  Index tasks = 0;
  int threads = 1;

  Index blocks = 0;        // super-blocks
  Index block_slots = 0;   // of them in memory at a time
  Index block_bytes = 0;   // of one slot
  Index state_slots = 0;   // sections with state in memory at a time: those of a gang, at least
  Index state_bytes = 0;   // of one slot
  Index states = 0;        // sections with state, of each head
  Index state_tiles = 0;   // row tiles of the shared ones
  Sizes task{};            // of the largest row tile
  Index thread_bytes = 0;  // a thread's own: state, scratch, panels of a tile or of a section that is alone
  Index workspace_bytes = 0;

  double flops = 0, bytes = 0;  // of the visible tiles; of the operands

  [[nodiscard]] const Section& section(Index number) const noexcept {
    return sections[static_cast<std::size_t>(number)];
  }
  [[nodiscard]] const Batch& batch_of(Index number) const noexcept;
  /// Whether tasks wait for others: then they must be claimed in their order.
  [[nodiscard]] bool waits() const noexcept { return blocks > 0 || states > state_slots; }
};

[[nodiscard]] Plan make_plan(const Call& call, const Kernels& kernels, const Machine& machine);

}  // namespace attncore
