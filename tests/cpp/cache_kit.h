// What the tests of caches share: tokens of random numbers, calls, what an entry holds.
#pragma once

#include <attncore/cache.hpp>
#include <vector>

#include "check.h"
#include "kit.h"

using namespace attncore;

constexpr Index kHeads = 2, kDim = 6, kEntries = 3, kCapacity = 60;

using Row = std::vector<float>;  // a token: (head, dim)
using Rows = std::vector<Row>;

inline CacheSettings settings(DType dtype = DType::f32, Index window = kUnbounded) {
  return {.kv_heads = kHeads, .dim = kDim, .dtype = dtype, .window = window};
}

inline Tensor ints(const std::vector<Index>& numbers) {
  return Tensor::contiguous(numbers.data(), DType::i64, {static_cast<Index>(numbers.size()), 1, 1, 1});
}

/// (entries, kHeads, tokens, kDim) random numbers.
struct Tokens {
  std::vector<float> memory;
  Tensor tensor;

  Tokens(Index entries, Index tokens, Random& random)
      : memory(noise(entries * kHeads * tokens * kDim, random)) {
    tensor = Tensor::contiguous(memory.data(), DType::f32, {entries, kHeads, tokens, kDim});
  }
  [[nodiscard]] Row row(Index entry, Index token) const {
    Row row;
    for (Index head = 0; head < kHeads; ++head) {
      const Index first = ((entry * kHeads + head) * tensor.shape[2] + token) * kDim;
      row.insert(row.end(), memory.begin() + first, memory.begin() + first + kDim);
    }
    return row;
  }
};

template <class Cache>
void append(Cache& cache, const Tensor& tokens, const std::vector<Index>& entries,
            const std::vector<Index>& lengths = {}, const Options& options = {}) {
  cache.append({.key = tokens, .value = tokens, .lengths = lengths.empty() ? Tensor{} : ints(lengths)},
               ints(entries), options);
}

/// What an entry holds from token `first` on; its values are its keys.
template <class Cache>
Rows gathered(const Cache& cache, Index entry, Index first = 0) {
  const Index tokens = cache.length(entry) - first;
  std::vector<float> key(static_cast<std::size_t>(kHeads * tokens * kDim) + 1), value(key.size());
  const std::array<Index, 4> shape{1, kHeads, tokens, kDim};
  cache.gather(entry, first, Tensor::contiguous(key.data(), DType::f32, shape),
               Tensor::contiguous(value.data(), DType::f32, shape));
  CHECK(key == value);
  Rows rows(static_cast<std::size_t>(tokens));
  for (Index head = 0; head < kHeads; ++head) {
    for (Index token = 0; token < tokens; ++token) {
      const auto from = key.begin() + (head * tokens + token) * kDim;
      Row& row = rows[static_cast<std::size_t>(token)];
      row.insert(row.end(), from, from + kDim);
    }
  }
  return rows;
}

/// A query of each head of some entries.
struct Query {
  std::vector<float> query, out;
  Problem problem;

  explicit Query(Index entries)
      : query(static_cast<std::size_t>(entries * kHeads * kDim), 0.5F), out(query.size()) {
    problem.query = Tensor::contiguous(query.data(), DType::f32, {entries, kHeads, 1, kDim});
    problem.out = Tensor::contiguous(out.data(), DType::f32, problem.query.shape);
    problem.score.causal = true;
  }
  template <class Cache>
  std::vector<float> of(const Cache& cache, const Tensor& entries = {}, const Options& options = {}) {
    cache.attend(problem, entries, options);
    return out;
  }
};
