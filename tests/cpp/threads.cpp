// Calls at once from several threads, and calls that are cancelled: the bits are those of a call alone on one
// thread, whatever ran beside it or before it.  Sanitizers look for races and leaks here.
#include <algorithm>
#include <attncore/attncore.hpp>
#include <chrono>
#include <exception>
#include <thread>
#include <vector>

#include "check.h"
#include "kit.h"

namespace {

using namespace attncore;

/// A problem and its arrays, and what it gives alone on one thread with each ISA.
struct Case {
  std::vector<float> q, k, v, out, lse;
  Problem problem;

  Case(Index batch, Index heads, Index kv_heads, Index queries, Index keys, Index dim, bool causal,
       unsigned seed) {
    Random random(seed);
    const auto tensor = [&](std::vector<float>& items, const std::array<Index, 4>& shape) {
      items = noise(shape[0] * shape[1] * shape[2] * shape[3], random);
      return Tensor::contiguous(items.data(), DType::f32, shape);
    };
    problem.query = tensor(q, {batch, heads, queries, dim});
    problem.key = tensor(k, {batch, kv_heads, keys, dim});
    problem.value = tensor(v, {batch, kv_heads, keys, dim});
    problem.out = tensor(out, {batch, heads, queries, dim});
    problem.lse = tensor(lse, {batch, heads, queries, 1});
    problem.score.causal = causal;
  }
  Case(const Case&) = delete;
  Case& operator=(const Case&) = delete;
  ~Case() = default;

  /// out and lse of a call.
  std::vector<float> run(const Options& options) {
    std::fill(out.begin(), out.end(), 7.0F);
    std::fill(lse.begin(), lse.end(), 7.0F);
    forward(problem, options);
    std::vector<float> results = out;
    results.insert(results.end(), lse.begin(), lse.end());
    return results;
  }
};

/// The kinds of plans: shared super-blocks whose rows wait, split keys, one tile, sections that are alone if threads are few,
/// few tasks.
constexpr int kKinds = 5;
Case kind(int number, unsigned seed) {
  switch (number) {
    case 0:
      return {1, 4, 2, 200, 1200, 24, true, seed};
    case 1:
      return {2, 4, 1, 2, 3000, 24, false, seed};
    case 2:
      return {3, 2, 2, 20, 90, 16, true, seed};
    case 3:
      return {6, 4, 4, 100, 150, 24, true, seed};
    default:
      return {1, 1, 1, 1, 1, 3, false, seed};
  }
}

/// The results of every ISA, alone.
std::vector<std::vector<float>> expected(Case& c) {
  std::vector<std::vector<float>> results;
  for (const std::string& name : available_isas()) {
    use_isa(name);
    results.push_back(c.run({.num_threads = 1}));
  }
  return results;
}

/// Runs caller(0) … caller(count − 1) at once.
template <class Caller>
void at_once(int count, Caller caller) {
  std::vector<std::thread> threads;
  threads.reserve(static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) threads.emplace_back(caller, i);
  for (std::thread& thread : threads) thread.join();
}

void callers_of_one_isa() {
  const std::vector<std::string> names = available_isas();
  for (std::size_t isa = 0; isa < names.size(); ++isa) {
    std::vector<std::vector<float>> want;
    for (int i = 0; i < kKinds; ++i) {
      Case c = kind(i, 5);
      want.push_back(expected(c)[isa]);
    }
    use_isa(names[isa]);
    at_once(5, [&](int caller) {
      Workspace workspace;
      for (int repeat = 0; repeat < kKinds; ++repeat) {
        const int number = (caller + repeat) % kKinds;
        Case c = kind(number, 5);
        const Options options{.num_threads = 1 + caller % 3,
                              .workspace = caller % 2 == 0 ? &workspace : nullptr};
        CHECK(same_bits(c.run(options), want[static_cast<std::size_t>(number)]));
      }
    });
  }
}

/// One thread changes the ISA of the process all the time: each call is of one ISA from its beginning to its
/// end.
void callers_while_the_isa_changes() {
  std::atomic<int> calling{3};
  std::vector<std::vector<std::vector<float>>> want;
  for (int i = 0; i < kKinds; ++i) {
    Case c = kind(i, 9);
    want.push_back(expected(c));
  }
  at_once(4, [&](int caller) {
    if (caller == 3) {
      while (calling > 0) {
        for (const std::string& name : available_isas()) use_isa(name);
        std::this_thread::yield();
      }
      return;
    }
    for (int repeat = 0; repeat < 3 * kKinds; ++repeat) {
      const auto number = static_cast<std::size_t>((caller + repeat) % kKinds);
      Case c = kind(static_cast<int>(number), 9);
      const auto results = c.run({.num_threads = 1 + repeat % 2});
      bool known = false;
      for (const auto& of_isa : want[number]) known |= same_bits(results, of_isa);
      CHECK(known);
    }
    --calling;
  });
  use_isa(available_isas().front());
}

struct Interrupt : std::exception {
  int number;
  explicit Interrupt(int at) : number(at) {}
};

/// Ends a call at its poll number `at`, by true or by an exception, and says whether that is what came out.
bool ends(Case& c, int threads, int at, bool throws, Workspace* workspace) {
  int polls = 0;
  const auto cancelled = [&] {
    if (++polls < at) return false;
    if (throws) throw Interrupt(at);
    return true;
  };
  try {
    forward(c.problem, {.num_threads = threads, .cancelled = cancelled, .workspace = workspace});
  } catch (const Cancelled&) {
    return !throws && polls >= at;
  } catch (const Interrupt& interrupt) {
    return throws && interrupt.number == at;
  }
  return polls < at;  // it was over before
}

void cancelled_calls() {
  at_once(2, [](int caller) {
    Workspace workspace;
    for (int number = 0; number < kKinds; ++number) {
      Case c = kind(number, 13);
      const auto want = c.run({.num_threads = 1});
      for (int repeat = 0; repeat < 12; ++repeat) {
        Workspace* const own = repeat % 3 == 0 ? &workspace : nullptr;
        CHECK(ends(c, 1 + (repeat + caller) % 3, 1 + repeat * repeat, repeat % 2 == 0, own));
        if (repeat % 4 == 3) CHECK(same_bits(c.run({.num_threads = 1 + repeat % 3, .workspace = own}), want));
      }
    }
  });
}

/// A long call asks often whether to end, on the caller's thread only, and ends at once.
void a_long_call() {
  Case c(1, 4, 4, 6000, 6000, 64, false, 3);
  using Clock = std::chrono::steady_clock;
  for (const int threads : {1, 3}) {
    const auto caller = std::this_thread::get_id();
    const auto start = Clock::now();
    auto asked = start;
    double longest = 0;  // wait for an answer, in seconds
    const auto note = [&] {
      const auto now = Clock::now();
      longest = std::max(longest, std::chrono::duration<double>(now - asked).count());
      asked = now;
    };
    bool ended = false;
    try {
      forward(c.problem, {.num_threads = threads, .cancelled = [&] {
                            CHECK(std::this_thread::get_id() == caller);
                            note();
                            return asked - start > std::chrono::milliseconds(50);
                          }});
    } catch (const Cancelled&) {
      ended = true;
    }
    note();
    CHECK(ended);
    std::printf("a call on %d threads: at most %.3f s from a cancellation to the end\n", threads, longest);
    CHECK(longest < 10);  // sanitizers and busy machines; the contract is 0.2 s
  }
}

}  // namespace

int main() {
  callers_of_one_isa();
  callers_while_the_isa_changes();
  cancelled_calls();
  a_long_call();
  return finish();
}
