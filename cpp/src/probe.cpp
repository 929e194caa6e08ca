#include "probe.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <mutex>
#include <vector>

#include "cpu/memory.h"
#include "require.h"
#include "stopwatch.h"

namespace attncore {
namespace {

double measured_peak(const Kernels& kernels, int threads) {
  constexpr Index kRounds = 4'000'000;
  double best = 0;
  for (int attempt = 0; attempt < 5; ++attempt) {
    std::atomic<double> operations{0};
    const Stopwatch watch;
    parallel(threads, [&](int) { operations += kernels.multiply_adds(kRounds); });
    best = std::max(best, operations / watch.seconds());
  }
  return best;
}

/// Memory that is read, written once by the threads that will read it: what was never written is one page of zeros.
class ReadMemory {
 public:
  void reserve(Index share, int threads) {
    const auto bytes = static_cast<std::size_t>(share) * static_cast<std::size_t>(threads);
    if (bytes <= memory_.bytes()) return;
    data_ = memory_.reserve(bytes);
    parallel(threads,
             [&](int thread) { std::memset(data_ + thread * share, 1, static_cast<std::size_t>(share)); });
  }
  [[nodiscard]] const std::byte* data() const noexcept { return data_; }

 private:
  Workspace memory_;
  std::byte* data_ = nullptr;
};

/// Bytes a second; each try reads `traffic` bytes, or all once.
double measured_bandwidth(ReadMemory& memory, Index bytes, int threads, Index traffic, int tries) {
  const Kernels& kernels = *current_table().f32;
  const Index share = round_up(ceil_div(bytes, threads), kReadStep);
  const Index passes = max(Index{1}, traffic / (share * threads));
  memory.reserve(share, threads);
  const std::byte* const data = memory.data();
  double best = 0;
  for (int attempt = 0; attempt < tries * kReadPatterns; ++attempt) {
    std::atomic<std::uint64_t> seen{0};
    std::atomic<Index> read{0};
    const Stopwatch watch;
    parallel(threads, [&](int thread) {
      std::uint64_t bits = 0;
      for (Index pass = 0; pass < passes; ++pass) {
        bits |= kernels.read_memory(data + thread * share, share, attempt % kReadPatterns);
      }
      seen |= bits;
      read += passes * share;
    });
    best = std::max(best, static_cast<double>(read) / watch.seconds());
  }
  return best;
}

}  // namespace

double estimated_peak(const Kernels& kernels, int threads) {
  constexpr Index kRounds = 50'000;  // a fraction of a millisecond
  double best = 0;
  for (int attempt = 0; attempt < 10; ++attempt) {
    const Stopwatch watch;
    const double operations = kernels.multiply_adds(kRounds);
    best = std::max(best, operations / watch.seconds());
  }
  return best * threads;
}

double estimated_wait(int threads) {
  if (threads <= 1) return 0;
  std::array<double, 9> times{};
  for (double& time : times) {
    const Stopwatch watch;
    parallel(threads, [](int) {});
    time = watch.seconds();
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

double estimated_bandwidth(int threads) {
  static std::mutex mutex;
  static std::vector<double> known;
  const std::lock_guard lock(mutex);
  const auto slot = static_cast<std::size_t>(threads);
  if (known.size() <= slot) known.resize(slot + 1, 0);
  if (known[slot] > 0) return known[slot];
  constexpr Index kBytes = Index{64} << 20U;  // more than most caches of a core hold
  ReadMemory memory;
  return known[slot] = measured_bandwidth(memory, kBytes, threads, kBytes, 1);
}

double fma_peak(const std::string& isa, DType dtype, int num_threads) {
  const IsaTable& table = table_named(isa);
  require_float("dtype", {.dtype = dtype});
  const Kernels& kernels = dtype == DType::bf16 ? *table.bf16 : table.kernels(accumulation(dtype));
  const int threads = threads_of({.num_threads = num_threads});
  return measured_peak(kernels, threads) / 1e9;
}

double read_bandwidth(Index bytes, int num_threads) {
  constexpr Index kMostBytes = Index{1} << 50U;
  if (bytes < 1 || bytes > kMostBytes) reject("bytes", "is " + std::to_string(bytes) + ", must be 1 … 2**50");
  static std::mutex mutex;
  static ReadMemory memory;
  const std::lock_guard lock(mutex);
  constexpr Index kTraffic = Index{1} << 30U;  // some milliseconds in any cache
  const int threads = threads_of({.num_threads = num_threads});
  return measured_bandwidth(memory, bytes, threads, kTraffic, 2) / 1e9;
}

}  // namespace attncore
