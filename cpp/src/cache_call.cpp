#include "cache_call.h"

namespace attncore {
namespace {

using std::to_string;

constexpr Index kMostPages = std::numeric_limits<std::int32_t>::max();
constexpr AxisNames kAxes{"entries", "kv_heads", "tokens", "dim"};

void require_rotary(const Rope& rotary, const CacheSettings& s) {
  if (rotary.positions.given()) reject("rotary", "has positions, which come with the tokens");
  const Index dim = s.dim - first_rotated(s);
  if (dim == 0) reject("rotary", "is given, but all dims of keys are values, which are not rotated");
  require_rope(rotary, dim);
}

/// A paged cache begins with no entries.
void require_entries(Index given, Index entries) {
  if (given > 0 && entries == 0)
    reject("entries", "there are none: a paged cache begins without, add() makes one");
}

void require_no_value(const CacheSettings& s, const Tensor& value) {
  if (value.given())
    reject("value", "is given, the cache's values are the first " + to_string(s.value_dim) + " dims of keys");
}

void require_tokens(const char* argument, const Tensor& t, const Shape& shape) {
  require_given(argument, t);
  require_float(argument, t);
  require_shape(argument, t, shape, kAxes);
}

}  // namespace

CacheSettings require_settings(const CacheSettings& settings, const char* extent_name, Index extent,
                               const char* slots_name, Index slots) {
  CacheSettings s = settings;
  require_range(extent_name, extent, kMostPages);
  require_range(slots_name, slots, Index{1} << 48);
  require_range("kv_heads", s.kv_heads, kMostDims);
  require_range("dim", s.dim, kMostDims);
  if (s.value_dim == 0) s.value_dim = s.dim;
  require_range("value_dim", s.value_dim, s.value_in_key ? s.dim : kMostDims);
  require_stored("dtype", {.dtype = s.dtype});
  for (const auto& [argument, dim] : {std::pair{"dim", s.dim}, std::pair{"value_dim", s.value_dim}}) {
    if (s.dtype == DType::i4 && dim % 2 != 0)
      reject(argument, "is " + to_string(dim) + ", must be even for int4");
  }
  if (s.window < 0) reject("window", "is " + to_string(s.window) + ", must be at least 0");
  if (s.rotary) require_rotary(*s.rotary, s);
  return s;
}

void reject_entry(Index number) {
  reject("entry", "is " + to_string(number) + ", which the cache does not have");
}

std::vector<Index> require_new_tokens(const CacheSettings& s, const NewTokens& tokens, Index entries) {
  const Index count = tokens.key.shape[2];
  require_entries(tokens.key.shape[0], entries);
  require_tokens("key", tokens.key, {entries, s.kv_heads, count, s.dim});
  if (s.value_in_key) {
    require_no_value(s, tokens.value);
  } else {
    require_tokens("value", tokens.value, {entries, s.kv_heads, count, s.value_dim});
  }
  if (const Tensor& positions = tokens.positions; is_given("positions", positions)) {
    if (!s.rotary) reject("positions", "is given, but the cache has no rotary embedding");
    require_ints("positions", positions, {positions.shape[0] == 1 ? 1 : entries, 1, count, 1},
                 {"1 or entries", "", "tokens"});
  }
  std::vector<Index> counts(static_cast<std::size_t>(entries), count);
  if (!is_given("lengths", tokens.lengths)) return counts;
  require_ints("lengths", tokens.lengths, {entries, 1, 1, 1}, {"entries"});
  for (Index i = 0; i < entries; ++i) {
    Index& length = counts[static_cast<std::size_t>(i)];
    length = read_int(at(tokens.lengths, i, 0), tokens.lengths.dtype);
    if (length < 0 || length > count) {
      reject("lengths",
             "entry " + to_string(i) + " is " + to_string(length) + ", must be 0 … " + to_string(count));
    }
  }
  return counts;
}

Incoming incoming(const NewTokens& tokens, Index row, Index count) {
  const Index row_of_positions = tokens.positions.shape[0] == 1 ? 0 : row;
  Incoming result;
  result.key = tokens_of(tokens.key, row, 0, count);
  result.value = tokens_of(tokens.value, row, 0, count);
  result.positions = tokens_of(tokens.positions, row_of_positions, 0, count);
  return result;
}

std::vector<Index> require_new_lengths(const Tensor& given, const std::vector<Index>& entries,
                                       const std::vector<Index>& lengths) {
  const auto count = static_cast<Index>(entries.size());
  if (!given.given()) reject("lengths", "is not given");
  Tensor t = given;
  require_dtype("lengths", t, {DType::i32, DType::i64});
  broadcast_to("lengths", t, {count, 1, 1, 1}, {"entries"});
  std::vector<Index> result;
  result.reserve(entries.size());
  for (Index i = 0; i < count; ++i) {
    const auto place = static_cast<std::size_t>(i);
    const Index length = read_int(at(t, i, 0), t.dtype);
    if (length < 0 || length > lengths[place]) {
      reject("lengths", "is " + to_string(length) + " for entry " + to_string(entries[place]) +
                            ", must be 0 … " + to_string(lengths[place]) + ", its length");
    }
    result.push_back(length);
  }
  return result;
}

std::vector<Branch> require_branches(const Tensor& branch, const Tensor& new_tokens,
                                     const std::vector<Index>& entries, const std::vector<Index>& lengths) {
  const auto count = static_cast<Index>(entries.size());
  Tensor kept = branch, all = new_tokens;
  for (const auto& [argument, t] : {Named{"branch", &kept}, Named{"new_tokens", &all}}) {
    if (!t->given()) reject(argument, "is not given");
    require_dtype(argument, *t, {DType::i32, DType::i64});
  }
  broadcast_to("branch", kept, {count, 1, kept.shape[2], 1}, {"entries", "", "tokens"});
  broadcast_to("new_tokens", all, {count, 1, 1, 1}, {"entries"});
  std::vector<Branch> branches;
  for (Index i = 0; i < count; ++i) {
    const Index length = lengths[static_cast<std::size_t>(i)], last = read_int(at(all, i, 0), all.dtype);
    const std::string entry = " for entry " + to_string(entries[static_cast<std::size_t>(i)]);
    if (last < 0 || last > length)
      reject("new_tokens",
             "is " + to_string(last) + entry + ", must be 0 … " + to_string(length) + ", its length");
    Branch found{.first = length - last};
    for (Index k = 0, least = 0; k < kept.shape[2]; ++k) {
      const Index token = read_int(at(kept, i, 0, k), kept.dtype);
      if (token == -1) break;
      if (token < least || token >= last) {
        reject("branch", "has " + to_string(token) + entry + ", must be above " + to_string(least - 1) +
                             " there and below " + to_string(last) + ", or -1");
      }
      found.from.push_back(found.first + token);
      least = token + 1;
    }
    branches.push_back(std::move(found));
  }
  return branches;
}

Problem require_attend(const Problem& given, const CacheSettings& settings,
                       const std::vector<Index>& lengths) {
  for (const auto& [argument, t] : {Named{"key", &given.key},
                                    {"value", &given.value},
                                    {"key_scale", &given.key_scale},
                                    {"value_scale", &given.value_scale},
                                    {"query_tokens", &given.packing.query_tokens},
                                    {"key_tokens", &given.packing.key_tokens},
                                    {"block_table", &given.paging.block_table},
                                    {"key_lengths", &given.score.key_lengths},
                                    {"query_offset", &given.score.query_offset},
                                    {"query_segments", &given.score.query_segments},
                                    {"key_segments", &given.score.key_segments}}) {
    if (t->given()) reject(argument, "is given, it must be left to the cache");
  }
  const auto entries = static_cast<Index>(lengths.size());
  const Tensor& query = given.query;
  require_entries(query.shape[0], entries);
  if ((query.dtype == DType::f64) != (settings.dtype == DType::f64)) {
    throw DTypeError(std::string("query: dtype is ") + name(query.dtype) + ", a cache of " +
                     name(settings.dtype) + " accepts " +
                     (settings.dtype == DType::f64 ? "float64" : "float32, float16 and bfloat16"));
  }
  if (query.shape[0] != entries) {
    reject("query", "shape is " + shape_text(query.shape) + ", its first axis must be " + to_string(entries) +
                        ", the number of entries");
  }
  if (query.shape[3] != settings.dim) {
    reject("query", "shape is " + shape_text(query.shape) + ", its last axis must be " +
                        to_string(settings.dim) + ", the cache's dim");
  }
  if (query.shape[1] < 1 || query.shape[1] % settings.kv_heads != 0) {
    reject("query", "has " + to_string(query.shape[1]) + " heads, must have a multiple of " +
                        to_string(settings.kv_heads) + ", the cache's kv_heads");
  }
  Problem problem = given;
  problem.score.key_lengths = ints(lengths);
  problem.score.left = min(problem.score.left, settings.window);
  return problem;
}

Range require_gathered(const CacheSettings& s, Range kept, Index first, const Tensor& key,
                       const Tensor& value) {
  const DType dtype = is_quantised(s.dtype) ? DType::f32 : s.dtype;
  const Index tokens = key.shape[2];
  const auto require = [&](const char* argument, const Tensor& t, Index dim) {
    require_tensor(argument, t, dtype, {1, s.kv_heads, tokens, dim}, {"", "kv_heads", "tokens", "dim"});
  };
  require("key", key, s.dim);
  require_apart("key", key);
  if (s.value_in_key) {
    require_no_value(s, value);
  } else {
    require("value", value, s.value_dim);
    require_apart("value", value, {{"key", &key}});
  }
  if (first < kept.begin || first > kept.end || tokens > kept.end - first) {
    reject("first", "is " + to_string(first) + ", the entry has no " + to_string(tokens) +
                        " tokens from there: it has " + to_string(kept.begin) + " … " + to_string(kept.end) +
                        " - 1");
  }
  return {first, first + tokens};
}

void require_packed(const CacheSettings& s, Index tokens, const StoredTokens& packed) {
  for (const StoredPart& part : stored_parts(s)) {
    const Tensor& t = packed.*part.tensor;
    require_tensor(part.name, t, part.dtype, {1, s.kv_heads, tokens, part.dim},
                   {"", "kv_heads", "tokens", "dim"});
    if (t.stride != Tensor::contiguous(t.data, part.dtype, t.shape).stride)
      reject(part.name, "has gaps, it must have none");
  }
  if (s.value_in_key) require_no_value(s, packed.value);
}

}  // namespace attncore
