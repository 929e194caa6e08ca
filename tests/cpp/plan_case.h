// Random calls to plan.
#pragma once

#include <cstdio>
#include <vector>

#include "call.h"
#include "random.h"
#include "tensor.h"

namespace attncore {

/// A call without arrays: only lengths and offsets are read by plans.
struct Given {
  std::array<Index, 4> query, key;
  DType dtype = DType::f32;
  Index value_dim = 1;
  bool tokens_first = false;  // keys and values lie as (tokens, heads, dim)
  Score score;
  std::vector<Index> query_lengths, key_lengths, offsets;

  explicit Given(Random& random) {
    const auto pick = [&](std::initializer_list<Index> of) {
      return of.begin()[random.below(static_cast<Index>(of.size()))];
    };
    const Index kv_heads = 1 + random.below(3);
    const Index queries = pick({0, 1, 1, 2, 7, 31, 33, 100, 513, 3000}),
                keys = pick({0, 1, 100, 128, 129, 1000, 5000, 40000});
    const Index most = queries <= 2 && random.one_of(2) ? 200 : 4;
    const Index batch = random.one_of(20) ? 0 : 1 + random.below(most);
    const auto dim = [&] {
      return random.one_of(2) ? 1 + random.below(256) : pick({16, 64, 64, 128, 256, 576, 4096});
    };
    query = {batch, kv_heads * pick({1, 1, 2, 4, 8, 32}), queries, dim()};
    key = {batch, kv_heads, keys, query[3]};
    value_dim = random.one_of(2) ? query[3] : dim();
    constexpr DType kDTypes[] = {DType::f32, DType::f64, DType::f16, DType::bf16};
    dtype = kDTypes[random.below(4)];
    tokens_first = random.one_of(2);
    score.causal = random.one_of(2);
    if (random.one_of(3)) score.left = pick({0, 1, 100, 2000, Index{1} << 50});
    if (random.one_of(3)) score.right = pick({0, 1, 100, 2000, Index{1} << 50});
    for (Index entry = 0; entry < batch; ++entry) {
      query_lengths.push_back(random.below(queries + 1));
      key_lengths.push_back(random.below(keys + 1));
      offsets.push_back(
          pick({0, keys - queries, random.below(2 * keys + 1) - keys, Index{1} << 60, -(Index{1} << 60)}));
    }
    if (random.one_of(2)) query_lengths.clear();
    if (random.one_of(2)) key_lengths.clear();
    if (random.one_of(2)) offsets.clear();
  }

  /// The call of batch entries first … first + count − 1.
  [[nodiscard]] Call call(Index first, Index count) const {
    Index number = 0;
    const auto tensor = [&](DType type, std::array<Index, 4> shape) {
      shape[0] = count;
      return Tensor::contiguous(reinterpret_cast<const void*>(++number << 44), type, shape);
    };
    const auto ints = [&](const std::vector<Index>& values) {
      return values.empty() ? Tensor{}
                            : Tensor::contiguous(values.data() + first, DType::i64, {count, 1, 1, 1});
    };
    Problem p;
    p.score = score;
    p.query = tensor(dtype, query);
    p.key = tensor(dtype, key);
    p.value = tensor(dtype, {0, key[1], key[2], value_dim});
    for (Tensor* t : {&p.key, &p.value}) {
      if (!tokens_first) break;
      t->stride[1] = t->shape[3] * t->stride[3];
      t->stride[2] = t->shape[1] * t->stride[1];
    }
    p.out = tensor(dtype, {0, query[1], query[2], value_dim});
    p.score.query_lengths = ints(query_lengths);
    p.score.key_lengths = ints(key_lengths);
    p.score.query_offset = ints(offsets);
    return validate(p);
  }
  [[nodiscard]] Call call() const { return call(0, query[0]); }

  /// The call whose split keys leave most state: as many rows as are split, long dims and many keys.
  static Given of_most_parts(Random& random) {
    Given given(random);
    given.query = {1, 8, 4, 256};
    given.key = {1, 1, 40000, 256};
    given.value_dim = 256;
    given.dtype = DType::f64;
    given.score = {};
    given.query_lengths.clear(), given.key_lengths.clear(), given.offsets.clear();
    return given;
  }

  void print() const {
    std::printf(
        "  query %s, key %s, value_dim %lld, %s, tokens first %d, causal %d, left %lld, right %lld, lengths "
        "%d "
        "%d, offsets %d\n",
        shape_text(query).c_str(), shape_text(key).c_str(), static_cast<long long>(value_dim), name(dtype),
        int{tokens_first}, int{score.causal}, static_cast<long long>(score.left),
        static_cast<long long>(score.right), int{!query_lengths.empty()}, int{!key_lengths.empty()},
        int{!offsets.empty()});
  }
};

}  // namespace attncore
