// Products of what parts of bfloat16 cannot stand for (parts.h), by multiply-adds of float32 from where it lies:
//
//     a score (query, key), if either is harmed;
//     a row of P · V over a chunk of keys, if the row sees a harmed value; else by the unit, without the hidden ones.
//
// So a score's bits depend on its query and key, and a row's on what it sees.
#pragma once

#include "../tile/tiles.h"
#include "task.h"

namespace attncore {

template <class Isa, DType kStorage>
ATTN_INLINE float dot(const std::byte* a, Index a_stride, const std::byte* b, Index b_stride,
                      Index dims) noexcept {
  Vec<Isa, float> sum{};
  for (Index dim = 0; dim < dims; dim += kWidth<Isa, float>) {
    sum =
        load_dims<Isa, kStorage>(a, a_stride, dim, dims) * load_dims<Isa, kStorage>(b, b_stride, dim, dims) +
        sum;
  }
  return horizontal_sum<Isa, float>(sum);
}

/// Keys, or values, where they lie; the i-th of them is harmed if bit first + i of their tile's `bits` is set.
struct HarmedKeys {
  const KeySource& source;
  Range keys;
  const KeyBits* bits;
  Index first;
  [[nodiscard]] ATTN_INLINE bool has(Index key) const noexcept { return has_key(bits, first + key); }
};

/// Writes a query's scores of harmed keys, or of all keys if it is harmed itself.
template <class Isa>
void score_harmed(const Call& call, const Row& row, bool all, const HarmedKeys& harmed,
                  float* scores) noexcept {
  const KeySource& source = harmed.source;
  const std::byte* const query = at(call.query, row);
  with_part_storage(source.storage, [&]<DType kStorage>() {
    for (Index key = 0; key < harmed.keys.size(); ++key) {
      if (!all && !harmed.has(key)) continue;
      const std::byte* const token = source.token(harmed.keys.begin + key);
      const float product =
          dot<Isa, kStorage>(query, call.query.stride[3], token, source.dim_stride, call.dim);
      scores[key] = product * static_cast<float>(call.scale);
    }
  });
}

/// A row's weights, from their parts; the first ones mark what is hidden, −0, which a sum with + 0 would lose.
template <class Isa, int n>
ATTN_INLINE void join_weights(const Bf16Pair* parts, Index keys, float* weights) noexcept {
  using V = Vec<Isa, float>;
  const auto marked = [](V mark, V sum) {
    return bit_cast<U32<Isa>>(mark) == bit_cast<U32<Isa>>(-V{}) ? mark : sum;
  };
  for (Index key = 0; key < keys; key += kRunItems, parts += n * kTileDepth) {
    U32<Isa> own[n];
    for (int part = 0; part < n; ++part) own[part] = load<U32<Isa>>(parts + part * kTileDepth);
    V first, second;
    join<Isa, n>(own, first, second);
    first = marked(first_of<Isa>(own[0]), first);
    second = marked(second_of<Isa>(own[0]), second);
    store(weights + key, first);
    store(weights + key + kTileDepth, second);
  }
}

/// output = keep · output + Σ weight · value, of visible values.
template <class Isa, DType kStorage>
void add_visible_values(float* output, float keep, const float* weights, const KeySource& source, Range keys,
                        Index dims) noexcept {
  using V = Vec<Isa, float>;
  for (Index dim = 0; dim < dims; dim += kWidth<Isa, float>) {
    V sum{};
    for (Index key = 0; key < keys.size(); ++key) {
      const V values = load_dims<Isa, kStorage>(source.token(keys.begin + key), source.dim_stride, dim, dims);
      sum = VisibleTerm<Isa, float>::add(weights[key], values, sum);
    }
    store(output + dim, load<V>(output + dim) * keep + sum);
  }
}

/// P · V where values are harmed, row by row: O = keep · O + P · V, or where O is summed in place O = O + P · V.
template <class Isa, class Weight, int n, bool kInPlace>
void add_harmed(Matrix<float> output, Matrix<const Weight> weights, Panel<const Part<n>> values,
                const HarmedKeys& harmed, const float* keep, Index rows) noexcept {
  alignas(Isa::kBytes) float joined[Isa::template kKeyTile<float>];
  const Index count = harmed.keys.size(), first = parts_depth<n>(harmed.first), depth = parts_depth<n>(count);
  for (Index row = 0; row < rows; ++row) {
    join_weights<Isa, n>(pairs_of(weights.row(row)), count, joined);
    bool sees = false;
    for (Index key = 0; key < count; ++key) sees |= harmed.has(key) && !is_hidden_mark(joined[key]);
    const Matrix<float> out{output.row(row), output.stride};
    const Matrix<const Weight> own{weights.row(row), weights.stride};
    if (sees) {
      with_part_storage(harmed.source.storage, [&]<DType kStorage>() {
        add_visible_values<Isa, kStorage>(out.data, kInPlace ? 1 : keep[row], joined, harmed.source,
                                          harmed.keys, values.columns);
      });
    } else if constexpr (kInPlace) {
      gemm_of_visible<Isa, float>(out, own, values, 1, depth, Continued{}, first);
    } else {
      gemm_of_visible<Isa, float>(out, own, values, 1, depth, Accumulated<float>{keep + row}, first);
    }
  }
}

}  // namespace attncore
