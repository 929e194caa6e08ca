#include "machine.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <thread>
#include <vector>

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
    const std::size_t name = line.starts_with("model name") ? line.find(": ") : std::string::npos;
    if (name != std::string::npos) return line.substr(name + 2);
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

}  // namespace attncore
