#include "estimate.h"

#include <algorithm>
#include <memory>

#include "parallel.h"
#include "score/steps.h"
#include "stopwatch.h"

namespace attncore {
namespace {

constexpr Index kTimedTiles = 4;          // key tiles that a timed row tile meets: they stay in the caches
constexpr double kTimedSeconds = 0.5e-3;  // of a measurement, if three tries do not take longer

/// The median of some tries; run(number of the try).
template <class Run>
double typical_time(Run run) {
  std::vector<double> tries;
  for (double spent = 0; tries.size() < 3 || spent < kTimedSeconds; spent += tries.back()) {
    const Stopwatch watch;
    run(tries.size());
    tries.push_back(std::max(watch.seconds(), 1e-8));
  }
  std::nth_element(tries.begin(), tries.begin() + static_cast<std::ptrdiff_t>(tries.size() / 2), tries.end());
  return tries[tries.size() / 2];
}

/// Seconds.
struct Costs {
  double key = 0;   // to pack a key
  double row = 0;   // to begin a row and to end it
  double pair = 0;  // a row's with a key
};

/// From the beginning of a key tile on.
Range seen_by(const Call& call, const Plan& plan, const Section& section, Range rows) noexcept {
  const Range seen = intersect(
      section.keys, ScoreSteps::visible(call, block_of(call, section.sequence, section.kv_head, rows)));
  if (seen.empty()) return {0, 0};
  return {seen.begin - seen.begin % plan.kernels->key_tile, seen.end};
}

using Sections = std::vector<const Section*>;

/// A call's tasks, on one thread's memory.  Tries go from one section to the next, so that caches hold of its operands what
/// they would in the call.
class Timer {
 public:
  Timer(const Call& call, const Plan& plan, std::size_t first)
      : call_(call),
        plan_(plan),
        first_(first),
        line_(static_cast<std::size_t>(call.value_dim * item_size(call.out.dtype))) {
    call_.out.data = line_.data();  // of every row
    call_.out.stride = {0, 0, 0, item_size(call.out.dtype)};
    call_.lse = call_.sum = {};
    const Index own = plan.task.state + plan.task.scratch;
    state_ = workspace_.reserve(static_cast<std::size_t>(own + kTimedTiles * plan.task.panel));
    scratch_ = state_ + plan.task.state;
    panels_ = state_ + own;
  }

  /// Rows in the middle of the sections, which are alike, against key tiles in the middle of what they see.
  Costs measure(const Sections& sections) {
    const Section& section = *sections[0];
    const Range rows = section.shared ? section.tile(section.tiles / 2) : section.rows;
    const Range seen = seen_by(call_, plan_, section, rows);
    const Index tile = plan_.kernels->key_tile;
    const Index tiles = ceil_div(seen.size(), tile), timed = min(kTimedTiles, tiles);
    const Index first = seen.begin + (tiles - timed) / 2 * tile;
    const Range one{first, min(first + tile, seen.end)}, all{first, min(first + timed * tile, seen.end)};
    const auto count = static_cast<double>(rows.size());
    Costs costs;
    if (section.shared) costs.key = pack(sections, all) / static_cast<double>(max(1, all.size()));
    const double of_all = run(sections, rows, all) / count;
    if (timed < 2) {  // what is begun and ended for each row is in it
      (timed == 0 ? costs.row : costs.pair) = of_all / static_cast<double>(max(1, all.size()));
      return costs;
    }
    if (section.shared) pack(sections, one);
    const double of_one = run(sections, rows, one) / count;
    costs.pair = std::max(0.0, of_all - of_one) / static_cast<double>(all.size() - one.size());
    costs.row = std::max(0.0, of_one - costs.pair * static_cast<double>(one.size()));
    return costs;
  }

 private:
  [[nodiscard]] const Section& section_of(const Sections& sections, std::size_t attempt) const noexcept {
    return *sections[(first_ + attempt) % sections.size()];
  }

  double pack(const Sections& sections, Range keys) {
    const Index tile = plan_.kernels->key_tile;
    return typical_time([&](std::size_t attempt) {
      const Section& section = section_of(sections, attempt);
      for (Index key = keys.begin; key < keys.end; key += tile) {
        plan_.kernels->pack(call_, section.sequence, section.kv_head, {key, min(key + tile, keys.end)},
                            panels_ + (key - keys.begin) / tile * plan_.task.panel);
      }
    });
  }

  double run(const Sections& sections, Range rows, Range keys) {
    return typical_time([&](std::size_t attempt) {
      const Section& section = section_of(sections, attempt);
      const Task task{.sequence = section.sequence,
                      .kv_head = section.kv_head,
                      .rows = rows,
                      .keys = keys,
                      .state = state_,
                      .packed = section.shared ? panels_ : nullptr,
                      .reach = keys.end};
      plan_.kernels->forward(call_, task, scratch_);
    });
  }

  Call call_;
  const Plan& plan_;
  std::size_t first_;
  std::vector<std::byte> line_;
  Workspace workspace_;
  std::byte *state_, *scratch_, *panels_;
};

class Estimator {
 public:
  Estimator(const Call& call, const Plan& plan) : call_(call), plan_(plan) {
    for (int thread = 0; thread < plan.threads; ++thread)
      timers_.push_back(std::make_unique<Timer>(call, plan, static_cast<std::size_t>(thread)));
  }

  double seconds() {
    double total = 0;
    for (const bool shared : {true, false}) {
      const Sections timed = largest(shared);
      if (timed.empty()) continue;
      const Costs costs = measure(timed);
      for (const Section& section : plan_.sections) {
        if (section.shared == shared) total += seconds_of(section, costs);
      }
    }
    const Index rounds =
        ceil_div(plan_.tasks, plan_.threads);  // of tasks: the last one may leave threads without any
    return total * static_cast<double>(rounds) / static_cast<double>(max(1, plan_.tasks));
  }

 private:
  /// All that are as large as the largest, and alike.
  [[nodiscard]] Sections largest(bool shared) const {
    Sections found;
    for (const Section& section : plan_.sections) {
      if (section.shared != shared) continue;
      if (!found.empty() && pairs(section) > pairs(*found[0])) found.clear();
      if (found.empty() || are_alike(section, *found[0])) found.push_back(&section);
    }
    return found;
  }
  static bool are_alike(const Section& a, const Section& b) noexcept {
    return a.rows.begin == b.rows.begin && a.rows.end == b.rows.end && a.keys.begin == b.keys.begin &&
           a.keys.end == b.keys.end && a.sequence.offset == b.sequence.offset;
  }
  static double pairs(const Section& section) noexcept {
    return static_cast<double>(section.rows.size()) * static_cast<double>(section.keys.size());
  }

  /// All threads at once, as they share caches, memory and perhaps cores: the mean of what they see.
  Costs measure(const Sections& sections) {
    std::vector<Costs> costs(timers_.size());
    parallel(plan_.threads, [&](int thread) {
      const auto at = static_cast<std::size_t>(thread);
      costs[at] = timers_[at]->measure(sections);
    });
    Costs mean;
    for (const Costs& one : costs) {
      const auto share = 1 / static_cast<double>(costs.size());
      mean.key += one.key * share;
      mean.row += one.row * share;
      mean.pair += one.pair * share;
    }
    return mean;
  }

  [[nodiscard]] double seconds_of(const Section& section, const Costs& costs) const noexcept {
    double seconds = costs.key * static_cast<double>(section.shared ? section.keys.size() : 0);
    for (Index i = 0; i < section.tiles; ++i) {
      const Range rows = section.shared ? section.tile(i) : section.rows;
      seconds += static_cast<double>(rows.size()) *
                 (costs.row * static_cast<double>(section.shared ? 1 : section.parts) +
                  costs.pair * static_cast<double>(seen_by(call_, plan_, section, rows).size()));
    }
    return seconds;
  }

  const Call& call_;
  const Plan& plan_;
  std::vector<std::unique_ptr<Timer>> timers_;
};

}  // namespace

double estimated_compute_seconds(const Call& call, const Plan& plan) {
  return plan.tasks > 0 ? Estimator(call, plan).seconds() : 0;
}

}  // namespace attncore
