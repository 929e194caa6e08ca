// A problem in float16 or float32 for kernels of tiles, in parts of bfloat16; a textbook in double.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "tile_case.h"

namespace attncore {
namespace {

/// What is tested.
struct Split {
  const Kernels* kernels;
  DType dtype;
  Precision precision = Precision::highest;
};

using Floats = std::vector<float>;

/// An array in its storage dtype.
struct Stored16 {
  Floats items;
  Halves halves;

  void resize(Index count) {
    items.assign(static_cast<std::size_t>(count), 0);
    halves.assign(items.size(), 0);
  }
  void to_halves() {
    for (std::size_t i = 0; i < items.size(); ++i) {
      Halves lanes(kWidth<Modelled, float>);
      store_as<Modelled, float, DType::f16>(lanes.data(), broadcast<Vec<Modelled, float>>(items[i]));
      halves[i] = lanes[0];
    }
    from_halves();
  }
  void from_halves() {
    for (std::size_t i = 0; i < items.size(); ++i) {
      const auto* const p = reinterpret_cast<const std::byte*>(&halves[i]);
      items[i] = load_items<Modelled, float, DType::f16>(p, 2, 1)[0];
    }
  }
  [[nodiscard]] Tensor tensor(DType dtype, const std::array<Index, 4>& shape) const {
    const auto* const data = dtype == DType::f16 ? static_cast<const void*>(halves.data()) : items.data();
    return Tensor::contiguous(data, dtype, shape);
  }
};

struct SplitCase {
  Shape n;
  Split split;
  Stored16 q, k, v, out;
  Floats lse;
  std::vector<std::uint8_t> mask;  // (queries, keys), or none
  Problem problem;

  SplitCase(const Shape& shape, const Split& s, float score_size = 1) : n(shape), split(s) {
    Random random;
    const auto fill = [&](Stored16& x, Index count, float size) {
      x.resize(count);
      for (float& item : x.items) {
        item = size * (random.number() + random.number() + random.number());  // nearly normal
      }
    };
    fill(q, n.batch * n.heads * n.queries * n.dim, score_size);
    fill(k, n.batch * n.kv_heads * n.keys * n.dim, 1);
    fill(v, n.batch * n.kv_heads * n.keys * n.value_dim, 1);
    out.resize(n.batch * n.heads * n.queries * n.value_dim);
    lse.resize(static_cast<std::size_t>(n.batch * n.heads * n.queries));
    problem.query = q.tensor(split.dtype, {n.batch, n.heads, n.queries, n.dim});
    problem.key = k.tensor(split.dtype, {n.batch, n.kv_heads, n.keys, n.dim});
    problem.value = v.tensor(split.dtype, {n.batch, n.kv_heads, n.keys, n.value_dim});
    problem.out = out.tensor(split.dtype, {n.batch, n.heads, n.queries, n.value_dim});
    problem.lse = Tensor::contiguous(lse.data(), DType::f32, {n.batch, n.heads, n.queries, 1});
    problem.precision = split.precision;
    store();
  }
  SplitCase(const SplitCase&) = delete;
  SplitCase& operator=(const SplitCase&) = delete;
  ~SplitCase() = default;

  /// After changes of items.
  void store() {
    if (split.dtype != DType::f16) return;
    for (Stored16* const x : {&q, &k, &v}) x->to_halves();
  }
  void mask_some() {
    Random random;
    for (Index i = 0; i < n.queries * n.keys; ++i) mask.push_back(random.one_of(3) ? 0 : 1);
    problem.score.mask = Tensor::contiguous(mask.data(), DType::boolean, {1, 1, n.queries, n.keys});
  }
  [[nodiscard]] bool sees(Index query, Index key) const {
    if (problem.score.causal && key > query + n.keys - n.queries) return false;
    return mask.empty() || mask[static_cast<std::size_t>(query * n.keys + key)] != 0;
  }

  void run(const Kernels& kernels, int threads) {
    std::fill(out.items.begin(), out.items.end(), NAN);
    std::fill(out.halves.begin(), out.halves.end(), std::uint16_t{0x7e00});
    const Call call = validate(problem);
    cpu_backend.forward(call, make_plan(call, kernels, Machine{threads}), {.num_threads = threads});
    CHECK(!tiles.configured);
    if (split.dtype == DType::f16) out.from_halves();
  }
  void run(int threads = 1) { run(*split.kernels, threads); }
  void run_baseline() { run(*table_named("baseline").f32, 1); }

  /// Scores of a row, −∞ where hidden; out in double; returns log Σ exp.
  double textbook(Index batch, Index head, Index query, std::vector<double>& row) const {
    const Index kv = (batch * n.kv_heads + head / (n.heads / n.kv_heads)) * n.keys;
    const Index own = ((batch * n.heads + head) * n.queries + query) * n.dim;
    const auto item = [](const Stored16& x, Index i) { return double(x.items[static_cast<std::size_t>(i)]); };
    std::vector<double> p(static_cast<std::size_t>(n.keys), -HUGE_VAL);
    double top = -HUGE_VAL, sum = 0;
    for (Index key = 0; key < n.keys; ++key) {
      if (!sees(query, key)) continue;
      double s = 0;
      for (Index i = 0; i < n.dim; ++i) s += item(q, own + i) * item(k, (kv + key) * n.dim + i);
      p[static_cast<std::size_t>(key)] = s / std::sqrt(double(n.dim));
      top = std::max(top, s / std::sqrt(double(n.dim)));
    }
    for (double& x : p) sum += x = top == -HUGE_VAL ? 0 : std::exp(x - top);
    row.assign(static_cast<std::size_t>(n.value_dim), 0);
    for (Index key = 0; key < n.keys; ++key) {
      const double weight = p[static_cast<std::size_t>(key)] / (sum > 0 ? sum : 1);
      if (weight == 0) continue;
      for (Index i = 0; i < n.value_dim; ++i)
        row[static_cast<std::size_t>(i)] += weight * item(v, (kv + key) * n.value_dim + i);
    }
    return top + std::log(sum);
  }

  struct Error {
    double norm = 0, largest = 0, lse = 0;
  };
  /// Of what was run last.
  [[nodiscard]] Error error() const {
    Error e;
    double size = 0, off = 0;
    std::vector<double> row;
    std::size_t at = 0, at_lse = 0;
    for (Index batch = 0; batch < n.batch; ++batch) {
      for (Index head = 0; head < n.heads; ++head) {
        for (Index query = 0; query < n.queries; ++query) {
          const double want = textbook(batch, head, query, row), got = lse[at_lse++];
          if (want != got) e.lse = std::max(e.lse, std::fabs(want - got) / (1 + std::fabs(want)));
          for (const double x : row) {
            const double d = double(out.items[at++]) - x;
            size += x * x;
            off += d * d;
            e.largest = std::max(e.largest, std::isnan(d) ? HUGE_VAL : std::fabs(d));
          }
        }
      }
    }
    e.norm = size > 0 ? std::sqrt(off / size) : 0;
    return e;
  }
};

}  // namespace
}  // namespace attncore
