// What many rows must give: near the baseline's, with any options, whatever they don't see.
#pragma once

#include "tile_case.h"

namespace attncore {
namespace {

void plain(const Kernels& kernels) {
  for (const Shape& shape :
       {Shape{1, 1, 1, 9, 1, 1, 1}, Shape{2, 4, 2, 17, 70, 24, 17}, Shape{1, 2, 2, 3, 50, 33, 40},
        Shape{1, 2, 1, 100, 131, 80, 33}, Shape{1, 1, 1, 97, 300, 64, 128}, Shape{1, 1, 1, 20, 2300, 32, 16},
        Shape{1, 1, 1, 130, 2200, 16, 16}, Shape{1, 2, 2, 40, 0, 8, 8}}) {
    TileCase c(shape);
    check(kernels, c);
  }
}

void options(const Kernels& kernels) {
  for (const bool causal : {false, true}) {
    TileCase c({1, 4, 2, 70, 190, 40, 24});
    c.problem.score.causal = causal;
    if (!causal) {
      c.problem.score.left = 30;
      c.problem.score.right = 7;
    }
    c.mask.resize(190);
    Random random;
    for (std::uint8_t& seen : c.mask) seen = random.one_of(3) ? 0 : 1;
    c.problem.score.mask = Tensor::contiguous(c.mask.data(), DType::boolean, {1, 1, 1, 190});
    check(kernels, c);
    c.problem.dropout = {.probability = 0.25, .seed = 5};
    check(kernels, c);
  }
}

/// A row's bits depend on itself and the keys that it sees: not on other rows, nor on what it does not see.
void rows_alone(const Kernels& kernels) {
  const Shape shape{1, 1, 1, 70, 150, 40, 40};
  const Index seen_after = shape.keys - shape.queries + 30;  // by rows from 30 on
  TileCase all(shape);
  all.problem.score.causal = true;
  all.run(kernels, 1);
  const Halves want = all.out;

  TileCase fewer({1, 1, 1, 37, 150, 40, 40});
  fewer.problem.score.causal = true;
  fewer.q.assign(all.q.end() - 37 * 40, all.q.end());
  fewer.k = all.k;
  fewer.v = all.v;
  fewer.problem.query.data = fewer.q.data();
  fewer.problem.key.data = fewer.k.data();
  fewer.problem.value.data = fewer.v.data();
  fewer.run(kernels, 1);
  CHECK(std::equal(fewer.out.begin(), fewer.out.end(), want.end() - 37 * 40));

  constexpr std::uint16_t kPoison[] = {0x7f80, 0xff80, 0x7fc0};  // Inf, −Inf, NaN
  for (Index i = 0; i < shape.dim; ++i) {
    all.v[static_cast<std::size_t>(seen_after * shape.value_dim + i)] = kPoison[i % 3];
    all.k[static_cast<std::size_t>(seen_after * shape.dim + i)] = i == 3 ? 0x7fc0 : 0;
  }
  all.run(kernels, 1);
  CHECK(std::equal(want.begin(), want.begin() + 30 * 40, all.out.begin()));
  for (std::size_t i = std::size_t{30} * 40; i < want.size(); ++i) CHECK(all.out[i] == 0x7fc0);
}

/// Scores that a bias of zeros passes through have the bits of those that nothing touches; 1/√64 is a power of two, 1/√40 is not.
void biased_by_zero(const Kernels& kernels, Index queries) {
  for (const Index dim : {64, 40}) {
    TileCase c({1, 2, 1, queries, 330, dim, 48});
    for (std::size_t i = 0; i < c.k.size(); i += 7) c.k[i] = narrow(3.0F * static_cast<float>(i % 5));
    c.run(kernels, 1);
    const Halves out = c.out;
    const std::vector<float> lse = c.lse;
    std::vector<float> zero(1);
    c.problem.score.biases.items[0] = Tensor::contiguous(zero.data(), DType::f32, {1, 1, 1, 1});
    c.problem.score.biases.size = 1;
    c.run(kernels, 1);
    CHECK(c.out == out);
    CHECK(same_bits(c.lse, lse));
    check(kernels, c);
    c.problem.dropout = {.probability = 0.25, .seed = 5};
    check(kernels, c);
    c.run(kernels, 1);
    CHECK(same_bits(c.lse, lse));  // which knows nothing of it
  }
}

void check_forward(const Kernels& kernels) {
  plain(kernels);
  options(kernels);
  for (const Index queries : {40, 75, 200}) biased_by_zero(kernels, queries);
  rows_alone(kernels);
  CHECK(kernels.multiply_adds(3) > 0);
}

}  // namespace
}  // namespace attncore
