// Exact attention over keys that come in pieces: from a file larger than memory, a socket, another process.
#pragma once

#include <attncore/attncore.hpp>

namespace attncore {

/// Memory that a file is mapped to, shared (MAP_SHARED).
struct Mapping {
  const void* data = nullptr;
  std::size_t bytes = 0;
};

/// What holds for all pieces of an AttentionState.
struct AttentionStateSettings {
  DType dtype = DType::f32;  ///< f32 or f64: of the queries that are kept, and of results
  Index value_dim = 0;       ///< 0: the query's dim
  /// Without mask, biases, key_segments, key_lengths and tree_parents.  query_offset is where query 0 stands among all
  /// keys; causal, window, alibi and relative_bias need it.  Sinks are added once, by result().
  Score score{};
  Precision precision = Precision::highest;  ///< as Problem's, of each piece's products
};

/// What queries have seen so far: for each (batch, head, query) the maximum and the sum of exp(score), and the sum of
/// exp(score) · value.  Sums of disjoint keys add up exactly, in any order (Milakov & Gimelshein 2018; Rabe & Staats
/// 2021).  They are float64 for float32 queries and pairs of float64 for float64, so that the number of pieces costs no
/// accuracy.
///
/// One call at a time may change a state, and any number may read one that is not being changed; others throw InUse.  What was moved from
/// may only be assigned to or destroyed.
class AttentionState {
 public:
  /// Copies the query (batch, heads, queries, dim), floats, and what the settings point to.  Throws as forward().
  explicit AttentionState(const Tensor& query, const AttentionStateSettings& settings = {});
  ~AttentionState();
  AttentionState(AttentionState&&) noexcept;
  AttentionState& operator=(AttentionState&&) noexcept;

  /// The settings as they are held: the copies of what they point to, every default in place.
  [[nodiscard]] const AttentionStateSettings& settings() const noexcept;
  [[nodiscard]] const Tensor& query() const noexcept;

  struct Piece {
    Tensor
        key{};  ///< (batch, kv_heads, keys, dim); as forward() takes them, for an f64 state f64, f32, f16 or bf16
    Tensor value{};                     ///< (batch, kv_heads, keys, value_dim)
    Tensor key_scale{}, value_scale{};  ///< as Problem has them
    Tensor mask{};                      ///< as Score has them, over the piece's keys
    BoundedArray<Tensor, kMaxBiases> biases{};
    Tensor key_segments{}, key_lengths{};
    Tensor first_key{};  ///< ints (1 or batch, 1, 1, 1): where the keys begin; default: after all so far
    /// Files that key and value lie in: pages that were read are given back, so that they don't count as this process's
    /// memory.  Naming other memory here destroys what it holds.
    BoundedArray<Mapping, 2> mappings{};
  };

  /// Takes a piece of keys into account.  A call that throws leaves the state as it was.
  void update(const Piece& piece, const Options& options = {});

  /// Adds what another state of the same query and settings has seen, of other keys.
  void merge(const AttentionState& other, const Options& options = {});

  /// out (batch, heads, queries, value_dim) and, if given, lse (batch, heads, queries, 1), of the state's dtype, as
  /// forward() over all keys so far.
  void result(const Tensor& out, const Tensor& lse, const Options& options = {}) const;

  /// All that calls change, by name, in memory that the state owns: maxima, sums, outputs, the keys so far.  What was read of one state and
  /// written to another of the same query and settings goes on there, to the bit; what else is written is not checked.
  struct Part {
    const char* name;
    Tensor tensor{};  ///< without gaps
  };
  void read_parts(const std::function<void(const Part&)>& read) const;
  void write_parts(const std::function<void(const Part&)>& write);

 private:
  struct Held;
  std::unique_ptr<Held> held_;
};

}  // namespace attncore
