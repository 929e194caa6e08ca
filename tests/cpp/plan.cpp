// What every plan must be, over many random calls: all rows meet all their keys once, nothing waits for what
// is claimed later, the splits of keys depend on the sequence alone, and memory is bounded.
#include "plan.h"

#include <algorithm>

#include "check.h"
#include "cpu/dispatch.h"
#include "plan_case.h"

namespace {

using namespace attncore;

/// The keys that a row sees, from the definition.
Range visible(const Call& call, const Sequence& sequence, Index query) {
  if (query >= sequence.queries) return {0, 0};
  const Index position = query + sequence.offset;
  const Index first = call.score.left == kUnbounded ? 0 : max(0, position - call.score.left);
  const Index last = call.score.right == kUnbounded ? sequence.keys - 1
                                                    : min(sequence.keys - 1, position + call.score.right);
  return {first, last + 1};
}

class Check {
 public:
  Check(const Call& call, const Plan& plan, int threads) : call_(call), plan_(plan), kernels_(*plan.kernels) {
    CHECK(plan.threads >= 1 && plan.threads <= threads && plan.threads <= max(1, plan.tasks));
    rows();
    gangs();
    batches();
    order();
    memory();
  }

 private:
  [[nodiscard]] const Section& section(const Batch& batch) const {
    return plan_.sections[static_cast<std::size_t>(batch.section)];
  }

  /// Each row stands in one tile of one section, whose keys hold all that it sees.
  void rows() {
    const Index of_head = call_.queries * call_.group;
    std::vector<int> met(static_cast<std::size_t>(call_.batch * call_.kv_heads * of_head));
    for (const Section& s : plan_.sections) {
      const Sequence sequence = call_.sequence(s.sequence.batch);
      CHECK(s.kv_heads >= 1 && s.kv_head + s.kv_heads <= call_.kv_heads && (s.kv_heads == 1 || !s.shared));
      CHECK(s.tiles >= 1 && s.tile_rows >= 1 && s.parts >= 1 && s.part_keys >= 1);
      CHECK(s.keys.begin >= 0 && s.keys.end <= s.sequence.keys);
      CHECK(s.keys.begin % kernels_.key_tile == 0);
      CHECK(s.tile(0).begin == s.rows.begin && s.tile(s.tiles - 1).end == s.rows.end);
      for (Index tile = 0; tile < s.tiles; ++tile) {
        CHECK(!s.tile(tile).empty());
        for (Index r = s.tile(tile).begin; r < s.tile(tile).end; ++r) {
          for (Index head = s.kv_head; head < s.kv_head + s.kv_heads; ++head)
            ++met[static_cast<std::size_t>((s.sequence.batch * call_.kv_heads + head) * of_head + r)];
          const Range keys = visible(call_, sequence, r / call_.group);
          CHECK(keys.empty() || (s.keys.begin <= keys.begin && keys.end <= s.keys.end));
        }
      }
    }
    CHECK(std::all_of(met.begin(), met.end(), [](int times) { return times == 1; }));
  }

  /// A gang is KV heads one after another, all of whose parts it runs.
  void gangs() {
    std::vector<Index> met(plan_.sections.size());
    for (const Gang& gang : plan_.gangs) {
      const Section& first = plan_.sections[static_cast<std::size_t>(gang.sections[0])];
      const Sizes sizes = kernels_.sizes(call_, first.rows.size());
      const auto count = static_cast<Index>(gang.sections.size());
      CHECK(gang.heads && count <= kMostGangHeads && count <= plan_.state_slots);
      CHECK(count * sizes.scratch <= plan_.task.scratch);
      for (Index i = 0; i < count; ++i) {
        const Index number = gang.sections[static_cast<std::size_t>(i)];
        const Section& s = plan_.sections[static_cast<std::size_t>(number)];
        CHECK(s.kv_head == first.kv_head + i && s.kv_heads == 1 && s.sequence.batch == first.sequence.batch);
        CHECK(s.keys.begin == first.keys.begin && s.keys.end == first.keys.end && s.parts == first.parts);
        CHECK(s.state_slot == first.state_slot + i && s.gang_parts == s.parts);
        CHECK(met[static_cast<std::size_t>(number)]++ == gang.part);
      }
    }
    for (std::size_t i = 0; i < met.size(); ++i) CHECK(met[i] == plan_.sections[i].gang_parts);
  }

  /// The batches of a section cut its keys into pieces without a gap, at multiples of the key tile.
  void batches() {
    std::vector<Index> next(plan_.sections.size(), -1);
    Index tasks = 0;
    for (const Batch& batch : plan_.batches) {
      CHECK(batch.first_task == tasks);
      const Section& s = section(batch);
      if (batch.packs) {
        tasks += ceil_div(batch.keys.size(), kernels_.key_tile);
        continue;
      }
      if (batch.gang >= 0) {
        ++tasks;
        continue;
      }
      if (s.alone) {
        tasks += alone_tasks(batch, next);
        continue;
      }
      CHECK(batch.sections == 1 && batch.run == 1);
      tasks += s.kv_heads * (s.shared ? s.tiles : s.parts);
      Index& at = next[static_cast<std::size_t>(batch.section)];
      if (s.shared) {
        CHECK(batch.keys.begin == (at < 0 ? s.keys.begin : at) && batch.keys.begin % kernels_.key_tile == 0);
        at = batch.keys.end;
      } else {
        CHECK(at < 0 && s.tiles == 1);
        CHECK(s.parts == 1 || s.part_keys % kernels_.key_tile == 0);
        CHECK((s.parts - 1) * s.part_keys <= s.keys.size() && s.keys.size() <= s.parts * s.part_keys);
        at = s.keys.end;
      }
    }
    CHECK(tasks == plan_.tasks);
    for (std::size_t i = 0; i < next.size(); ++i)
      CHECK(next[i] == (plan_.sections[i].gang_parts > 0 ? -1 : plan_.sections[i].keys.end));
  }

  /// All heads of sections one after another, batch.run of them a task: several, if there are enough tasks for all threads.
  Index alone_tasks(const Batch& batch, std::vector<Index>& next) {
    for (Index i = batch.section; i < batch.section + batch.sections; ++i) {
      const Section& s = plan_.sections[static_cast<std::size_t>(i)];
      Index& at = next[static_cast<std::size_t>(i)];
      CHECK(s.alone && s.kv_head == 0 && s.kv_heads == call_.kv_heads && at < 0);
      at = s.keys.end;
    }
    const Index heads = batch.sections * call_.kv_heads;
    CHECK(batch.sections >= 1 && batch.run >= 1);
    CHECK(batch.run == 1 || heads >= 16 * plan_.threads * batch.run);
    return ceil_div(heads, batch.run);
  }

  /// Tasks wait for what was claimed before them only: packing for the last use of its slot, use for packing,
  /// a section's first tasks for the section that had its memory.
  void order() {
    const auto count = static_cast<std::size_t>(plan_.blocks);
    std::vector<int> packed(count), used(count);
    Index ran = 0;  // sections with state that were claimed
    for (const Batch& batch : plan_.batches) {
      const auto block = static_cast<std::size_t>(batch.block);
      if (batch.packs) {
        CHECK(batch.block >= 0 && batch.block < plan_.blocks);
        CHECK(batch.block < plan_.block_slots ||
              used[block - static_cast<std::size_t>(plan_.block_slots)] == 1);
        CHECK(packed[block]++ == 0);
        CHECK(batch.keys.size() <= plan_.block_bytes / plan_.task.panel * kernels_.key_tile);
      } else if (section(batch).shared) {
        CHECK(packed[block] == 1 || batch.keys.empty());
        CHECK(used[block]++ == 0);
      }
      const Index slot = batch.packs ? -1 : section(batch).state_slot;
      if (batch.gang >= 0) {
        const Gang& gang = plan_.gangs[static_cast<std::size_t>(batch.gang)];
        const auto count = static_cast<Index>(gang.sections.size());
        CHECK(slot == (gang.part == 0 ? ran : ran - count));
        ran = slot + count;
      } else if (slot >= 0) {
        CHECK(slot == ran || (slot == ran - 1 && section(batch).shared));
        ran = slot + section(batch).kv_heads;
      }
    }
    CHECK(ran == plan_.states);
    CHECK(std::all_of(used.begin(), used.end(), [](int times) { return times == 1; }));
    CHECK((plan_.states == 0) == (plan_.state_slots == 0) && (plan_.blocks == 0) == (plan_.block_slots == 0));
  }

  void memory() {
    Index tiles = 0;
    for (const Section& s : plan_.sections) {
      for (const Index rows : {s.tile(0).size(), s.tile(s.tiles - 1).size()}) {
        const Sizes sizes = kernels_.sizes(call_, rows);
        CHECK(sizes.scratch <= plan_.task.scratch && sizes.state <= plan_.task.state &&
              sizes.panel == plan_.task.panel);
      }
      if (s.shared) CHECK(s.state_slot >= 0 || s.keys.size() <= s.part_keys);
      if (!s.shared) CHECK(s.state_slot >= 0 || s.parts == 1);
      if (s.state_slot < 0) continue;
      if (s.shared) CHECK(s.first_tile == tiles);
      if (s.shared) tiles += s.tiles;
      const Index state = kernels_.sizes(call_, min(s.tile_rows, s.rows.size())).state;
      CHECK((s.shared ? s.tiles : s.parts) * state <= plan_.state_bytes);
    }
    CHECK(tiles == plan_.state_tiles);
    const Index thread = plan_.thread_bytes;
    CHECK(thread >= plan_.task.scratch + plan_.task.state);
    for (const Section& s : plan_.sections) {
      const Index panels = s.packs_once() ? ceil_div(s.keys.size(), kernels_.key_tile) : s.shared ? 0 : 1;
      CHECK(thread >= plan_.task.scratch + plan_.task.state + panels * plan_.task.panel);
      if (s.alone) CHECK(!s.shared && s.parts == 1 && s.keys.size() <= s.part_keys);
    }
    const Index counters = 4 * (2 * plan_.blocks + plan_.states + plan_.state_tiles);
    const Index blocks = plan_.block_slots * plan_.block_bytes,
                states = plan_.state_slots * plan_.state_bytes;
    CHECK(plan_.workspace_bytes >= plan_.threads * thread + blocks + states + counters);
    for (const Index part :
         {plan_.task.scratch, plan_.task.panel, plan_.task.state, plan_.block_bytes, plan_.state_bytes}) {
      CHECK(part % 64 == 0);
    }
    // The contract of memory.
    if (call_.dim > 256 || call_.value_dim > 256) return;
    CHECK(blocks <= Index{32} << 20);
    CHECK(plan_.task.scratch + plan_.task.state <= Index{256} << 10);
    CHECK(states <= plan_.threads * (Index{2} << 20));
    CHECK(plan_.workspace_bytes - counters - 64 <=
          plan_.threads * (Index{256 + 2048} << 10) + (Index{32} << 20));
  }

  const Call& call_;
  const Plan& plan_;
  const Kernels& kernels_;
};

/// The parts of a batch entry's keys, which its bits depend on: rows, keys and size of each section that is
/// split, in the order of heads.
std::vector<std::array<Index, 7>> splits(const Plan& plan, Index entry) {
  std::vector<std::array<Index, 7>> list;
  for (const Section& s : plan.sections) {
    if (s.sequence.batch != entry || s.parts == 1) continue;
    for (Index head = s.kv_head; head < s.kv_head + s.kv_heads; ++head)
      list.push_back({head, s.rows.begin, s.rows.end, s.keys.begin, s.keys.end, s.parts, s.part_keys});
  }
  std::sort(list.begin(), list.end());
  return list;
}

void check(const Given& given, const IsaTable& table) {
  const Call call = given.call();
  const Kernels& kernels = table.kernels(call.compute());
  const Plan alone = make_plan(call, kernels, Machine{1});
  for (const int threads : {1, 2, 3, 64}) {
    const int before = failures;
    const Plan plan = make_plan(call, kernels, Machine{threads});
    Check(call, plan, threads);
    for (Index entry = 0; entry < call.batch; ++entry) CHECK(splits(plan, entry) == splits(alone, entry));
    if (failures == before || failures > 20) continue;
    std::printf("  %s, %d threads:\n", table.name, threads);
    given.print();
  }
  for (Index entry = 0; entry < call.batch; ++entry) {
    const Call one = given.call(entry, 1);
    CHECK(splits(make_plan(one, kernels, Machine{2}), 0) == splits(alone, entry));
  }
}

}  // namespace

int main() {
  Random random;
  for (int repeat = 0; repeat < 300; ++repeat) {
    const Given given = repeat == 0 ? Given::of_most_parts(random) : Given(random);
    for (const IsaTable* table : available_tables()) check(given, *table);
  }
  return finish();
}
