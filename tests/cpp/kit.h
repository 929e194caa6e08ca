// What test files share: noise, the comparison of bits, what a call refuses, the shape of a problem.
#pragma once

#include <attncore/attncore.hpp>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "random.h"

/// Of an attention problem: rows of queries and keys, (batch, head, token, dim).
struct Shape {
  attncore::Index batch, heads, kv_heads, queries, keys, dim, value_dim;
};

/// −1 … 1
template <class T = float>
std::vector<T> noise(attncore::Index count, Random& random) {
  std::vector<T> items(static_cast<std::size_t>(count));
  for (T& item : items) item = T(random.number());
  return items;
}

/// Items first … end − 1, to the bit: a NaN is itself, −0 is not 0.
template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b, attncore::Index first, attncore::Index end) {
  const auto at = static_cast<std::size_t>(first), count = static_cast<std::size_t>(end - first);
  return count == 0 || std::memcmp(a.data() + at, b.data() + at, count * sizeof(T)) == 0;
}
template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && same_bits(a, b, 0, static_cast<attncore::Index>(a.size()));
}

/// Whether `run` throws an Error whose message begins so.
template <class Error = std::invalid_argument, class Run>
bool refused(const Run& run, const char* begins) {
  try {
    run();
  } catch (const Error& error) {
    return std::string(error.what()).starts_with(begins);
  }
  return false;
}
