// A program that knows attncore by its installed headers only, and takes no warnings: causal attention of four queries, checked
// by hand, by a call and by a cache.
#include <attncore/cache.hpp>
#include <attncore/state.hpp>
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <vector>

namespace {

using attncore::DType;
using attncore::Index;
using attncore::Tensor;

constexpr Index kHeads = 2, kTokens = 4, kDim = 8;

/// Query `row` sees keys 0 … row; all scores are equal, so that its output is the mean of the values that it
/// sees.
float expected(Index row) {
  float sum = 0;
  for (Index key = 0; key <= row; ++key) sum += static_cast<float>(key);
  return sum / static_cast<float>(row + 1);
}

}  // namespace

int main() {
  const std::vector<float> zeros(kHeads * kTokens * kDim, 0.0F);
  std::vector<float> values(zeros.size()), out(zeros.size(), -1.0F);
  for (Index i = 0; i < Index(values.size()); ++i)
    values[std::size_t(i)] = static_cast<float>(i / kDim % kTokens);

  const auto tensor = [](const std::vector<float>& items) {
    return Tensor::contiguous(items.data(), DType::f32, {1, kHeads, kTokens, kDim});
  };
  int failures = 0;
  const auto check = [&] {
    for (Index i = 0; i < Index(out.size()); ++i) {
      const float want = expected(i / kDim % kTokens), ours = out[std::size_t(i)];
      if (std::fabs(ours - want) <= 1e-6F) continue;
      std::printf("out[%d] = %g, not %g\n", int(i), double(ours), double(want));
      ++failures;
    }
    out.assign(out.size(), -1.0F);
  };
  attncore::Problem problem{.query = tensor(zeros),
                            .key = tensor(zeros),
                            .value = tensor(values),
                            .out = tensor(out),
                            .score = {.causal = true}};
  attncore::forward(problem);
  check();
  attncore::KVCache cache(1, kTokens, {.kv_heads = kHeads, .dim = kDim});
  cache.append({.key = problem.key, .value = problem.value});
  cache.attend({.query = problem.query, .out = problem.out, .score = {.causal = true}});
  check();

  try {
    problem.key = Tensor::contiguous(zeros.data(), DType::f32, {1, kHeads, kTokens, kDim - 1});
    attncore::forward(problem);
    std::puts("a key of another dim was accepted");
    ++failures;
  } catch (const std::invalid_argument& error) {
    std::printf("as it should be: %s\n", error.what());
  }
  std::printf("attncore on %s: %d failures\n", attncore::isa().c_str(), failures);
  return failures == 0 ? 0 : 1;
}
