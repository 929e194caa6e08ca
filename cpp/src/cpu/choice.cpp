#include "choice.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "../backend.h"
#include "../number.h"
#include "../stopwatch.h"

namespace attncore {
namespace {

constexpr double kClearlyFaster = 1.2;  // what a candidate must reach
constexpr int kRounds = 3;

/// What an ISA may have kernels of its own for, and how far two ISAs' results may be apart: values and results are within ± 1,
/// and products, weights or results have been rounded to this dtype at most.
struct Kind {
  DType dtype;
  double tolerance;
};
constexpr Kind kKinds[] = {{DType::bf16, 0x1p-7}, {DType::f16, 0x1p-9}, {DType::f32, 0x1p-18}};

/// A head of attention, small but of a usual shape.
class Sample {
 public:
  explicit Sample(DType dtype)
      : query_(noise(1, kRows, dtype)), key_(noise(2, kKeys, dtype)), value_(noise(3, kKeys, dtype)) {
    const auto tensor = [dtype](std::vector<std::byte>& memory, Index tokens) {
      return Tensor::contiguous(memory.data(), dtype, {1, 1, tokens, kDim});
    };
    out_.resize(query_.size());
    Problem problem;
    problem.query = tensor(query_, kRows);
    problem.key = tensor(key_, kKeys);
    problem.value = tensor(value_, kKeys);
    problem.out = tensor(out_, kRows);
    problem.score.scale = 1.0;  // so that few keys weigh much, and an error in one shows
    call_ = validate(problem);
  }

  [[nodiscard]] const Call& call() const noexcept { return call_; }

  [[nodiscard]] std::vector<double> run(const Plan& plan) {
    once(plan);
    const auto size = static_cast<std::size_t>(item_size(call_.out.dtype));
    std::vector<double> out;
    out.reserve(out_.size() / size);
    for (std::size_t i = 0; i < out_.size(); i += size) out.push_back(read_number(&out_[i], call_.out.dtype));
    return out;
  }

  /// Seconds of a run that follows another: units have woken up, caches are warm.
  [[nodiscard]] double time(const Plan& plan) {
    once(plan);
    const Stopwatch watch;
    once(plan);
    return watch.seconds();
  }

 private:
  static constexpr Index kRows = 128, kKeys = 128, kDim = 64;

  void once(const Plan& plan) { cpu_backend.forward(call_, plan, {.num_threads = 1}); }

  /// In −1 … 1, with as many digits as the dtype has after the first.
  static std::vector<std::byte> noise(std::uint32_t seed, Index tokens, DType dtype) {
    const Index size = item_size(dtype);
    const unsigned digits = dtype == DType::bf16 ? 7 : dtype == DType::f16 ? 10 : 23;
    const double unit = 1 / static_cast<double>(1U << digits);
    std::vector<std::byte> memory(static_cast<std::size_t>(tokens * kDim * size));
    std::uint32_t state = seed;
    for (Index i = 0; i < tokens * kDim; ++i) {
      state = state * 1664525U + 1013904223U;
      write_number(static_cast<double>(state >> (31U - digits)) * unit - 1, memory.data() + i * size, dtype);
    }
    return memory;
  }

  std::vector<std::byte> query_, key_, value_, out_;
  Call call_;
};

Trial try_on(Sample& sample, const Kernels& candidate, const Kernels& other, double tolerance) {
  const Plan ours = make_plan(sample.call(), candidate, Machine{1});
  const Plan theirs = make_plan(sample.call(), other, Machine{1});
  const std::vector<double> out = sample.run(ours), want = sample.run(theirs);
  const auto near = [tolerance](double a, double b) { return std::fabs(a - b) <= tolerance; };
  if (!std::equal(out.begin(), out.end(), want.begin(), near)) return {};
  double fast = sample.time(ours), slow = sample.time(theirs);
  for (int round = 1; round < kRounds; ++round) {
    fast = std::min(fast, sample.time(ours));
    slow = std::min(slow, sample.time(theirs));
  }
  return {true, slow / fast};
}

/// Whether `candidate` is right and clearly faster than `best` in all that it has kernels of its own for; says what was found.
bool wins(const IsaTable& candidate, const IsaTable& best, std::string& reason) {
  std::string found;
  bool good = true;
  for (const Kind& kind : kKinds) {
    Sample sample(kind.dtype);
    const Kernels& ours = candidate.forward_kernels(sample.call());
    const Kernels& theirs = best.forward_kernels(sample.call());
    if (&ours == &theirs) continue;
    const Trial trial = try_on(sample, ours, theirs, kind.tolerance);
    char speedup[32];
    std::snprintf(speedup, sizeof speedup, "%.2f × as fast", trial.speedup);
    found += std::string(found.empty() ? "" : ", ") + name(kind.dtype) + " " +
             (trial.right ? speedup : "gives wrong results");
    good = good && trial.right && trial.speedup >= kClearlyFaster;
    if (!good) break;
  }
  reason += std::string(reason.empty() ? "" : "; ") + candidate.name + " was tried against " + best.name +
            ": " + found;
  return good;
}

}  // namespace

Trial try_kernels(const Kernels& candidate, const Kernels& other, DType dtype) {
  Sample sample(dtype);
  const auto* const kind =
      std::find_if(std::begin(kKinds), std::end(kKinds), [dtype](const Kind& k) { return k.dtype == dtype; });
  return try_on(sample, candidate, other, kind->tolerance);
}

Choice choose(const std::vector<const IsaTable*>& tables) {
  auto best = std::find_if(tables.begin(), tables.end(), [](const IsaTable* table) {
    return table->preferred != nullptr && table->preferred();
  });
  std::string reason;
  // Each of those to be tried builds on the one after it.
  for (auto next = std::make_reverse_iterator(best); next != tables.rend(); ++next) {
    if ((*next)->preferred != nullptr) continue;
    if (!wins(**next, **best, reason)) break;
    best = std::prev(next.base());
  }
  return {*best, reason.empty() ? "the best for this processor" : reason};
}

}  // namespace attncore
