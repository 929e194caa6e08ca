// What the back end calls: tables of functions, of which an ISA has one for each kind of numbers that it computes in its own way.
#pragma once

#include "../../score/score.h"
#include "product.h"

namespace attncore {

/// Rows of memory that later tasks read: `count` of so many bytes.
struct Rows {
  const std::byte* data = nullptr;
  Index stride = 0, bytes = 0, count = 0;
};

/// What a task fetches for those after it, bit by bit while it multiplies: memory has little else to do then.
struct Ahead {
  static constexpr int kOut = 0, kQuery = 1, kKey = 2, kValue = 3;
  Rows rows[4];
  /// Rows to fetch at each of so many steps.
  [[nodiscard]] ATTN_INLINE Index pace(Index steps) const noexcept {
    const Index count = rows[0].count + rows[1].count + rows[2].count + rows[3].count;
    return count == 0 ? 0 : ceil_div(count, max(1, steps));
  }
  ATTN_INLINE void fetch(Index row) const noexcept {
    constexpr Index kLine = 64;
    constexpr int kRead = 0, kSecondCache = 2;
    for (const Rows& some : rows) {
      if (row < some.count) {
        const std::byte* const data = some.data + row * some.stride;
        for (Index at = 0; at < some.bytes; at += kLine) __builtin_prefetch(data + at, kRead, kSecondCache);
        return;
      }
      row -= some.count;
    }
  }
};

/// A piece of forward's work: the query rows of one tile against some of their keys.  Row r of a sequence is
/// the query r / group of head kv_head · group + r % group: the heads that share keys are rows beside each
/// other.
struct Task {
  Sequence sequence;
  Index kv_head = 0;
  Range rows;
  Range keys;         // begins at a multiple of the key tile
  bool first = true;  // the rows' first keys: begin with an empty state
  bool last = true;   // their last keys: write out and lse

  std::byte* state = nullptr;         // Sizes::state bytes
  const std::byte* packed = nullptr;  // the tiles of `keys`, Sizes::panel bytes each; none: pack them here
  Index reach = 0;                    // keys up to here are read next, and may be fetched ahead
  Ahead ahead = {};
  bool loaded = false;   // the scratch has the rows' queries, from the keys before
  bool in_gang = false;  // of sequences: one's scratch has the scores of all
  TouchNotes notes = {};
};

/// Sums over many keys are sums of sums: at each multiple of so many keys the softmax's state is merged into a second
/// one and begins anew, so that rounding errors grow with the number of such stretches, not of key tiles.
inline constexpr Index kFoldKeys = 2048;

/// Bytes of memory that a task of so many rows needs; `gang`: its scratch in a gang of sequences.
struct Sizes {
  Index scratch, gang, state, panel;
};

/// How a task learns that the call was cancelled: it asks now and then.
struct Poll {
  bool (*stopped)(void* crew, int thread) = nullptr;
  void* crew = nullptr;
  int thread = 0;
  [[nodiscard]] ATTN_INLINE bool operator()() const noexcept {
    return stopped != nullptr && stopped(crew, thread);
  }
};

/// A piece of attention_weights' work: rows of one KV head's queries, in the order of Task, but of the chosen
/// queries: row r is query numbers[r / group].
struct WeightsTask {
  Sequence sequence;
  Index kv_head = 0;
  Range rows;
  const Weights* weights = nullptr;
  const Index* numbers = nullptr;  // of the chosen queries; none: all are
  Poll poll;

  [[nodiscard]] ATTN_INLINE Index query(Index chosen) const noexcept {
    return numbers != nullptr ? numbers[chosen] : chosen;
  }
};

/// A piece of backward's work: query rows against keys.
struct BackwardTask {
  Sequence sequence;
  Index kv_head = 0;
  Range
      rows;  // in the order of Task, from a multiple of the row tile on; may reach past the sequence's queries
  Range keys;                      // from a multiple of the key tile on; may reach past the sequence's keys
  bool owns_rows = false;          // writes the rows' d_query
  bool owns_keys = false;          // writes the keys' d_key and d_value, and what follows
  unsigned own_biases = 0;         // bit i: the gradient of bias i, which is not broadcast
  double* alibi_shares = nullptr;  // (key tiles, group)
  double* relative_shares = nullptr;  // (key tiles, group, buckets)
  double* sink_shares = nullptr;      // (group)
  std::byte* stats = nullptr;         // RowStats of all rows
  Poll poll;
};

/// A tile of the gradient of a bias that is broadcast; where it is, a range is all that it is repeated for.
struct BackwardBiasTask {
  std::size_t bias = 0;
  Range batches, kv_heads, queries, keys;
  const Sequence* sequences = nullptr;  // of all batch entries
  std::byte* stats = nullptr;
  Poll poll;
};

/// What plans need to know of backward's kernels.
struct BackwardSizes {
  Index row_tile, stats, scratch, bias_queries,
      bias_scratch;  // rows; bytes of all rows' stats; bytes; queries; bytes
};

/// The bandwidth probe reads multiples of so many bytes, in so many ways.
inline constexpr Index kReadStep = 1024;
inline constexpr int kReadPatterns = 6;

inline constexpr Index kMostGangTasks = 8, kMostGangHeads = 32;  // that forward_gang is given

struct Kernels {
  const char* name;
  Index row_block, key_block, key_tile;  // rows of a register block, keys of a strip, keys of a tile
  Index most_rows;                       // of a row tile, at most
  Index gang_rows;                       // of forward_gang, at most

  Sizes (*sizes)(const Call&, Index rows) noexcept;
  /// Whether a sequence has so few rows that its keys are not packed.
  bool (*reads_in_place)(const Call&, const Sequence&) noexcept;
  void (*pack)(const Call&, const Sequence&, Index kv_head, Range keys,
               std::byte* panel) noexcept;  // one key tile
  void (*forward)(const Call&, const Task&, std::byte* scratch) noexcept;
  /// Tasks of several sequences that read the same keys in place, one tile of them; or of KV heads one after another, whose tokens lie
  /// beside each other.
  void (*forward_gang)(const Call&, const Task* tasks, Index count, std::byte* scratch) noexcept;
  /// Merges the states of `parts` tasks, in their order, and writes out and lse; task.state is the first.
  void (*combine)(const Call&, const Task&, Index parts) noexcept;
  void (*weights)(const Call&, const WeightsTask&, std::byte* scratch) noexcept;
  /// For tasks that own so many rows.
  BackwardSizes (*backward_sizes)(const Call&, Index owned_rows) noexcept;
  void (*backward_rows)(const BackwardCall&, const BackwardTask&, std::byte* scratch) noexcept;
  void (*backward)(const BackwardCall&, const BackwardTask&, std::byte* scratch) noexcept;
  void (*backward_bias)(const BackwardCall&, const BackwardBiasTask&, std::byte* scratch) noexcept;

  ProductSizes (*product_sizes)(const Product&, Index rows, Index columns, Index depth) noexcept;
  void (*pack_product)(const Product&, const ProductPacking&, std::byte* scratch) noexcept;
  void (*product)(const Product&, const ProductTask&, std::byte* scratch) noexcept;
  /// c (1, columns) = the sums over a's rows, in their order: task.rows, of which there are at most kDepthBlock.
  void (*column_sums)(const Product&, const ProductTask&, std::byte* scratch) noexcept;
  Index (*rope_scratch)(const RopeCall&) noexcept;
  void (*rope)(const RopeCall&, const RopeTask&, std::byte* scratch) noexcept;

  /// The floating-point operations of `rounds` rounds of multiply-adds in registers, which it does.
  double (*multiply_adds)(Index rounds) noexcept;
  /// Reads memory once in one of kReadPatterns ways; returns the bits seen.  bytes is a multiple of kReadStep.
  std::uint64_t (*read_memory)(const std::byte* memory, Index bytes, int pattern) noexcept;
};

/// Whether bfloat16 holds the numbers of a dtype: of those with scales, all.
ATTN_FN constexpr bool exact_in_bf16(DType dtype) noexcept {
  return dtype == DType::bf16 || dtype == DType::i8 || dtype == DType::f8 || dtype == DType::i4;
}

/// An ISA, and its tables.
struct IsaTable {
  const char* name;
  bool (*supported)() noexcept;
  bool (
      *preferred)() noexcept;  // whether it is faster than those after it; where not, it must be asked for; null: to be tried
  const Kernels *f32, *f64;                       // of all but what follows
  const Kernels *bf16, *f16;                      // forward of queries, keys and values in this dtype
  const Kernels *highest, *high, *medium;         // forward of those in float32, by Precision
  const Kernels *bf16_products, *bf16_gradients;  // of layers, and of attention, in this dtype

  [[nodiscard]] const Kernels& kernels(DType compute) const noexcept {
    return compute == DType::f64 ? *f64 : *f32;
  }
  [[nodiscard]] const Kernels& product_kernels(const Product& p) const noexcept {
    const bool in_pairs = p.c.dtype == DType::bf16 && !p.rotate_a.given();  // rotated numbers are not rounded
    return in_pairs ? *bf16_products : kernels(p.compute());
  }
  [[nodiscard]] const Kernels& gradient_kernels(DType dtype) const noexcept {
    return dtype == DType::bf16 ? *bf16_gradients : kernels(accumulation(dtype));
  }
  /// Of a forward call.
  [[nodiscard]] const Kernels& forward_kernels(const Call& call) const noexcept {
    const DType dtype = call.query.dtype;
    if (dtype == DType::bf16 && exact_in_bf16(call.key.dtype) && exact_in_bf16(call.value.dtype))
      return *bf16;
    if (call.key.dtype != dtype || call.value.dtype != dtype) return kernels(call.compute());
    if (dtype == DType::f16) return *f16;
    if (dtype != DType::f32) return kernels(dtype);
    return call.precision == Precision::medium ? *medium
           : call.precision == Precision::high ? *high
                                               : *highest;
  }
};

}  // namespace attncore
