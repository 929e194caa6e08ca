// What a person may want to know: of a call's plan, of the build, of the machine.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "backend.h"
#include "cpu/dispatch.h"
#include "parallel.h"
#include "text.h"

namespace attncore {
namespace {

std::atomic<int> chosen_threads{0};

int default_threads() noexcept {
  const char* const variable = std::getenv("OMP_NUM_THREADS");
  // "4,2" is a number a nesting level: the outermost counts.
  const long wanted = variable != nullptr ? std::strtol(variable, nullptr, 10) : 0;
  return wanted > 0 ? static_cast<int>(wanted) : available_cores();
}

double measured_peak(const Kernels& kernels, int threads, Index rounds) {
  double best = 0;
  for (int attempt = 0; attempt < 10; ++attempt) {
    std::atomic<double> operations{0};
    const auto start = std::chrono::steady_clock::now();
    parallel(threads, [&](int) { operations += kernels.multiply_adds(rounds); });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, operations / seconds.count());
  }
  return best;
}

std::string text(const Explanation& e, const Plan& plan) {
  const auto count = [&](auto test) {
    return std::count_if(plan.sections.begin(), plan.sections.end(), test);
  };
  const auto shared = count([](const Section& s) { return s.shared; });
  const auto split = count([](const Section& s) { return s.parts > 1; });
  char line[1024];
  std::snprintf(
      line, sizeof line,
      "attncore plan\n"
      "  isa          %s, kernel %s, %d thread%s\n"
      "  tiles        %lld query rows x %lld keys\n"
      "  sections     %zu: %lld share packed super-blocks (%lld), %lld split their keys (up to %lld parts)\n"
      "  tasks        %lld\n"
      "  workspace    %.1f KiB\n"
      "  work         %.4g GFLOP of visible tiles, %.4g MB of operands\n"
      "  floor        %.4g ms (multiply-add peak and read bandwidth, measured now)",
      e.isa.c_str(), e.kernel.c_str(), e.threads, e.threads == 1 ? "" : "s",
      static_cast<long long>(e.query_tile), static_cast<long long>(e.key_tile), plan.sections.size(),
      static_cast<long long>(shared), static_cast<long long>(plan.blocks), static_cast<long long>(split),
      static_cast<long long>(e.key_splits), static_cast<long long>(e.tasks),
      static_cast<double>(e.workspace_bytes) / 1024, e.flops / 1e9, e.bytes / 1e6, e.estimated_seconds * 1e3);
  return line;
}

}  // namespace

int get_num_threads() noexcept {
  static const int otherwise = default_threads();
  const int threads = chosen_threads.load(std::memory_order_relaxed);
  return threads > 0 ? threads : otherwise;
}

void set_num_threads(int num_threads) {
  if (num_threads < 1) {
    throw std::invalid_argument("num_threads: is " + std::to_string(num_threads) + ", must be at least 1");
  }
  chosen_threads = num_threads;
}

double fma_peak(const std::string& isa, DType dtype, int num_threads) {
  constexpr Index kRounds = 1'000'000;
  const DType compute = dtype == DType::f64 ? DType::f64 : DType::f32;
  return measured_peak(table_named(isa).kernels(compute), num_threads > 0 ? num_threads : get_num_threads(),
                       kRounds) /
         1e9;
}

Explanation explain(const Problem& problem, const Options& options) {
  const Call call = validate(problem);
  const Plan plan = backend(options.device).plan(call, options);
  Explanation e;
  e.isa = current_table().name;
  e.kernel = plan.kernels->name;
  e.threads = plan.threads;
  e.key_tile = plan.kernels->key_tile;
  for (const Section& section : plan.sections) {
    e.query_tile = max(e.query_tile, min(section.tile_rows, section.rows.size()));
    e.key_splits = max(e.key_splits, section.parts);
  }
  e.tasks = plan.tasks;
  e.workspace_bytes = plan.workspace_bytes;
  e.flops = plan.flops;
  e.bytes = plan.bytes;
  constexpr Index kRounds = 50'000;  // a fraction of a millisecond: the best of several is undisturbed
  e.estimated_seconds = std::max(plan.flops / measured_peak(*plan.kernels, plan.threads, kRounds),
                                 plan.bytes / read_bandwidth(plan.threads));
  e.text = text(e, plan);
  return e;
}

std::vector<std::pair<std::string, std::string>> config() {
  return {{"version", ATTNCORE_VERSION},
          {"isa", isa()},
          {"available_isas", joined(available_isas(), " ")},
          {"cpu", cpu_name()},
          {"cpu_features", cpu_features()},
          {"cores", std::to_string(available_cores())},
          {"num_threads", std::to_string(get_num_threads())},
          {"threads_by", parallel_kind()},
          {"compiler",
#ifdef __clang__
           "clang " __clang_version__
#else
           "gcc " __VERSION__
#endif
          },
          {"cuda", "not built"}};
}

}  // namespace attncore
