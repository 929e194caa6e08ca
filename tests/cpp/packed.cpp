// Packed sequences: each has the bits that it has alone, forward and backward, on every ISA, from any number of threads.
#include <algorithm>
#include <vector>

#include "check.h"
#include "cpu/dispatch.h"
#include "kit.h"

namespace {

using namespace attncore;

/// Arrays of packed sequences, (token, head, dim), and what is computed of them.
struct Arrays {
  static constexpr Index kHeads = 6, kKvHeads = 2, kDim = 20, kValueDim = 9;
  static constexpr Index kRows[] = {0, 4};  // whose weights are asked for
  using Floats = std::vector<float>;
  std::vector<Index> queries{0}, keys{0};  // cumulative
  Index longest = 0;                       // of keys
  Floats slopes, query, key, value, d_out, out, lse, d_query, d_key, d_value;
  Floats weights;  // (entry, head, row, key), 0 where a sequence has none

  Arrays(std::initializer_list<std::array<Index, 2>> lengths, Random& random) {
    for (const auto& [of_queries, of_keys] : lengths) {
      queries.push_back(queries.back() + of_queries);
      keys.push_back(keys.back() + of_keys);
      longest = std::max(longest, of_keys);
    }
    weights.resize(lengths.size() * std::size_t(kHeads * 2 * longest));
    const auto fill = [&](Floats& array, Index items) { array = noise(items, random); };
    fill(slopes, kHeads), fill(lse, queries.back() * kHeads);
    fill(query, queries.back() * kHeads * kDim), fill(key, keys.back() * kKvHeads * kDim);
    fill(value, keys.back() * kKvHeads * kValueDim), fill(d_out, queries.back() * kHeads * kValueDim);
    out = d_out, d_query = query, d_key = key, d_value = value;
  }

  /// Tokens first … last − 1 of an array.
  static Tensor tokens(Floats& array, Index first, Index last, Index heads, Index dim) {
    Tensor t =
        Tensor::contiguous(array.data() + first * heads * dim, DType::f32, {1, last - first, heads, dim});
    std::swap(t.shape[1], t.shape[2]), std::swap(t.stride[1], t.stride[2]);
    return t;
  }

  /// Forward and backward of the entries first … last − 1: packed, or one by itself.
  void run(Index first, Index last, bool packed, const Options& options) {
    const auto at = [](const std::vector<Index>& of, Index i) { return of[static_cast<std::size_t>(i)]; };
    const Index q = at(queries, first), q_end = at(queries, last), k = at(keys, first),
                k_end = at(keys, last);
    Problem p;
    p.query = tokens(query, q, q_end, kHeads, kDim), p.out = tokens(out, q, q_end, kHeads, kValueDim);
    p.key = tokens(key, k, k_end, kKvHeads, kDim), p.value = tokens(value, k, k_end, kKvHeads, kValueDim);
    p.lse = tokens(lse, q, q_end, kHeads, 1);
    p.score.causal = true;
    p.score.alibi = Tensor::contiguous(slopes.data(), DType::f32, {1, kHeads, 1, 1});
    if (packed) {
      const auto ints = [](const std::vector<Index>& of) {
        return Tensor::contiguous(of.data(), DType::i64, {static_cast<Index>(of.size()), 1, 1, 1});
      };
      p.packing = {.query_tokens = ints(queries), .key_tokens = ints(keys)};
    }
    forward(p, options);
    Gradients g;
    g.d_out = tokens(d_out, q, q_end, kHeads, kValueDim), g.d_query = tokens(d_query, q, q_end, kHeads, kDim);
    g.d_key = tokens(d_key, k, k_end, kKvHeads, kDim);
    g.d_value = tokens(d_value, k, k_end, kKvHeads, kValueDim);
    backward(p, g, options);
    const auto batch = static_cast<Index>(queries.size()) - 1;
    Weights w;
    w.probabilities = Tensor::contiguous(weights.data(), DType::f32, {batch, kHeads, 2, longest});
    if (!packed) {
      w.probabilities.data = attncore::at(w.probabilities, first, 0);
      w.probabilities.shape = {1, kHeads, std::min<Index>((q_end - q + 3) / 4, 2), k_end - k};
    }
    w.rows = Tensor::contiguous(kRows, DType::i64, {1, 1, w.probabilities.shape[2], 1});
    attention_weights(p, w, options);
  }

  [[nodiscard]] std::vector<Floats> results() const { return {out, lse, d_query, d_key, d_value, weights}; }
};

/// Each sequence has the bits that it has alone.
void bits() {
  Random random;
  Arrays arrays({{0, 3}, {5, 9}, {300, 280}, {0, 0}, {77, 0}, {1, 700}, {130, 2300}, {2, 2}}, random);
  const auto entries = static_cast<Index>(arrays.queries.size()) - 1;
  for (Index entry = 0; entry < entries; ++entry) arrays.run(entry, entry + 1, false, {});
  const auto alone = arrays.results();
  for (int threads = 1; threads <= 4; ++threads) {
    Random other;
    arrays.out.assign(arrays.out.size(), other.number());
    for (auto* const result : {&arrays.lse, &arrays.d_query, &arrays.d_key, &arrays.d_value, &arrays.weights})
      result->assign(result->size(), other.number());
    arrays.run(0, entries, true, {.num_threads = threads});
    const auto packed = arrays.results();
    for (std::size_t i = 0; i < alone.size(); ++i) {
      CHECK(same_bits(alone[i], packed[i]));
    }
  }
}

}  // namespace

int main() {
  for (const IsaTable* table : available_tables()) {
    use_isa(table->name);
    std::printf("%s\n", table->name);
    bits();
  }
  return finish();
}
