#include "estimate.h"

#include <algorithm>
#include <vector>

#include "cpu/gang_tile.h"
#include "score/steps.h"
#include "stopwatch.h"

namespace attncore {
namespace {

constexpr int kSamples = 12;
constexpr int kStride = 5;             // samples are timed in this order: some of them stand for all
constexpr double kBudget = 8e-3;       // seconds, after which no further sample begins
constexpr double kShortest = 2e-5;     // seconds: shorter runs are repeated
constexpr Index kSampleKeys = 1024;    // of a sample, at most
constexpr double kCachedBytes = 24e6;  // operands of more are not found in caches
constexpr int kFewest = 3;             // samples

/// A task that multiplies, or the beginning of one.
struct Piece {
  const Section* section = nullptr;
  Index kv_head = 0;
  Range rows, keys;
  bool packed = false;  // its keys are packed before
  Index heads = 1;      // of a gang of KV heads
};

double bytes_of(const Tensor& t) noexcept {
  if (!t.given()) return 0;
  auto bytes = static_cast<double>(item_size(t.dtype));
  for (std::size_t axis = 0; axis < t.shape.size(); ++axis) {
    if (t.stride[axis] != 0) bytes *= static_cast<double>(t.shape[axis]);
  }
  return bytes;
}

class Sampler {
 public:
  Sampler(const Call& call, const Plan& plan) : call_(call), plan_(plan), kernels_(*plan.kernels) {
    held_ = plan.bytes + bytes_of(call.score.mask);
    for (std::size_t i = 0; i < call.score.biases.size; ++i) held_ += bytes_of(call.score.biases.items[i]);
  }

  /// A piece is chosen with a probability in proportion to its size, so that the mean of (seconds / size), times all
  /// sizes, estimates the sum whatever pieces cost.
  Estimate run() {
    double largest = 0;
    each_piece([&](const Piece& piece) {
      total_ += size(piece);
      largest = std::max(largest, size(piece));
    });
    if (total_ == 0) return {};
    reserve();
    const std::vector<Piece> pieces = choose();
    const Stopwatch watch;
    double rates = 0, packing = 0;
    Index samples = 0, packed_keys = 0;
    measure(pieces[0]);  // memory and instructions are new to the first
    for (int i = 0; i < kSamples && (i < kFewest || watch.seconds() < kBudget); ++i) {
      const Piece& piece = pieces[static_cast<std::size_t>(i * kStride % kSamples)];
      const auto [pack_seconds, seconds] = measure(piece);
      rates += seconds / size(piece);
      ++samples;
      packing += pack_seconds;
      packed_keys += piece.packed ? piece.keys.size() : 0;
    }
    const double rate = rates / static_cast<double>(samples);
    Estimate found{rate * total_, rate * largest};
    if (packed_keys > 0) found.kernel_seconds += packing / static_cast<double>(packed_keys) * keys_to_pack();
    return found;
  }

 private:
  struct Times {
    double pack, forward;
  };

  /// What a piece costs, roughly: registers' worth of scores.
  [[nodiscard]] double size(const Piece& piece) const noexcept {
    return static_cast<double>(piece.heads * round_up(piece.rows.size(), kernels_.row_block)) *
           static_cast<double>(round_up(piece.keys.size(), kernels_.key_block));
  }

  [[nodiscard]] Range seen(const Section& s, Range rows) const noexcept {
    return ScoreSteps::visible(call_, block_of(call_, s.sequence, s.kv_head, rows));
  }

  /// visit(piece) for each task that multiplies.
  template <class Visit>
  void each_piece(Visit visit) const {
    const auto meet = [&](const Section& section, Range rows, Range keys, bool packed, Index heads = 1) {
      keys = intersect(keys, seen(section, rows));
      keys.begin -= keys.begin % kernels_.key_tile;
      for (Index head = 0; head < section.kv_heads && !keys.empty(); ++head)
        visit(Piece{&section, section.kv_head + head, rows, keys, packed, heads});
    };
    for (const Batch& batch : plan_.batches) {
      if (batch.packs) continue;
      const Section& section = plan_.section(batch.section);
      if (batch.gang >= 0) {
        const Gang& gang = plan_.gangs[static_cast<std::size_t>(batch.gang)];
        for (const Index number : gang.sections) {
          const Section& member = plan_.section(number);
          meet(member, member.rows, part(member, gang.part), false,
               gang.heads ? static_cast<Index>(gang.sections.size()) : 1);
          if (gang.heads) break;
        }
      } else if (batch.block >= 0) {
        for (Index i = 0; i < section.tiles; ++i) meet(section, section.tile(i), batch.keys, true);
      } else if (section.alone) {
        for (Index i = batch.section; i < batch.section + batch.sections; ++i) {
          const Section& s = plan_.section(i);
          for (Index tile = 0; tile < s.tiles; ++tile) meet(s, s.tile(tile), s.keys, s.packs_once());
        }
      } else {
        for (Index i = section.gang_parts; i < section.parts; ++i)
          meet(section, section.rows, part(section, i), false);
      }
    }
  }

  static Range part(const Section& s, Index i) noexcept {
    const Index begin = s.keys.begin + i * s.part_keys;
    return {begin, min(begin + s.part_keys, s.keys.end)};
  }

  [[nodiscard]] double keys_to_pack() const noexcept {
    double keys = 0;
    for (const Batch& batch : plan_.batches) {
      if (batch.packs) keys += static_cast<double>(batch.keys.size());
    }
    for (const Section& section : plan_.sections) {
      if (section.packs_once()) keys += static_cast<double>(section.kv_heads * section.keys.size());
    }
    return keys;
  }

  /// kSamples of them, equally spaced over the sum of sizes.
  [[nodiscard]] std::vector<Piece> choose() const {
    std::vector<Piece> pieces;
    double before = 0;
    each_piece([&](const Piece& piece) {
      before += size(piece);
      while (pieces.size() < kSamples &&
             (static_cast<double>(pieces.size()) + 0.5) * total_ < before * kSamples) {
        pieces.push_back(piece);
        Range& keys = pieces.back().keys;
        keys.end = min(keys.end, keys.begin + kSampleKeys);
      }
    });
    return pieces;
  }

  void reserve() {
    const Index tiles =
        max(plan_.block_bytes / max(1, plan_.task.panel), ceil_div(kSampleKeys, kernels_.key_tile));
    const Index panels = (tiles + 1) * plan_.task.panel;
    const Index states = (plan_.gangs.empty() ? 1 : kMostGangHeads) * plan_.task.state;
    state_ = memory_.reserve(static_cast<std::size_t>(states + plan_.task.scratch + panels));
    scratch_ = state_ + states;
    panels_ = scratch_ + plan_.task.scratch + plan_.task.panel;
  }

  Times measure(const Piece& piece) {
    const Section& s = *piece.section;
    Task task{.sequence = s.sequence, .kv_head = piece.kv_head, .rows = piece.rows, .keys = piece.keys};
    task.last = false;
    task.state = state_;
    task.reach = piece.keys.end;
    task.packed = piece.packed ? panels_ : nullptr;
    if (piece.heads > 1) return {0, timed([&] { run_heads(task, piece.heads); })};
    const double pack_seconds = piece.packed ? timed([&] { pack(task); }) : 0;
    return {pack_seconds, timed([&] { kernels_.forward(call_, task, scratch_); })};
  }

  void run_heads(const Task& first, Index heads) noexcept {
    for (Index key = first.keys.begin; key < first.keys.end; key += kernels_.key_tile) {
      GangTile tile(call_, kernels_, true, scratch_);
      for (Index i = 0; i < heads; ++i) {
        Task task = first;
        task.kv_head += i;
        task.state += i * plan_.task.state;
        task.keys = {key, min(key + kernels_.key_tile, first.keys.end)};
        task.first = key == first.keys.begin;
        tile.add(task);
      }
      tile.run();
    }
  }

  void pack(const Task& task) noexcept {
    std::byte* panel = panels_;
    for (Index key = task.keys.begin; key < task.keys.end;
         key += kernels_.key_tile, panel += plan_.task.panel) {
      kernels_.pack(call_, task.sequence, task.kv_head, {key, min(key + kernels_.key_tile, task.keys.end)},
                    panel);
    }
  }

  /// Of a run: the first one where operands come from memory, else a later one.
  template <class Run>
  double timed(Run run) {
    const Stopwatch once;
    run();
    const double first = once.seconds();
    if (held_ > kCachedBytes && first > kShortest) return first;
    const int loops = static_cast<int>(std::clamp(kShortest / std::max(first, 1e-8), 1.0, 100.0));
    const Stopwatch again;
    for (int i = 0; i < loops; ++i) run();
    return again.seconds() / loops;
  }

  const Call& call_;
  const Plan& plan_;
  const Kernels& kernels_;
  double held_ = 0;   // bytes of all operands
  double total_ = 0;  // of sizes
  Workspace memory_;
  std::byte *state_ = nullptr, *scratch_ = nullptr, *panels_ = nullptr;
};

}  // namespace

Estimate estimate(const Call& call, const Plan& plan) { return Sampler(call, plan).run(); }

}  // namespace attncore
