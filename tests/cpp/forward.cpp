// forward() against a textbook evaluation in double, for every ISA, options, thread counts, and callers at
// once.
#include <algorithm>
#include <attncore/attncore.hpp>
#include <cmath>
#include <functional>
#include <thread>
#include <vector>

#include "check.h"
#include "kit.h"

namespace {

using namespace attncore;

/// The arrays of one problem, and the options as a test of one score: what it becomes, −inf where the key is
/// hidden.
struct Case {
  Shape n;
  Random random;
  std::vector<float> q, k, v, out, lse;
  std::vector<float> bias, slopes;
  std::vector<std::uint8_t> mask;
  std::vector<Index> lengths;
  Problem problem;
  std::function<double(double, Index batch, Index head, Index query, Index key)> score =
      [](double s, Index, Index, Index, Index) { return s; };

  explicit Case(const Shape& shape) : n(shape) {
    q = noise(n.batch * n.heads * n.queries * n.dim, random);
    k = noise(n.batch * n.kv_heads * n.keys * n.dim, random);
    v = noise(n.batch * n.kv_heads * n.keys * n.value_dim, random);
    out.resize(static_cast<std::size_t>(n.batch * n.heads * n.queries * n.value_dim));
    lse.resize(static_cast<std::size_t>(n.batch * n.heads * n.queries));
    problem.query = Tensor::contiguous(q.data(), DType::f32, {n.batch, n.heads, n.queries, n.dim});
    problem.key = Tensor::contiguous(k.data(), DType::f32, {n.batch, n.kv_heads, n.keys, n.dim});
    problem.value = Tensor::contiguous(v.data(), DType::f32, {n.batch, n.kv_heads, n.keys, n.value_dim});
    problem.out = Tensor::contiguous(out.data(), DType::f32, {n.batch, n.heads, n.queries, n.value_dim});
    problem.lse = Tensor::contiguous(lse.data(), DType::f32, {n.batch, n.heads, n.queries, 1});
  }
  Case(const Case&) = delete;
  Case& operator=(const Case&) = delete;
  ~Case() = default;
};

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// The textbook on one row: the largest error of `out` and `lse` there.
double row_error(const Case& c, Index batch, Index head, Index query) {
  const Shape& n = c.n;
  const Index kv_row = (batch * n.kv_heads + head / (n.heads / n.kv_heads)) * n.keys;
  const Index row = (batch * n.heads + head) * n.queries + query;
  std::vector<double> p(static_cast<std::size_t>(n.keys));
  double top = -kInfinity, sum = 0, error = 0;
  for (Index key = 0; key < n.keys; ++key) {
    double s = 0;
    for (Index d = 0; d < n.dim; ++d)
      s += double(c.q[row * n.dim + d]) * double(c.k[(kv_row + key) * n.dim + d]);
    p[key] = c.score(s / std::sqrt(double(n.dim)), batch, head, query, key);
    top = std::max(top, p[key]);
  }
  for (double& s : p) sum += s = top == -kInfinity ? 0 : std::exp(s - top);
  for (Index d = 0; d < n.value_dim; ++d) {
    double want = 0;
    for (Index key = 0; key < n.keys; ++key) want += p[key] * double(c.v[(kv_row + key) * n.value_dim + d]);
    error = std::max(error, std::fabs((sum > 0 ? want / sum : 0) - double(c.out[row * n.value_dim + d])));
  }
  if (sum == 0) return c.lse[row] == -kInfinity ? error : kInfinity;
  return std::max(error, std::fabs(top + std::log(sum) - double(c.lse[row])));
}

/// Runs a case with 1, 2 and 3 threads: right, and the same bits.
void check(Case& c) {
  std::vector<float> first;
  for (int threads = 1; threads <= 3; ++threads) {
    std::fill(c.out.begin(), c.out.end(), NAN);
    forward(c.problem, {.num_threads = threads});
    if (threads == 1) first = c.out;
    CHECK(std::equal(first.begin(), first.end(), c.out.begin()));
  }
  const Index step = c.n.queries > 200 ? 37 : 1;
  for (Index batch = 0; batch < c.n.batch; ++batch) {
    for (Index head = 0; head < c.n.heads; ++head) {
      for (Index query = 0; query < c.n.queries; query += step)
        CHECK(row_error(c, batch, head, query) < 2e-5);
    }
  }
}

void plain() {
  for (const Shape& shape :
       {Shape{1, 1, 1, 1, 1, 1, 1}, Shape{2, 4, 2, 37, 70, 24, 17}, Shape{1, 8, 2, 1, 3000, 64, 64},
        Shape{1, 2, 2, 3, 0, 8, 8}, Shape{1, 2, 1, 600, 600, 64, 64}}) {
    Case c(shape);
    check(c);
  }
}

void band() {
  Case c({2, 2, 1, 90, 140, 16, 16});
  c.problem.score.causal = true;
  c.problem.score.left = 20;
  c.score = [](double s, Index, Index, Index query, Index key) {
    return key <= query + 50 && key >= query + 30 ? s : -kInfinity;
  };
  check(c);
}

void additive() {
  Case c({1, 4, 4, 33, 65, 32, 32});
  c.bias = noise(4 * 33 * 65, c.random);
  c.slopes = {0.5F, 0.25F, 0.125F, 0.0625F};
  c.problem.score.softcap = 2.0;
  c.problem.score.biases.push_back(Tensor::contiguous(c.bias.data(), DType::f32, {1, 4, 33, 65}));
  c.problem.score.alibi = Tensor::contiguous(c.slopes.data(), DType::f32, {1, 4, 1, 1});
  c.score = [&c](double s, Index, Index head, Index query, Index key) {
    const double distance = std::fabs(double(query + 32 - key));
    return 2 * std::tanh(s / 2) - double(c.slopes[head]) * distance +
           double(c.bias[(head * 33 + query) * 65 + key]);
  };
  check(c);
}

void hidden() {
  Case c({2, 2, 2, 40, 100, 16, 24});
  for (Index i = 0; i < Index{40} * 100; ++i)
    c.mask.push_back(i / 100 != 7 && i % 3 != 0 ? 1 : 0);  // row 7: no key
  c.lengths = {100, 61};
  c.problem.score.mask = Tensor::contiguous(c.mask.data(), DType::boolean, {1, 1, 40, 100});
  c.problem.score.key_lengths = Tensor::contiguous(c.lengths.data(), DType::i64, {2, 1, 1, 1});
  for (Index key = 61; key < 100; ++key) {  // poison past the length of entry 1, both heads
    for (Index d = 0; d < 16; ++d)
      c.k[((2 + 0) * 100 + key) * 16 + d] = c.k[((2 + 1) * 100 + key) * 16 + d] = NAN;
    for (Index d = 0; d < 24; ++d)
      c.v[((2 + 0) * 100 + key) * 24 + d] = c.v[((2 + 1) * 100 + key) * 24 + d] = NAN;
  }
  c.score = [&c](double s, Index batch, Index, Index query, Index key) {
    return c.mask[query * 100 + key] != 0 && key < c.lengths[batch] ? s : -kInfinity;
  };
  // The textbook multiplies 0 by the poison: give it zeros instead, after the call.
  forward(c.problem);
  for (float& item : c.k) item = std::isnan(item) ? 0 : item;
  for (float& item : c.v) item = std::isnan(item) ? 0 : item;
  for (Index batch = 0; batch < 2; ++batch) {
    for (Index query = 0; query < 40; ++query) CHECK(row_error(c, batch, 1, query) < 2e-5);
  }
}

/// Operands that bfloat16 holds: medium differs by the rounding of weights alone, 2⁻⁸ of each at worst and of their sum, and lse not at
/// all.  High is float32's own but by tiles, which give weights 16 bits; so is medium for few rows.
void precisions() {
  for (const Shape& shape : {Shape{2, 4, 2, 37, 301, 25, 17}, Shape{1, 8, 2, 2, 1500, 64, 8}}) {
    Case c(shape);
    for (std::vector<float>* const x : {&c.q, &c.k, &c.v}) {
      for (float& item : *x) item = std::round(item * 128) / 128;
    }
    forward(c.problem);
    const std::vector<float> highest = c.out;
    c.problem.precision = Precision::high;
    forward(c.problem);
    const bool few = shape.queries * shape.heads / shape.kv_heads <= 8, tiles = isa().find("amx") == 0;
    if (few || !tiles) CHECK(c.out == highest);
    CHECK(row_error(c, 0, 0, 0) < 1e-4);
    c.problem.precision = Precision::medium;
    forward(c.problem);
    if (few || !(tiles || isa() == "avx512_bf16")) CHECK(c.out == highest);
    const double spread = 2, each = std::exp2(-9);
    for (Index batch = 0; batch < shape.batch; ++batch) {
      for (Index query = 0; query < shape.queries; ++query) {
        CHECK(row_error(c, batch, shape.heads - 1, query) < 2 * each * spread);
      }
    }
  }
  Case c({1, 1, 1, 1, 1, 1, 1});
  c.problem.precision = static_cast<Precision>(3);
  CHECK(refused([&] { forward(c.problem); }, "precision"));
}

void many_callers() {
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([] {
      Case c({1, 2, 2, 150, 150, 32, 32});
      for (int repeat = 0; repeat < 3; ++repeat) check(c);
    });
  }
  for (std::thread& caller : callers) caller.join();
}

void cancelled() {
  Case c({1, 4, 4, 1500, 1500, 64, 64});
  const Options stops{.cancelled = [] { return true; }};
  CHECK(refused<Cancelled>([&] { forward(c.problem, stops); }, "the call"));
  check(c);  // and nothing else is harmed
}

}  // namespace

int main() {
  for (const std::string& name : available_isas()) {
    use_isa(name);
    std::printf("%s\n", name.c_str());
    plain();
    band();
    additive();
    hidden();
    precisions();
    many_callers();
    cancelled();
  }
  return finish();
}
