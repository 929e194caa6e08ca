#include "plan.h"

#include <algorithm>

#include "mask_notes.h"
#include "plan_order.h"
#include "plan_sizes.h"
#include "prefix.h"
#include "score/steps.h"
#include "work.h"

namespace attncore {
namespace {

constexpr Index kTaskBytes = 256 << 10;  // of the scratch of a task of several KV heads, at most
constexpr Index kAloneSections = 8;      // of a thread, at least, so that all end at about the same time
constexpr Index kTasksOfThread = 4;      // where tasks take several KV heads, at least
constexpr Index kBlockSlots = 3;         // in use, being packed, still read by a late thread
constexpr double kThreadFlops = 1e6;     // work that is worth another thread: some 10 µs
constexpr double kThreadBytes = 256 << 10;
constexpr double kHeadsBytes = 4 << 20;  // of the operands, at least, where tasks take several KV heads

class Planner {
 public:
  Planner(const Call& call, const Kernels& kernels, const Machine& machine)
      : call_(call), kernels_(kernels), machine_(machine), sizes_(call, kernels) {}

  Plan make() {
    measure();
    plan_.sections.reserve(static_cast<std::size_t>(call_.batch));
    if (call_.pages.given()) {
      for (const PrefixGroup& group :
           prefix_groups(call_.pages, longest_first(call_), most_members(),
                         [this](const Sequence& s) { return shared_part_keys(s); }))
        add_group(group);
    } else {
      for (const Sequence& sequence : longest_first(call_)) add_sequence(sequence);
    }
    order_batches(plan_);
    size();
    return std::move(plan_);
  }

 private:
  /// So many sequences' states may wait at a time.
  [[nodiscard]] std::size_t most_members() const {
    const Index rows = max(1, min(kSplitRows, call_.queries * call_.group));
    const Index parts = max(1, min(sizes_.most_parts, ceil_div(call_.keys, kPartKeys)));
    const Index bytes = parts * kernels_.sizes(call_, rows).state;
    return static_cast<std::size_t>(max(2, plan_.threads * kStateBytes / bytes));
  }

  /// Keys of the parts that a sequence may share, which count from its first key; 0: none (rows of several tiles, or a first part that
  /// windows or segments hide).
  [[nodiscard]] Index shared_part_keys(const Sequence& sequence) const {
    const Index rows = sequence.queries * call_.group, part_keys = sizes_.part_keys(sequence);
    const bool one_tile = rows > 0 && rows <= min(kSplitRows, sizes_.tile_rows);
    if (!one_tile || call_.score.left != kUnbounded) return 0;
    const Range seen = ScoreSteps::visible(call_, block_of(call_, sequence, 0, {0, rows}));
    return seen.begin < part_keys ? part_keys : 0;
  }

  /// KV head 0's sections stand for all KV heads; shared ones are copied.
  void add_sequence(const Sequence& sequence) {
    if (heads_beside_) {
      if (const Index heads = heads_together(sequence); heads > 1) return add_heads(sequence, heads);
    }
    const std::size_t begin = plan_.sections.size();
    add_sequence(sequence, 0, call_.kv_heads);
    const std::size_t end = plan_.sections.size();
    for (Index kv_head = 1; kv_head < call_.kv_heads; ++kv_head) {
      for (std::size_t i = begin; i < end; ++i) {
        if (!plan_.sections[i].shared) continue;
        Section& section = plan_.sections.emplace_back(plan_.sections[i]);
        section.kv_head = kv_head;
        if (section.state_slot >= 0) keep_state(section);
      }
    }
  }

  void add_sequence(const Sequence& sequence, Index kv_head, Index kv_heads) {
    const Index rows = sequence.queries * call_.group, end = sequence.query_place.tokens * call_.group;
    Section section{.sequence = sequence, .kv_head = kv_head, .kv_heads = kv_heads};
    add_rows(section, {0, rows});
    section.sequence.keys = 0;  // rows past the query's length, as if there were no keys: 0 is written
    add_rows(section, {rows, end});
  }

  /// How many KV heads are one task where those of a token lie beside each other, so that memory is read in its order: few rows, for whose
  /// states and scratch there is room.
  [[nodiscard]] Index heads_together(const Sequence& sequence) const {
    const Index rows = sequence.queries * call_.group;
    if (rows == 0 || rows > sizes_.tile_rows || !kernels_.reads_in_place(call_, sequence)) return 1;
    const Index parts = ceil_div(sequence.keys, sizes_.part_keys(sequence));
    const Sizes sizes = kernels_.sizes(call_, rows);
    const Index states = plan_.threads * kStateBytes / max(1, parts * sizes.state);
    const Index tasks = call_.batch * parts * call_.kv_heads / (kTasksOfThread * plan_.threads);
    const Index most = min(kMostGangHeads, (kTaskBytes - sizes.state) / sizes.scratch);
    const Index heads = max(1, min(call_.kv_heads, min(most, min(states, tasks))));
    return ceil_div(call_.kv_heads, ceil_div(call_.kv_heads, heads));
  }

  void add_heads(const Sequence& sequence, Index heads) {
    for (Index first = 0; first < call_.kv_heads; first += heads) {
      std::vector<Index> sections;
      SharedPart part{.part = 0, .members = {}};
      for (Index kv_head = first; kv_head < min(first + heads, call_.kv_heads); ++kv_head) {
        part.members.push_back(sections.size());
        sections.push_back(static_cast<Index>(plan_.sections.size()));
        add_sequence(sequence, kv_head, 1);
        Section& added = plan_.sections[static_cast<std::size_t>(sections.back())];
        if (added.state_slot < 0 && !added.keys.empty()) keep_state(added);  // of one part: a gang's too
      }
      const Section& section = plan_.sections[static_cast<std::size_t>(sections[0])];
      for (const Index parts = section.parts; part.part < parts; ++part.part) add_gang(part, sections, true);
      most_states_ = max(most_states_, heads);
      const Index scratch = kernels_.sizes(call_, section.rows.size()).scratch;
      gang_scratch_ = max(gang_scratch_, heads * scratch);
    }
  }

  void add_group(const PrefixGroup& group) {
    if (group.parts.empty()) return add_sequence(group.sequences[0]);
    const Index first_state = plan_.states;
    for (Index kv_head = 0; kv_head < call_.kv_heads; ++kv_head) {
      std::vector<Index> sections;
      for (const Sequence& sequence : group.sequences) {
        sections.push_back(static_cast<Index>(plan_.sections.size()));
        add_sequence(sequence, kv_head, 1);
      }
      for (const SharedPart& part : group.parts) add_gang(part, sections);
      if (kv_head == 0) most_states_ = max(most_states_, plan_.states - first_state);
    }
    constexpr Index kRounding =
        128;  // bytes: what a member's scratch has more where its rows are not the mean
    const Index scratch = kernels_.sizes(call_, kernels_.gang_rows / kMostGangTasks).gang + kRounding;
    gang_scratch_ = max(gang_scratch_, kMostGangTasks * scratch);
  }

  void add_gang(const SharedPart& shared, const std::vector<Index>& sections, bool heads = false) {
    Gang gang{.part = shared.part, .sections = {}, .heads = heads};
    for (const std::size_t member : shared.members) {
      Section& section = plan_.sections[static_cast<std::size_t>(sections[member])];
      if (section.gang_parts != shared.part || shared.part >= section.parts || section.state_slot < 0)
        continue;
      ++section.gang_parts;
      gang.sections.push_back(sections[member]);
    }
    if (!gang.sections.empty()) plan_.gangs.push_back(std::move(gang));
  }

  /// Work, and from it the threads.
  void measure() {
    const Work work = work_of(call_);
    plan_.flops = work.flops;
    plan_.bytes = work.bytes;
    const double worth = std::max(plan_.flops / kThreadFlops, plan_.bytes / kThreadBytes);
    plan_.threads = std::clamp(static_cast<int>(std::min(worth, 1e6)), 1, machine_.threads);
    const auto beside = [](const Tensor& t) {
      return t.stride[1] > 0 && t.shape[1] * t.stride[1] <= t.stride[2];
    };
    heads_beside_ = plan_.bytes >= kHeadsBytes && beside(call_.key) && beside(call_.value);
  }

  void add_rows(Section section, Range rows) {
    if (rows.empty()) return;
    section.rows = rows;
    const Sequence& sequence = section.sequence;
    const bool few = rows.size() <= kSplitRows;
    Index tiles = ceil_div(rows.size(), sizes_.tile_rows);
    if (!few && plan_.threads > 1) {  // short of tiles for the threads: smaller ones
      const Index wanted = ceil_div(4 * Index{plan_.threads}, call_.batch * call_.kv_heads);
      tiles = max(tiles, min(wanted, ceil_div(rows.size(), 4 * kernels_.row_block)));
    }
    section.tile_rows = round_up(ceil_div(rows.size(), tiles), kernels_.row_block);
    section.tiles = ceil_div(rows.size(), section.tile_rows);
    section.shared = !few && section.tiles > 1;
    section.part_keys = few              ? sizes_.part_keys(sequence)
                        : section.shared ? sizes_.block_keys
                                         : max(1, sequence.keys);
    if (section.shared) {
      add_shared(section);
    } else {
      for (Index tile = 0; tile < section.tiles; ++tile) add_split(section, section.tile(tile));
    }
  }

  [[nodiscard]] Range visible(const Section& section) const {
    const Range seen =
        ScoreSteps::visible(call_, block_of(call_, section.sequence, section.kv_head, section.rows));
    if (seen.empty()) return {0, 0};
    return {seen.begin - seen.begin % section.part_keys, seen.end};
  }

  void add_split(const Section& whole, Range rows) {
    Section& section = plan_.sections.emplace_back(whole);
    section.rows = rows;
    section.tiles = 1;
    section.shared = false;
    section.keys = visible(section);
    section.parts = max(1, ceil_div(section.keys.size(), section.part_keys));
    if (section.parts > 1) keep_state(section);
    section.alone = section.parts == 1 && sizes_.is_short(section.keys.size()) && may_be_alone(section);
  }
  /// One for all heads, of many.
  [[nodiscard]] bool may_be_alone(const Section& section) const {
    return section.kv_heads == call_.kv_heads &&
           call_.batch * call_.kv_heads >= kAloneSections * plan_.threads;
  }

  void add_shared(Section section) {
    const Range all = section.rows;
    const Index tile_bytes = kernels_.sizes(call_, section.tile_rows).state;
    const Index most_tiles = max(1, plan_.threads * kStateBytes / 2 / tile_bytes);
    // State waits from one super-block to the next, so that rows are bounded where there are several.
    const Index keys = visible(section).size();
    if (sizes_.panels_fit(keys, plan_.threads) && may_be_alone(section)) return add_alone(section);
    const bool waits = keys > section.part_keys;
    const Index most_rows = waits ? most_tiles * section.tile_rows : all.size();
    for (Index begin = all.begin; begin < all.end; begin = section.rows.end) {
      section.rows = {begin, min(begin + most_rows, all.end)};
      section.keys = visible(section);
      section.tiles = ceil_div(section.rows.size(), section.tile_rows);
      section.state_slot = -1;
      if (section.keys.empty()) {  // nothing to share; a block that nobody packs would let its slot go early
        for (Index tile = 0; tile < section.tiles; ++tile) add_split(section, section.tile(tile));
        continue;
      }
      Section& added = plan_.sections.emplace_back(section);
      added.kv_heads = 1;
      if (section.keys.size() > section.part_keys) keep_state(added);
    }
  }

  void add_alone(Section section) {
    section.shared = false;
    section.alone = true;
    section.keys = visible(section);
    plan_.sections.push_back(section);
  }

  void keep_state(Section& section) {
    section.state_slot = plan_.states;
    plan_.states += section.kv_heads;
    if (section.shared) {
      section.first_tile = plan_.state_tiles;
      plan_.state_tiles += section.tiles;
    }
    const Index bytes = kernels_.sizes(call_, min(section.tile_rows, section.rows.size())).state;
    plan_.state_bytes = max(plan_.state_bytes, section.states() * bytes);
  }

  void size() {
    Index most_rows = 0, panels = 0;
    for (const Section& s : plan_.sections) {
      most_rows = max(most_rows, min(s.tile_rows, s.rows.size()));
      if (!s.shared) panels = max(panels, s.packs_once() ? ceil_div(s.keys.size(), kernels_.key_tile) : 1);
    }
    plan_.task = kernels_.sizes(call_, most_rows);
    plan_.task.scratch = max(plan_.task.scratch, gang_scratch_);
    plan_.threads = static_cast<int>(min(plan_.threads, max(1, plan_.tasks)));
    plan_.block_slots = min(plan_.blocks, kBlockSlots);
    plan_.block_bytes = sizes_.block_keys / kernels_.key_tile * plan_.task.panel;
    const Index slots = max(2, plan_.threads * kStateBytes / max(1, plan_.state_bytes));
    plan_.state_slots = min(plan_.states, max(most_states_, plan_.threads > 1 ? slots : 1));
    plan_.thread_bytes = plan_.task.state + plan_.task.scratch + panels * plan_.task.panel;
    const Index counters = 2 * plan_.blocks + plan_.states + plan_.state_tiles + 1;
    const Index notes = MaskNotes(call_, plan_.sections, kernels_.key_tile).bytes();
    plan_.workspace_bytes = plan_.threads * plan_.thread_bytes + plan_.block_slots * plan_.block_bytes +
                            plan_.state_slots * plan_.state_bytes + notes +
                            round_up(counters * Index{sizeof(std::int32_t)}, 64);
  }

  const Call& call_;
  const Kernels& kernels_;
  const Machine& machine_;
  const PlanSizes sizes_;
  bool heads_beside_ = false;  // and worth it
  Index most_states_ = 1;      // of a gang's sections
  Index gang_scratch_ = 0;     // of all tasks of a gang
  Plan plan_{.kernels = &kernels_};
};

}  // namespace

Plan make_plan(const Call& call, const Kernels& kernels, const Machine& machine) {
  return Planner(call, kernels, machine).make();
}

}  // namespace attncore
