// Forward attention of float16 and float32 by kernels of tiles, in parts of bfloat16, beside a textbook in double and the
// baseline's products of float32.
#pragma once

#include "split_case.h"

namespace attncore {
namespace {

/// Any number of threads, the same bits; errors as those of float32's products, or of two parts.
void check(SplitCase& c) {
  c.run();
  const Floats out = c.out.items, lse = c.lse;
  for (const int threads : {2, 3}) {
    c.run(threads);
    CHECK(same_bits(c.out.items, out));
    CHECK(same_bits(c.lse, lse));
  }
  const SplitCase::Error ours = c.error();
  c.run_baseline();
  const SplitCase::Error theirs = c.error();
  if (c.split.precision == Precision::high) {
    CHECK(ours.norm < 6e-5 && ours.lse < 1e-5);
  } else {
    CHECK(ours.norm <= 1.1 * theirs.norm && ours.largest <= 1.2 * theirs.largest + 1e-7);
    CHECK(ours.lse <= 1.5 * theirs.lse + 6e-8);
  }
}

void plain(const Split& split) {
  for (const Shape& shape :
       {Shape{1, 1, 1, 9, 1, 1, 1}, Shape{2, 4, 2, 17, 70, 24, 17}, Shape{1, 2, 2, 3, 50, 33, 40},
        Shape{1, 2, 1, 100, 131, 80, 33}, Shape{1, 1, 1, 97, 300, 64, 128}, Shape{1, 1, 1, 20, 2300, 32, 16},
        Shape{1, 1, 1, 130, 2200, 16, 16}, Shape{1, 2, 2, 40, 0, 8, 8}}) {
    SplitCase c(shape, split);
    check(c);
  }
  for (const float size : {30.0F, 1e4F}) {
    SplitCase c({1, 1, 1, 97, 300, 64, 32}, split, size);
    check(c);
  }
  for (const bool causal : {false, true}) {
    SplitCase c({1, 4, 2, 70, 190, 40, 24}, split);
    c.problem.score.causal = causal;
    c.mask_some();
    check(c);
  }
}

/// As floats are: the same infinities and NaN, and else near.
void check_like_baseline(SplitCase& c) {
  const Floats ours = c.out.items;
  c.run_baseline();
  float largest = 0;
  for (const float x : c.out.items) {
    if (std::isfinite(x)) largest = std::max(largest, std::fabs(x));
  }
  const float bound = largest * (c.split.dtype == DType::f16            ? 0x1p-10F
                                 : c.split.precision == Precision::high ? 1e-4F
                                                                        : 2e-6F);
  for (std::size_t i = 0; i < ours.size(); ++i) {
    const float a = ours[i], b = c.out.items[i];
    CHECK(std::isnan(b) ? std::isnan(a) : a == b || std::fabs(a - b) <= bound);
  }
}

/// What a split would harm, in a key, a value or a query: only rows that see it differ, and they are what floats give.
void harmed(const Split& split) {
  const Shape shape{1, 1, 1, 70, 150, 40, 36};
  const Index from = 30, key = shape.keys - shape.queries + from;  // which rows from 30 on see
  const Index next = key + 8;  // past what the rows before 32 see, in their key tile
  SplitCase c(shape, split);
  c.problem.score.causal = true;
  c.run();
  const Floats out = c.out.items, lse = c.lse;
  Floats poison{HUGE_VALF, -HUGE_VALF, NAN, float(0x1p-120), -float(0x1p-140)};
  if (split.dtype == DType::f16) poison.resize(3);
  for (const float x : poison) {
    const Floats k = c.k.items, v = c.v.items, q = c.q.items;
    for (const Index at : {key, next}) c.v.items[static_cast<std::size_t>(at * shape.value_dim + 5)] = x;
    c.store();
    c.run();
    CHECK(same_bits(c.out.items, out, 0, from * shape.value_dim) && c.lse == lse);
    check_like_baseline(c);

    for (const Index at : {key, next}) c.k.items[static_cast<std::size_t>(at * shape.dim + 7)] = x;
    c.store();
    c.run();
    CHECK(same_bits(c.out.items, out, 0, from * shape.value_dim) && same_bits(c.lse, lse, 0, from));
    check_like_baseline(c);
    c.k.items = k;
    c.v.items = v;

    c.q.items[static_cast<std::size_t>(from * shape.dim + 7)] = x;
    c.store();
    c.run();
    CHECK(same_bits(c.out.items, out, 0, from * shape.value_dim));
    CHECK(same_bits(c.out.items, out, (from + 1) * shape.value_dim, shape.queries * shape.value_dim));
    check_like_baseline(c);
    c.q.items = q;
    c.store();
  }
}

/// Scores that a bias of zeros passes through have the bits of those that nothing touches; lse knows nothing of dropout.
void biased_by_zero(const Split& split) {
  for (const Index dim : {64, 40}) {
    SplitCase c({1, 2, 1, 75, 330, dim, 48}, split);
    for (std::size_t i = 0; i < c.k.items.size(); i += 7) c.k.items[i] = 3.0F * static_cast<float>(i % 5);
    c.store();
    c.run();
    const Floats out = c.out.items, lse = c.lse;
    Floats zero(1);
    c.problem.score.biases.items[0] = Tensor::contiguous(zero.data(), DType::f32, {1, 1, 1, 1});
    c.problem.score.biases.size = 1;
    check(c);
    c.run();
    CHECK(same_bits(c.out.items, out));
    CHECK(same_bits(c.lse, lse));
    for (const bool biased : {true, false}) {
      c.problem.score.biases.size = biased ? 1 : 0;
      c.problem.dropout = {.probability = 0.25, .seed = 5};
      c.run();
      CHECK(same_bits(c.lse, lse));
      check_like_baseline(c);
    }
  }
}

/// Windows, masks, softcap, sinks and dropout: as the baseline has them, whatever the threads.
void options(const Split& split) {
  for (const bool softcap : {false, true}) {
    SplitCase c({1, 4, 2, 70, 190, 40, 24}, split);
    c.problem.score.left = 30;
    c.problem.score.right = 7;
    c.mask_some();
    const Floats sinks{0.5F, -1, 2, 0};
    if (softcap) {
      c.problem.score.softcap = 2;
      c.problem.score.sinks = Tensor::contiguous(sinks.data(), DType::f32, {1, 4, 1, 1});
    }
    for (const bool dropout : {false, true}) {
      if (dropout) c.problem.dropout = {.probability = 0.25, .seed = 5};
      c.run(3);
      const Floats out = c.out.items, lse = c.lse;
      c.run();
      CHECK(same_bits(c.out.items, out));
      CHECK(same_bits(c.lse, lse));
      check_like_baseline(c);
    }
  }
}

/// Numbers that only floats can hold, all of them: digits are not lost.
void tiny(const Split& split) {
  if (split.dtype != DType::f32) return;
  for (const bool values : {false, true}) {
    SplitCase c({1, 1, 1, 40, 150, 33, 20}, split);
    for (float& x : c.k.items) x *= values ? 1 : 0x1p-110F;
    for (float& x : c.q.items) x *= values ? 1 : 0x1p+110F;
    for (float& x : c.v.items) x *= values ? 0x1p-110F : 1;
    c.mask_some();
    c.run();
    CHECK(c.error().norm < (split.precision == Precision::high ? 6e-5 : 5e-7));
  }
}

/// A row's bits do not depend on others.
void alone(const Split& split) {
  const Shape shape{1, 1, 1, 70, 150, 40, 40}, last{1, 1, 1, 37, 150, 40, 40};
  SplitCase all(shape, split), some(last, split);
  const auto tail = [](Stored16& to, const Stored16& of) {
    const auto count = static_cast<std::ptrdiff_t>(to.items.size());
    std::copy(of.items.end() - count, of.items.end(), to.items.begin());
  };
  for (SplitCase* const c : {&all, &some}) c->problem.score.causal = true;
  tail(some.q, all.q);
  tail(some.k, all.k);
  tail(some.v, all.v);
  some.store();
  all.run();
  some.run();
  CHECK(std::equal(some.out.items.begin(), some.out.items.end(),
                   all.out.items.end() - static_cast<std::ptrdiff_t>(some.out.items.size())));
}

void check_split(const Split& split) {
  plain(split);
  options(split);
  biased_by_zero(split);
  harmed(split);
  tiny(split);
  alone(split);
  CHECK(split.kernels->multiply_adds(3) > 0);
}

/// float32 as one bfloat16, of items that are such: weights alone are rounded.  A bias of finfo.min hides a key.
void check_medium(const Kernels& kernels) {
  for (const Shape& shape : {Shape{2, 4, 2, 17, 70, 24, 17}, Shape{1, 2, 1, 100, 431, 80, 33}}) {
    SplitCase c(shape, {&kernels, DType::f32, Precision::medium}, 3);
    for (Stored16* const x : {&c.q, &c.k, &c.v}) {
      for (float& item : x->items) item = bf16_value(narrow(item));
    }
    c.mask_some();
    c.run();
    const SplitCase::Error error = c.error();
    CHECK(error.norm < 3e-3 && error.lse < 3e-6);
    const Floats out = c.out.items, lse = c.lse;

    Floats bias;
    for (const std::uint8_t seen : c.mask) bias.push_back(seen != 0 ? 0 : -std::numeric_limits<float>::max());
    std::fill(bias.begin(), bias.begin() + shape.keys, -std::numeric_limits<float>::max());  // all of a row
    std::fill(c.mask.begin(), c.mask.begin() + shape.keys, std::uint8_t{0});
    c.problem.score.mask = {};
    c.problem.score.biases.size = 1;
    c.problem.score.biases.items[0] =
        Tensor::contiguous(bias.data(), DType::f32, {1, 1, shape.queries, shape.keys});
    c.run();
    for (Index row = 0; row < static_cast<Index>(lse.size()); ++row) {
      const Index first = row * shape.value_dim, end = first + shape.value_dim;
      if (row % shape.queries != 0) {
        CHECK(same_bits(c.out.items, out, first, end) && same_bits(c.lse, lse, row, row + 1));
      } else {
        CHECK(c.lse[static_cast<std::size_t>(row)] == -std::numeric_limits<float>::max());
        for (Index i = first; i < end; ++i) CHECK(std::isfinite(c.out.items[static_cast<std::size_t>(i)]));
      }
    }
  }
}

}  // namespace
}  // namespace attncore
