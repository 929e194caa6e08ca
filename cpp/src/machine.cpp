#include "machine.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <mutex>
#include <thread>
#include <vector>

#include "parallel.h"
#include "text.h"

namespace attncore {

int available_cores() noexcept {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

std::string cpu_features() {
#ifdef __x86_64__
  const std::pair<const char*, bool> features[] = {{"sse4.2", __builtin_cpu_supports("sse4.2") != 0},
                                                   {"avx2", __builtin_cpu_supports("avx2") != 0},
                                                   {"fma", __builtin_cpu_supports("fma") != 0},
                                                   {"avx512f", __builtin_cpu_supports("avx512f") != 0},
                                                   {"avx512bw", __builtin_cpu_supports("avx512bw") != 0},
                                                   {"avx512dq", __builtin_cpu_supports("avx512dq") != 0},
                                                   {"avx512vl", __builtin_cpu_supports("avx512vl") != 0},
                                                   {"avx512vnni", __builtin_cpu_supports("avx512vnni") != 0},
                                                   {"avx512bf16", __builtin_cpu_supports("avx512bf16") != 0}};
  std::vector<std::string> found;
  for (const auto& [name, present] : features) {
    if (present) found.emplace_back(name);
  }
  return joined(found, " ");
#else
  return "the compiler's default";
#endif
}

double read_bandwidth(int threads) {
  static std::mutex mutex;
  static std::vector<double> known;
  const std::lock_guard lock(mutex);
  const auto slot = static_cast<std::size_t>(threads);
  if (known.size() <= slot) known.resize(slot + 1, 0);
  if (known[slot] > 0) return known[slot];

  constexpr std::size_t kItems = std::size_t{8} << 20U;  // 64 MiB: more than most caches of a core hold
  const std::vector<std::uint64_t> memory(kItems, 1);
  std::atomic<std::uint64_t> total{0};
  double best = 0;
  for (int round = 0; round < 5; ++round) {
    const auto start = std::chrono::steady_clock::now();
    parallel(threads, [&](int thread) {
      const std::size_t share = kItems / slot;
      std::uint64_t sum[8]{};
      const std::uint64_t* const items = memory.data() + share * static_cast<std::size_t>(thread);
      for (std::size_t i = 0; i + 8 <= share; i += 8) {
        for (std::size_t j = 0; j < 8; ++j) sum[j] += items[i + j];
      }
      for (const std::uint64_t s : sum) total += s;
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(kItems * sizeof(std::uint64_t)) / seconds.count());
  }
  return known[slot] = best;
}

}  // namespace attncore
