// What a person may want to know: of a call's plan, of the build, of the machine.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>

#include "backend.h"
#include "estimate.h"
#include "parallel.h"
#include "probe.h"
#include "stopwatch.h"
#include "text.h"

namespace attncore {
namespace {

std::atomic<int> chosen_threads{0};

int default_threads() noexcept {
  const char* const variable = std::getenv("OMP_NUM_THREADS");
  // "4,2" is a number a nesting level: the outermost counts.
  const long wanted = variable != nullptr ? std::strtol(variable, nullptr, 10) : 0;
  return wanted > 0 ? static_cast<int>(std::min(wanted, long{kMostThreads})) : available_cores();
}

std::string size_text(double bytes) {
  char line[32];
  std::snprintf(line, sizeof line, bytes < 1e6 ? "%.1f KB" : "%.1f MB", bytes / (bytes < 1e6 ? 1e3 : 1e6));
  return line;
}

std::string text(const Explanation& e, const Plan& plan) {
  const auto count = [&](auto test) {
    Index sections = 0;
    for (const Section& s : plan.sections) sections += test(s) ? s.kv_heads : 0;
    return std::to_string(sections);
  };
  std::string sections = count([](const Section&) { return true; }) + " of (sequence, KV head, query rows)";
  if (plan.blocks > 0) {
    sections += "; " + count([](const Section& s) { return s.shared; }) + " share " +
                std::to_string(plan.blocks) + " packed super-blocks of keys";
  }
  if (e.key_splits > 1) {
    sections += "; " + count([](const Section& s) { return s.parts > 1; }) +
                " split their keys, into up to " + std::to_string(e.key_splits) + " parts";
  }
  char floor[96];
  std::snprintf(floor, sizeof floor, "%.4g ms, by the multiply-add peak and the read bandwidth, measured now",
                e.floor_seconds * 1e3);
  char time[96];
  std::snprintf(time, sizeof time, "about %.4g ms, by some of the tasks, run now", e.estimated_seconds * 1e3);
  char work[128];
  std::snprintf(work, sizeof work, "%.4g GFLOP, of pairs that causal, window and lengths leave; operands ",
                e.flops / 1e9);
  const auto line = [](const char* title, const std::string& what) {
    return "\n  " + std::string(title) + std::string(12 - std::char_traits<char>::length(title), ' ') + what;
  };
  return "attncore plan" + line("isa", e.isa + ", " + isa_reason()) + line("kernel", e.kernel) +
         line("threads", std::to_string(e.threads)) +
         line("tiles", "at most " + std::to_string(e.query_tile) + " query rows × " +
                           std::to_string(e.key_tile) + " keys") +
         line("sections", sections) + line("tasks", std::to_string(e.tasks)) +
         line("workspace", size_text(static_cast<double>(e.workspace_bytes))) +
         line("work", work + size_text(e.bytes)) + line("floor", floor) + line("time", time);
}

/// Of all tasks on the plan's threads, which on average end half a task apart.
double kernel_seconds(const Call& call, const Plan& plan) {
  const Estimate e = estimate(call, plan);
  const double others = plan.threads - 1;
  return (e.kernel_seconds + others * e.longest_seconds / 2) / plan.threads;
}

/// Of checking, planning, and the threads' beginning and end.
double setup_seconds(const Problem& problem, const Options& options) {
  constexpr double kFromPython = 5e-7;  // arguments and a new array
  const Stopwatch watch;
  const int threads = backend(options.device).plan(validate(problem), options).threads;
  return watch.seconds() + estimated_wait(threads) + kFromPython;
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
  chosen_threads = std::min(num_threads, kMostThreads);
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
  const double reading = plan.bytes / estimated_bandwidth(plan.threads);
  e.floor_seconds = std::max(plan.flops / estimated_peak(*plan.kernels, plan.threads), reading);
  e.estimated_seconds = std::max(kernel_seconds(call, plan), reading) + setup_seconds(problem, options);
  e.text = text(e, plan);
  return e;
}

const char* version() noexcept { return ATTNCORE_VERSION; }

std::vector<std::pair<std::string, std::string>> config() {
  return {{"version", version()},
          {"isa", isa()},
          {"isa_reason", isa_reason()},
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
