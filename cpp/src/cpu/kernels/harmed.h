// Products of what parts of bfloat16 cannot stand for (parts.h), by multiply-adds of float32 from where it lies:
//
//     a score (query, key), if either is harmed;
//     a row of P · V over a key tile, if the row sees a harmed value; else by the unit, without the hidden ones.
//
// So a score's bits depend on its query and key, and a row's on what it sees.
#pragma once

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

/// Writes the scores of harmed queries or keys.
template <class Isa, int n>
void score_harmed(const Call& call, const TaskRows& row_at, const KeySource& source, Range keys, Index rows,
                  const KeyTile<Isa, float, Part<n>>& tile,
                  const Scratch<Isa, float, Part<n>>& scratch) noexcept {
  const bool any = any_key(tile.poisoned_keys, tile.kWords);
  with_part_storage(source.storage, [&]<DType kStorage>() {
    for (Index row = 0; row < rows; ++row) {
      if (!any && scratch.harmed[row] == 0) continue;
      const std::byte* const query = at(call.query, row_at(row));
      for (Index key = 0; key < keys.size(); ++key) {
        if (scratch.harmed[row] == 0 && !has_key(tile.poisoned_keys, key)) continue;
        const float product = dot<Isa, kStorage>(query, call.query.stride[3], source.token(keys.begin + key),
                                                 source.dim_stride, call.dim);
        scratch.scores.row(row)[key] = product * static_cast<float>(call.scale);
      }
    }
  });
}

/// A row's weights, from their parts; the first ones mark what is hidden, −0, which a sum with + 0 would lose.
template <class Isa, int n>
ATTN_INLINE void join_weights(const Bf16Pair* parts, Index keys, float* weights) noexcept {
  using V = Vec<Isa, float>;
  using Lanes = std::make_integer_sequence<int, kWidth<Isa, float>>;
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
    store(weights + key, interleave<false, float>(first, second, Lanes{}));
    store(weights + key + kTileDepth, interleave<true, float>(first, second, Lanes{}));
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

/// P · V where values are harmed: O = keep · O + P · V, row by row.
template <class Isa, int n>
void add_harmed(const Matrix<float>& output, const Scratch<Isa, float, Part<n>>& scratch,
                const KeyTile<Isa, float, Part<n>>& tile, const KeySource& source, Range keys,
                Index rows) noexcept {
  alignas(Isa::kBytes) float weights[KeyTile<Isa, float, Part<n>>::kKeys];
  for (Index row = 0; row < rows; ++row) {
    const Matrix<const WeightOf<Part<n>>> own{scratch.weights.row(row), scratch.weights.stride};
    join_weights<Isa, n>(pairs_of(own.data), keys.size(), weights);
    bool sees = false;
    for (Index key = 0; key < keys.size(); ++key) {
      sees |= has_key(tile.poison, key) && !is_hidden_mark(weights[key]);
    }
    if (sees) {
      with_part_storage(source.storage, [&]<DType kStorage>() {
        add_visible_values<Isa, kStorage>(output.row(row), scratch.keep[row], weights, source, keys,
                                          tile.values.columns);
      });
    } else {
      gemm_of_visible<Isa, float>(Matrix<float>{output.row(row), output.stride}, own, as_const(tile.values),
                                  1, depth_of<float, Part<n>>(keys.size()),
                                  Accumulated<float>{scratch.keep + row});
    }
  }
}

}  // namespace attncore
