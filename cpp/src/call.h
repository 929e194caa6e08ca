// A call is a validated problem with its defaults resolved: what plans and kernels read.
#pragma once

#include <attncore/attncore.hpp>

#include "inline.h"

namespace attncore {

/// Keys or rows begin … end − 1.
struct Range {
  Index begin = 0, end = 0;
  ATTN_FN constexpr Index size() const noexcept { return end > begin ? end - begin : 0; }
  ATTN_FN constexpr bool empty() const noexcept { return end <= begin; }
};

ATTN_FN constexpr Index min(Index a, Index b) noexcept { return b < a ? b : a; }
ATTN_FN constexpr Index max(Index a, Index b) noexcept { return a < b ? b : a; }
ATTN_FN constexpr Range intersect(Range a, Range b) noexcept {
  return {max(a.begin, b.begin), min(a.end, b.end)};
}
ATTN_FN constexpr Index ceil_div(Index a, Index b) noexcept { return (a + b - 1) / b; }
ATTN_FN constexpr Index round_up(Index a, Index b) noexcept { return ceil_div(a, b) * b; }

/// What items of a dtype are accumulated in: f64 for f64, else f32.
ATTN_FN constexpr DType accumulation(DType dtype) noexcept {
  return dtype == DType::f64 ? DType::f64 : DType::f32;
}

/// Where a sequence's tokens stand in an array (batch, head, token, dim): `tokens` of them from `first` on.
struct Place {
  Index batch = 0, first = 0, tokens = 0;
};

/// One batch entry: `queries` rows against `keys` keys; query i stands at position i + offset.  There may be room for
/// more tokens, which do not exist.
struct Sequence {
  Index batch = 0, queries = 0, keys = 0, offset = 0;
  Place query_place, key_place;
  Index first_page = 0;  // where its numbers begin in Call::pages
};

/// The keys or values of one head of one sequence, where they lie.
struct KeySource {
  const std::byte* data = nullptr;
  Index token_stride = 0, dim_stride = 0;  // in bytes
  DType storage = DType::f32;
  const std::int32_t* pages = nullptr;  // paged: the page of each `page_size` tokens
  Index page_size = 0, page_stride = 0;

  [[nodiscard]] ATTN_FN const std::byte* token(Index i) const noexcept {
    if (pages == nullptr) return data + i * token_stride;
    return data + pages[i / page_size] * page_stride + i % page_size * token_stride;
  }
};

/// A relative bias by distance: entry (head, d) is the table's at the bucket of key − position = d, −farthest ≤ d ≤
/// farthest; farther ones are as the ends.
struct DistanceBias {
  const std::byte* line = nullptr;       // (heads, distances), of the accumulation type
  const std::int32_t* bucket = nullptr;  // (distances)
  Index farthest = 0, buckets = 0;
  std::shared_ptr<const std::byte[]> memory;
  [[nodiscard]] ATTN_FN bool given() const noexcept { return line != nullptr; }
  [[nodiscard]] ATTN_FN Index distances() const noexcept { return 2 * farthest + 1; }
};

/// Who descends from whom among the new tokens: bit a % 64 of word a / 64 of query i's line says that a is an ancestor of i,
/// or i.  Lines stand where query's tokens do.
struct Tree {
  const std::uint64_t* lines = nullptr;  // (entry, token, words)
  Index words = 0, stride = 0;           // of a line; from one entry to the next, in words
  std::shared_ptr<const std::uint64_t[]> memory;
  [[nodiscard]] ATTN_FN bool given() const noexcept { return lines != nullptr; }
  [[nodiscard]] ATTN_FN const std::uint64_t* line(Index entry, Index token) const noexcept {
    return lines + entry * stride + token * words;
  }
};

/// The keys of each query's segment, a range of its sequence's keys that never moves back from a query to the next; kNone for all queries of a
/// sequence whose segments are not such.  Ranges stand where query's tokens do.
struct SegmentRanges {
  static constexpr Range kNone{-1, -1};
  const Range* of_query = nullptr;  // (entry, token)
  Index tokens = 0;                 // of an entry
  std::shared_ptr<const Range[]> memory;

  [[nodiscard]] ATTN_FN bool given() const noexcept { return of_query != nullptr; }
  [[nodiscard]] ATTN_FN const Range& of(Index entry, Index token) const noexcept {
    return of_query[entry * tokens + token];
  }
  /// Those of a sequence's queries; null if it has none.
  [[nodiscard]] ATTN_FN const Range* of(const Place& queries) const noexcept {
    if (!given() || queries.tokens == 0) return nullptr;
    const Range& first = of(queries.batch, queries.first);
    return first.begin < 0 ? nullptr : &first;
  }
};

/// The pages of all sequences, one after another.
struct Pages {
  const std::int32_t* numbers = nullptr;
  Index size = 0;  // tokens of a page
  std::shared_ptr<const std::int32_t[]> memory;
  [[nodiscard]] ATTN_FN bool given() const noexcept { return numbers != nullptr; }
};

/// A call's dropout, as kernels read it.
struct Coins {
  std::uint64_t seed = 0;
  std::uint32_t dropped = 0;  // of 65536
  [[nodiscard]] ATTN_FN constexpr bool given() const noexcept { return dropped > 0; }
  /// What kept weights are multiplied by.
  [[nodiscard]] ATTN_FN constexpr double factor() const noexcept { return 65536.0 / (65536.0 - dropped); }
};

struct Call {
  Tensor query, key, value, out, lse;
  Tensor key_scale, value_scale;
  Tensor sum;   // for AttentionState, like lse: Σ exp(score − maximum); lse is the maximum then
  Score score;  // masks and biases broadcast (stride 0), causal folded into right, every default in place
  double scale = 1, softcap = 0;                        // softcap 0: none
  Index batch = 0, heads = 0, kv_heads = 0, group = 1;  // group: the query heads that share a KV head
  Index queries = 0, keys = 0;  // of the longest batch entry: the extents of masks and biases
  Index dim = 0, value_dim = 0;

  /// The accumulation type: f64 for f64, else f32.
  [[nodiscard]] ATTN_FN DType compute() const noexcept { return accumulation(query.dtype); }
  /// A batch entry's.  Lengths, offsets, pages and parents are read once, by resolve(): the caller's memory may
  /// change meanwhile.
  [[nodiscard]] Sequence sequence(Index entry) const noexcept {
    if (!sequences.empty()) return sequences[static_cast<std::size_t>(entry)];
    return {entry, queries, keys, keys - queries, {entry, 0, queries}, {entry, 0, keys}};
  }
  DistanceBias distance_bias;
  SegmentRanges segments;
  Tree tree;
  Pages pages;
  Coins dropout;
  Precision precision = Precision::highest;  // below it only where query, key and value are f32
  std::vector<Sequence> sequences;           // empty where all are alike
};

/// A validated call of attention_weights.
struct WeightsCall {
  Call call;
  Weights weights;          // but for its rows, which are
  std::vector<Index> rows;  // (1 or batch, rows), read once; empty: all
};

/// A validated call of backward: out and lse are inputs there.
struct BackwardCall {
  Call call;
  Gradients gradients;  // biases' gradients broadcast as the biases do: stride 0 where they are sums
};

ATTN_FN std::byte* at(const Tensor& t, Index batch, Index head, Index token = 0, Index dim = 0) noexcept {
  return static_cast<std::byte*>(t.data) + batch * t.stride[0] + head * t.stride[1] + token * t.stride[2] +
         dim * t.stride[3];
}

/// Of key, value or their scales.
ATTN_FN KeySource key_source(const Call& call, const Tensor& t, const Sequence& sequence,
                             Index kv_head) noexcept {
  if (call.pages.given()) {
    const std::int32_t* const pages = call.pages.numbers + sequence.first_page;
    return {at(t, 0, kv_head), t.stride[2], t.stride[3], t.dtype, pages, call.pages.size, t.stride[0]};
  }
  const Place& place = sequence.key_place;
  return {at(t, place.batch, kv_head, place.first), t.stride[2], t.stride[3], t.dtype};
}

/// Reads the i32 or i64 at `at`.
ATTN_FN Index read_int(const std::byte* at, DType dtype) noexcept {
  if (dtype == DType::i64) {
    std::int64_t value = 0;
    __builtin_memcpy(&value, at, sizeof value);
    return value;
  }
  std::int32_t value = 0;
  __builtin_memcpy(&value, at, sizeof value);
  return value;
}

/// validate.cpp: every precondition.  Throws; otherwise the call is safe to plan and run.
Call validate(const Problem& problem);
WeightsCall validate(const Problem& problem, const Weights& weights);
BackwardCall validate(const Problem& problem, const Gradients& gradients);

}  // namespace attncore
