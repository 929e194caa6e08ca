#include "forward_run.h"

#include <algorithm>
#include <cassert>

#include "../mask_notes.h"
#include "../score/steps.h"
#include "ahead.h"
#include "crew.h"
#include "gang_tile.h"
#include "memory.h"

namespace attncore {
namespace {

class ForwardRun {
 public:
  ForwardRun(const Call& call, const Plan& plan, const Options& options)
      : call_(call),
        plan_(plan),
        crew_(plan.threads, options),
        memory_(options, plan.workspace_bytes),
        notes_(call, plan.sections, plan.kernels->key_tile) {
    threads_ = memory_.take(plan.threads * plan.thread_bytes);
    blocks_ = memory_.take(plan.block_slots * plan.block_bytes);
    states_ = memory_.take(plan.state_slots * plan.state_bytes);
    notes_.place(memory_.take(notes_.bytes()));
    unpacked_ = reinterpret_cast<std::int32_t*>(memory_.take(0));
    unused_ = unpacked_ + plan.blocks;
    unfinished_ = unused_ + plan.blocks;
    progress_ = unfinished_ + plan.states;
    set_counters();
  }

  void run() {
    const auto run_one = [this](Index task, int thread) { run_task(task, thread); };
    plan_.waits() ? crew_.run(plan_.tasks, run_one) : crew_.run_shares(plan_.tasks, run_one);
  }

 private:
  [[nodiscard]] std::byte* own_state(int thread) const noexcept {
    return threads_ + thread * plan_.thread_bytes;
  }
  [[nodiscard]] std::byte* scratch(int thread) const noexcept { return own_state(thread) + plan_.task.state; }

  void set_counters() noexcept {
    for (const Batch& batch : plan_.batches) {
      if (batch.block < 0) continue;
      if (!batch.packs) unused_[batch.block] = static_cast<std::int32_t>(section(batch).tiles);
      unpacked_[batch.block] =
          static_cast<std::int32_t>(ceil_div(batch.keys.size(), plan_.kernels->key_tile));
    }
    for (const Section& section : plan_.sections) {
      if (section.state_slot < 0) continue;
      // Split keys: one more than the parts, for the merge.
      std::fill_n(unfinished_ + section.state_slot, section.kv_heads,
                  static_cast<std::int32_t>(section.shared ? section.tiles : section.parts + 1));
    }
    std::fill_n(progress_, plan_.state_tiles, 0);
  }

  [[nodiscard]] const Section& section(const Batch& batch) const noexcept {
    return plan_.section(batch.section);
  }

  void run_task(Index number, int thread) noexcept {
    const Batch& batch = plan_.batch_of(number);
    const Index item = number - batch.first_task;
    if (batch.packs) {
      pack(batch, item, thread);
    } else if (batch.gang >= 0) {
      run_gang(plan_.gangs[static_cast<std::size_t>(batch.gang)], thread);
    } else if (batch.block >= 0) {
      run_tile(batch, section(batch).tiles - 1 - item, thread);  // the last rows see most keys: longest first
    } else if (section(batch).alone) {
      run_alone(batch, item * batch.run, thread);
    } else {
      const Section& s = section(batch);
      run_part(s.of_head(item / s.tasks_of_head()), s.gang_parts + item % s.tasks_of_head(), thread);
    }
  }

  /// A task of sections that are alone, from `first` of their heads on.
  void run_alone(const Batch& batch, Index first, int thread) noexcept {
    const Index heads = section(batch).kv_heads, all = batch.sections * heads;
    const Index last = min(first + batch.run, all) - 1;
    const Index others = plan_.waits() ? (plan_.threads - 1) * batch.run : 0;  // claimed by others meanwhile
    const auto section_of = [&](Index i) {
      return plan_.section(batch.section + i / heads).of_head(i % heads);
    };
    Section s = section_of(first), next;
    for (Index i = first; i <= last; ++i, s = next) {
      const Index after = i < last ? i + 1 : i + 1 + others;
      if (after < all) next = section_of(after);
      run_tiles(s, after < all ? &next : nullptr, thread);
    }
  }

  /// All row tiles of a section's head; meanwhile the next one's operands are fetched.
  void run_tiles(const Section& s, const Section* next, int thread) noexcept {
    Task task{.sequence = s.sequence, .kv_head = s.kv_head, .keys = s.keys, .state = own_state(thread)};
    task.reach = s.keys.end;
    if (s.packs_once()) {
      std::byte* const panels = scratch(thread) + plan_.task.scratch;
      pack_tiles(s, s.keys, panels);
      task.packed = panels;
    }
    for (Index tile = 0; tile < s.tiles && !crew_.poll(thread); ++tile) {
      task.rows = s.tile(tile);
      task.notes = notes_.of(s, task.rows);
      if (s.packs_once() || plan_.kernels->reads_in_place(call_, s.sequence))
        task.ahead = ahead_of(call_, s, tile, next);
      plan_.kernels->forward(call_, task, scratch(thread));
    }
  }

  void pack_tiles(const Section& s, Range keys, std::byte* panels) const noexcept {
    const Index step = plan_.kernels->key_tile;
    for (Index key = keys.begin; key < keys.end; key += step, panels += plan_.task.panel)
      plan_.kernels->pack(call_, s.sequence, s.kv_head, {key, min(key + step, keys.end)}, panels);
  }

  // ---- shared super-blocks: empty (unpacked > 0) → packing → ready (unpacked = 0) → free (unused = 0) ----

  [[nodiscard]] std::byte* block(Index number) const noexcept {
    return blocks_ + number % plan_.block_slots * plan_.block_bytes;
  }

  void pack(const Batch& batch, Index piece, int thread) noexcept {
    const Index before = batch.block - plan_.block_slots;  // the super-block that had this slot
    const auto free = [&] {
      return Counter(unpacked_[before]).get() == 0 && Counter(unused_[before]).get() == 0;
    };
    if (before >= 0 && !crew_.wait(thread, free)) return;
    const Index key_tile = plan_.kernels->key_tile;
    const Index first = batch.keys.begin + piece * key_tile;
    pack_tiles(section(batch), {first, min(first + key_tile, batch.keys.end)},
               block(batch.block) + piece * plan_.task.panel);
    Counter(unpacked_[batch.block]).count_down();
  }

  void run_tile(const Batch& batch, Index tile, int thread) noexcept {
    const Section& s = section(batch);
    Task task{.sequence = s.sequence, .kv_head = s.kv_head, .rows = s.tile(tile), .keys = batch.keys};
    task.notes = notes_.of(s, task.rows);
    const Range seen =
        intersect(s.keys, ScoreSteps::visible(call_, block_of(call_, s.sequence, s.kv_head, task.rows)));
    // A tile that sees nothing writes its zeros with the section's first super-block.
    const bool sees_nothing = seen.empty();
    const bool begins_section = batch.keys.begin == s.keys.begin;
    task.first =
        sees_nothing ? begins_section : batch.keys.begin <= seen.begin && seen.begin < batch.keys.end;
    task.last = sees_nothing ? begins_section : batch.keys.begin < seen.end && seen.end <= batch.keys.end;
    const bool meets = task.first || task.last || (!sees_nothing && !intersect(seen, batch.keys).empty());
    if (meets && !run_ready_tile(batch, tile, task, thread)) return;
    Counter(unused_[batch.block]).count_down();
  }

  /// Runs the tile once its super-block is packed, and its rows' state is there.
  bool run_ready_tile(const Batch& batch, Index tile, Task& task, int thread) noexcept {
    const Section& s = section(batch);
    task.state = own_state(thread);
    if (s.state_slot >= 0) {
      task.state = state(s) + tile * plan_.kernels->sizes(call_, s.tile_rows).state;
      if (task.first ? !wait_for_slot(s, thread) : !wait_for_progress(s, tile, batch.block, thread))
        return false;
    }
    if (!crew_.wait(thread, [&] { return Counter(unpacked_[batch.block]).get() == 0; })) return false;
    task.packed = block(batch.block);
    plan_.kernels->forward(call_, task, scratch(thread));
    if (s.state_slot >= 0) {
      Counter(progress_[s.first_tile + tile]).set(batch.block + 1);
      if (task.last) Counter(unfinished_[s.state_slot]).count_down();
    }
    return true;
  }

  // ---- state that waits ----

  [[nodiscard]] std::byte* state(const Section& s) const noexcept {
    return states_ + s.state_slot % plan_.state_slots * plan_.state_bytes;
  }

  /// Until the section that had this slot is finished.
  bool wait_for_slot(const Section& s, int thread) noexcept {
    const Index before = s.state_slot - plan_.state_slots;
    return before < 0 || crew_.wait(thread, [&] { return Counter(unfinished_[before]).get() == 0; });
  }

  /// Until the row tile has met super-block `block` − 1.
  bool wait_for_progress(const Section& s, Index tile, Index block, int thread) noexcept {
    return crew_.wait(thread, [&] { return Counter(progress_[s.first_tile + tile]).get() == block; });
  }

  // ---- split keys ----

  void run_part(const Section& s, Index part, int thread) noexcept {
    Task task{.sequence = s.sequence, .kv_head = s.kv_head, .rows = s.rows, .state = own_state(thread)};
    task.notes = notes_.of(s, s.rows);
    const Index begin = s.keys.begin + part * s.part_keys;
    const Range seen = ScoreSteps::visible(call_, block_of(call_, s.sequence, s.kv_head, s.rows));
    const Index tile = plan_.kernels->key_tile;
    Range keys = intersect({begin, begin + s.part_keys}, {seen.begin - seen.begin % tile, seen.end});
    if (keys.empty()) keys = {begin, begin};
    if (s.state_slot >= 0) {
      if (!wait_for_slot(s, thread)) return;
      task.state = state(s) + part * plan_.kernels->sizes(call_, s.rows.size()).state;
    }
    task.reach = keys.end;
    const Index stretch = 32 * tile;  // keys between two looks for a cancellation
    for (Index key = keys.begin; key < keys.end || key == keys.begin; key += stretch) {
      task.keys = {key, min(key + stretch, keys.end)};
      task.first = key == keys.begin;
      task.loaded = !task.first;
      task.last = task.keys.end == keys.end && s.state_slot < 0;
      plan_.kernels->forward(call_, task, scratch(thread));
      if (crew_.poll(thread)) return;
    }
    if (s.state_slot >= 0) finish_part(s);
  }

  /// The last part to end merges all.
  void finish_part(const Section& s) noexcept {
    if (Counter(unfinished_[s.state_slot]).count_down() > 1) return;
    const Task task{.sequence = s.sequence, .kv_head = s.kv_head, .rows = s.rows, .state = state(s)};
    plan_.kernels->combine(call_, task, s.parts);
    Counter(unfinished_[s.state_slot]).count_down();
  }

  // ---- the same keys for several sequences: each tile of them meets all while it is in the cache ----

  void run_gang(const Gang& gang, int thread) noexcept {
    bool packs = false;
    Index seen = 0;  // by any of them, where the last one's end is
    for (const Index number : gang.sections) {
      const Section& s = plan_.section(number);
      if (!wait_for_slot(s, thread)) return;
      packs |= !plan_.kernels->reads_in_place(call_, s.sequence);
      seen = max(seen, s.keys.end);
    }
    const Section& first = plan_.section(gang.sections[0]);
    std::byte* const panel = packs ? scratch(thread) + plan_.task.scratch : nullptr;
    const Index begin = first.keys.begin + gang.part * first.part_keys;
    const Index end = min(begin + first.part_keys, seen);
    assert(begin < end);  // its first tile clears the state
    for (Index key = begin; key < end; key += plan_.kernels->key_tile) {
      const Range keys{key, min(key + plan_.kernels->key_tile, end)};
      if (packs) plan_.kernels->pack(call_, first.sequence, first.kv_head, keys, panel);
      run_gang_tile(gang, {begin, end}, keys, panel, thread);
      if (crew_.poll(thread)) return;
    }
    for (const Index number : gang.sections) finish_part(plan_.section(number));
  }

  [[nodiscard]] Task gang_task(const Gang& gang, const Section& s, Range part, Range keys) const noexcept {
    Task task{.sequence = s.sequence, .kv_head = s.kv_head, .rows = s.rows, .keys = keys};
    task.first = keys.begin == part.begin;
    task.last = false;
    task.state = state(s) + gang.part * plan_.kernels->sizes(call_, s.rows.size()).state;
    task.reach = part.end;
    return task;
  }

  void run_gang_tile(const Gang& gang, Range part, Range keys, const std::byte* panel, int thread) noexcept {
    GangTile tile(call_, *plan_.kernels, gang.heads, scratch(thread));
    for (const bool in_place : {false, true}) {  // in place last: they may copy keys to where the panel is
      for (const Index number : gang.sections) {
        const Section& s = plan_.section(number);
        if (plan_.kernels->reads_in_place(call_, s.sequence) != in_place) continue;
        Task task = gang_task(gang, s, part, keys);
        if (in_place) {
          tile.add(task);
          continue;
        }
        task.packed = panel;
        plan_.kernels->forward(call_, task, scratch(thread));
      }
    }
    tile.run();
  }

  const Call& call_;
  const Plan& plan_;
  Crew crew_;
  Memory memory_;
  MaskNotes notes_;
  std::byte *threads_, *blocks_, *states_;
  std::int32_t* unpacked_;    // by super-block: key tiles that are not packed yet
  std::int32_t* unused_;      // by super-block: row tiles that have not used it yet
  std::int32_t* unfinished_;  // by section with state: row tiles (parts) that are not done
  std::int32_t* progress_;    // by row tile with state: the super-block after the last one that it has seen
};

}  // namespace

void run_forward(const Call& call, const Plan& plan, const Options& options) {
  if (plan.tasks > 0) ForwardRun(call, plan, options).run();
}

}  // namespace attncore
