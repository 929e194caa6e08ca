// Forward attention of bfloat16 by kernels of tiles, through plans and back end, beside the baseline's.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "backend.h"
#include "cpu/dispatch.h"
#include "kit.h"
#include "tile_model.h"

namespace attncore {
namespace {

using Halves = std::vector<std::uint16_t>;

std::uint16_t narrow(float x) {
  std::uint16_t halves[kWidth<Modelled, float>];
  store_as<Modelled, float, DType::bf16>(halves, broadcast<Vec<Modelled, float>>(x));
  return halves[0];
}

Halves noise_of_halves(Index count, Random& random) {
  Halves x(static_cast<std::size_t>(count));
  for (std::uint16_t& item : x) item = narrow(2 * random.number());
  return x;
}

struct TileCase {
  Shape n;
  Halves q, k, v, out;
  std::vector<float> lse;
  std::vector<std::uint8_t> mask;
  Problem problem;

  explicit TileCase(const Shape& shape) : n(shape) {
    Random random;
    q = noise_of_halves(n.batch * n.heads * n.queries * n.dim, random);
    k = noise_of_halves(n.batch * n.kv_heads * n.keys * n.dim, random);
    v = noise_of_halves(n.batch * n.kv_heads * n.keys * n.value_dim, random);
    out.resize(static_cast<std::size_t>(n.batch * n.heads * n.queries * n.value_dim));
    lse.resize(static_cast<std::size_t>(n.batch * n.heads * n.queries));
    problem.query = Tensor::contiguous(q.data(), DType::bf16, {n.batch, n.heads, n.queries, n.dim});
    problem.key = Tensor::contiguous(k.data(), DType::bf16, {n.batch, n.kv_heads, n.keys, n.dim});
    problem.value = Tensor::contiguous(v.data(), DType::bf16, {n.batch, n.kv_heads, n.keys, n.value_dim});
    problem.out = Tensor::contiguous(out.data(), DType::bf16, {n.batch, n.heads, n.queries, n.value_dim});
    problem.lse = Tensor::contiguous(lse.data(), DType::f32, {n.batch, n.heads, n.queries, 1});
  }
  TileCase(const TileCase&) = delete;
  TileCase& operator=(const TileCase&) = delete;
  ~TileCase() = default;

  void run(const Kernels& kernels, int threads) {
    std::fill(out.begin(), out.end(), std::uint16_t{0x7fc0});
    const Call call = validate(problem);
    cpu_backend.forward(call, make_plan(call, kernels, Machine{threads}), {.num_threads = threads});
    CHECK(!tiles.configured);
  }
  void run_baseline() {
    use_isa("baseline");
    forward(problem, {.num_threads = 1});
  }
};

/// Any number of threads, the same bits; each output within the rounding of weights and of itself, 2⁻⁹ each (at worst twice that), of the baseline's.
[[maybe_unused]] void check(const Kernels& kernels, TileCase& c) {
  c.run(kernels, 1);
  const Halves out = c.out;
  const std::vector<float> lse = c.lse;
  for (const int threads : {2, 3}) {
    c.run(kernels, threads);
    CHECK(c.out == out);
    CHECK(same_bits(c.lse, lse));
  }
  c.run_baseline();
  const Halves want = c.out;
  constexpr float kLseError = 4e-7F;
  for (std::size_t i = 0; i < lse.size(); ++i) {
    CHECK(lse[i] == c.lse[i] || std::fabs(lse[i] - c.lse[i]) <= kLseError * (1 + std::fabs(lse[i])));
  }
  for (std::uint16_t& item : c.v) item &= 0x7fff;
  c.run_baseline();  // Σ weight · |value|
  constexpr float kRounding = 0x1p-9F;
  for (std::size_t i = 0; i < out.size(); ++i) {
    const float a = bf16_value(out[i]), b = bf16_value(want[i]), size = bf16_value(c.out[i]);
    CHECK(std::fabs(a - b) <= kRounding * (std::fabs(a) + std::fabs(b) + 2 * size));
  }
}

}  // namespace
}  // namespace attncore
