// attncore: exact attention, softmax(scale · Q Kᵀ + bias) V, for batches of heads, on memory that the caller
// owns.
//
// The main header: fill a Problem, call forward().  (layers.hpp, cache.hpp and state.hpp stand on it.)  docs/semantics.md says what
// each option means.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace attncore {

using Index = std::int64_t;

/// f32, f64, f16 and bf16 are for queries, keys, values and what is added to scores; boolean is for masks (a
/// byte, 0 = False); i32 and i64 are for lengths, offsets and segments.  Keys and values of forward() may also be
/// stored as i8, as f8 (float8_e4m3fn: 4 bits of exponent, 3 of fraction, no infinities) or as i4: two's complement,
/// two in a byte, the first in its low half; the dim axis of an i4 tensor counts numbers and has no gaps.
enum class DType : std::uint8_t { f32, f64, f16, bf16, boolean, i32, i64, i8, f8, i4 };

enum class Device : std::uint8_t { cpu, cuda };  ///< cuda: NotImplemented is thrown so far

/// Of products of float32, by torch's names.  highest: as exact as float32's own.  high: the operands in two bfloat16 parts.  medium: one
/// product of operands and weights that are rounded to bfloat16, summed in float32.  A lower one permits rounding, for speed:
/// where it would gain none, results are those of a higher one.
enum class Precision : std::uint8_t { highest, high, medium };

[[nodiscard]] Index item_size(DType dtype) noexcept;  ///< in bytes; 1 for i4
[[nodiscard]] const char* name(DType dtype) noexcept;

/// A view of memory that the caller owns.  The axes are (batch, head, token, dim); strides are in bytes and
/// may be anything: zero, negative, no multiple of the item; nor need `data` be aligned.  (i4 has an even dim, two numbers in
/// each byte without gaps.)  What is written must overlap neither itself nor, unless a function says so, anything that
/// the call reads or writes beside it.  An optional tensor without `data` is not given; an input that has a shape but no data is an error.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  std::array<Index, 4> shape{};
  std::array<Index, 4> stride{};

  /// A tensor without gaps, the last axis fastest.  Inputs are never written, so const data is welcome.
  static Tensor contiguous(const void* data, DType dtype, const std::array<Index, 4>& shape) noexcept;

  [[nodiscard]] constexpr bool given() const noexcept { return data != nullptr; }
};

// Members of what users fill have initialisers, if only {}: without, -Wextra warns where `{.query = q}` leaves them out.

/// A short list that lives where it stands (no allocation; readable by kernels).
template <class T, std::size_t Capacity>
struct BoundedArray {
  T items[Capacity]{};
  std::size_t size = 0;

  constexpr BoundedArray() = default;
  constexpr BoundedArray(std::initializer_list<T> list) {
    for (const T& item : list) push_back(item);
  }
  constexpr void push_back(const T& item) {
    if (size == Capacity)
      throw std::invalid_argument("at most " + std::to_string(Capacity) + " items are accepted");
    items[size++] = item;
  }
};

inline constexpr Index kUnbounded = std::numeric_limits<Index>::max();
inline constexpr std::size_t kMaxBiases = 8;

/// The relative position bias of T5 (Raffel et al. 2020): + table[head][bucket(key − position)].  Half of the buckets
/// are for single distances, the others for ever wider ranges up to max_distance; all beyond is in the last.
struct RelativeBias {
  Tensor table{};  ///< floats, (1, head, 1, bucket)
  bool bidirectional =
      true;  ///< half of the buckets are for keys after the position; else those share bucket 0
  Index max_distance = 128;
};

/// What happens between Q·Kᵀ and the softmax.  Every default means "off".
struct Score {
  std::optional<double> scale{};    ///< default 1/√dim
  std::optional<double> softcap{};  ///< c > 0: scores become c · tanh(score / c)

  // A query at position p = query + offset sees the keys p − left … p + right; causal means right = 0.
  bool causal = false;
  Index left = kUnbounded, right = kUnbounded;
  /// Ints, (1 or batch, 1, 1, 1); default: each entry's key_length − query_length, the last query sees the last key.
  Tensor query_offset{};

  Tensor mask{};  ///< boolean, True = attend; broadcasts to (batch, head, query, key)
  BoundedArray<Tensor, kMaxBiases> biases{};  ///< floats, each broadcasts to (batch, head, query, key)
  Tensor alibi{};  ///< slopes, (1 or batch, head, 1, 1): + slope · −|position − key|
  RelativeBias relative_bias{};
  Tensor sinks{};  ///< logits, (1, head, 1, 1): a term of the softmax's denominator

  /// New tokens that form a tree (speculative decoding): ints (1 or batch, 1, query, 1), the parent of each query among
  /// the queries before it, or −1.  The last `queries` keys are the queries' own: a query sees the keys before those, its
  /// ancestors' and its own.
  Tensor tree_parents{};

  Tensor query_segments{}, key_segments{};  ///< ints, (batch, 1, token, 1): attend only where equal
  Tensor query_lengths{}, key_lengths{};    ///< ints, (batch, 1, 1, 1): tokens past them do not exist
};

/// Each weight is kept, and divided by 1 − probability, or dropped (Srivastava et al. 2014).  What is kept is a function
/// of (seed, batch, head, query, key) alone: docs/semantics.md has the format.
struct Dropout {
  double probability = 0;  ///< 0 ≤ probability < 1, rounded to a multiple of 2⁻¹⁶
  std::uint64_t seed = 0;
};

/// Sequences of different lengths, packed one after another along the token axis: entry b is the tokens
/// cumulative[b] … cumulative[b + 1] − 1 of arrays whose batch axis is 1.  Every option is then as for the padded batch,
/// but segments, which stand packed as well.
struct Packing {
  Tensor
      query_tokens{};  ///< ints, (batch + 1, 1, 1, 1): of query, out and lse, from 0 to their number of tokens
  Tensor key_tokens{};  ///< the same of key and value; not given where these are paged
};

/// Keys and values in pages (Kwon et al. 2023): key and value are pools (page, kv_head, slot, dim), and token t of entry b
/// is slot t mod slots of page block_table[b][t / slots].  Score::key_lengths must be given.
struct Paging {
  Tensor block_table{};  ///< ints, (batch, 1, 1, pages): what lies past an entry's length is not read
};

struct Problem {
  Tensor query{};  ///< (batch, heads, queries, dim)
  Tensor key{};    ///< (batch, kv_heads, keys, dim); heads is a multiple of kv_heads
  Tensor value{};  ///< (batch, kv_heads, keys, value_dim)
  Tensor out{};    ///< (batch, heads, queries, value_dim), written
  Tensor lse{};    ///< optional: (batch, heads, queries, 1), written; f32, f64 for f64: log Σ exp(score)
  /// Optional, f32, like key and value with a dim of 1: what each token's numbers are multiplied by.
  Tensor key_scale{}, value_scale{};
  Packing packing{};
  Paging paging{};
  Score score{};
  Dropout dropout{};
  /// Of forward() where query, key and value are all f32; elsewhere, and in backward() and attention_weights(), it changes
  /// nothing.
  Precision precision = Precision::highest;
};

/// What backward() reads and writes beside the problem.  A result without `data` is not wanted, and costs nothing.
struct Gradients {
  Tensor d_out{};                        ///< like out
  Tensor d_lse{};                        ///< optional: like lse
  Tensor d_query{}, d_key{}, d_value{};  ///< like query, key and value; written
  BoundedArray<Tensor, kMaxBiases>
      d_biases{};  ///< each like its bias, summed over what the bias repeats; none, or as
                   ///< many as there are biases
  Tensor d_alibi{}, d_relative_bias{}, d_sinks{};  ///< like alibi, the relative bias's table and sinks
};

/// Scratch memory that calls reuse.  One call at a time may use it; without one, each calling thread has its
/// own, of which at most 4 MiB are kept between calls.
class Workspace {
 public:
  Workspace() noexcept;
  ~Workspace();
  Workspace(Workspace&&) noexcept;
  Workspace& operator=(Workspace&&) noexcept;

  /// At least `bytes`, aligned to a cache line; what it held before is lost.
  std::byte* reserve(std::size_t bytes);
  void trim(std::size_t bytes) noexcept;  ///< gives back all if more than `bytes` are held
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

struct Options {
  Device device = Device::cpu;
  int num_threads = 0;  ///< 0: get_num_threads(); more than 1024 count as 1024
  /// Polled by the calling thread, every few milliseconds: true ends the call, and what it throws is passed on.
  std::function<bool()> cancelled{};
  Workspace* workspace = nullptr;  ///< default: the calling thread's
};

/// Thrown by a call that Options::cancelled ended.  Its outputs are unspecified.
struct Cancelled : std::runtime_error {
  Cancelled() : std::runtime_error("the call was cancelled") {}
};

/// Wrong shapes or values are std::invalid_argument, wrong dtypes this.
struct DTypeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

/// A std::invalid_argument for the shape of an operand, (batch, head, token, dim), that does not fit the others.
struct ShapeError : std::invalid_argument {
  ShapeError(const std::string& what, const char* of, const std::array<Index, 4>& is,
             const std::array<Index, 4>& must_be)
      : std::invalid_argument(what), argument(of), shape(is), required(must_be) {}
  const char* argument;  ///< its name, which lives as long as the library
  std::array<Index, 4> shape, required;
};

/// What a device or a build cannot do.
struct NotImplemented : std::logic_error {
  using std::logic_error::logic_error;
};

/// Thrown at once, without waiting, by a call that conflicts with another thread's on the same cache or AttentionState; it has
/// changed nothing.
struct InUse : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Any number of threads may call the functions below at once.  Tensors and options need to live during the call only.

/// out, lse = attention(problem).  Throws DTypeError, std::invalid_argument, NotImplemented, std::bad_alloc,
/// Cancelled.
void forward(const Problem& problem, const Options& options = {});

/// The gradients of a loss, given its gradients with respect to (out, lse) = attention(problem).  Throws as forward().  problem.out and
/// problem.lse (which must be there) are what forward() wrote for the same problem, and are read here.
void backward(const Problem& problem, const Gradients& gradients, const Options& options = {});

/// keep (batch, heads, rows, keys), booleans, written: what dropout keeps.  `rows`, ints (1, 1, rows, 1): which queries;
/// not given: 0, 1, …  Throws as forward().
void dropout_mask(const Dropout& dropout, const Tensor& rows, const Tensor& keep,
                  const Options& options = {});

/// The probabilities that forward() uses, before dropout.  problem.value and problem.out are not read.  Of packed sequences
/// they are those of the padded batch: rows and keys count those of the longest, and what a sequence lacks is 0.  Throws as forward().
struct Weights {
  Tensor rows{};           ///< ints, (1 or batch, 1, rows, 1): which queries; not given: all
  Tensor probabilities{};  ///< (batch, heads, rows, keys), or (…, top_k); f32, f64 for f64; written
  /// i64, like probabilities: if given, the largest top_k of a row, in falling order; −1, with a probability of 0, where a
  /// row sees fewer keys.
  Tensor indices{};
};
void attention_weights(const Problem& problem, const Weights& weights, const Options& options = {});

/// How forward() would run: for people and for tests.  Some of its tasks are run; nothing of the problem is written.
struct Explanation {
  std::string isa, kernel, text;
  int threads = 1;
  Index query_tile = 0, key_tile = 0, tasks = 0, key_splits = 1, workspace_bytes = 0;
  double flops = 0, bytes = 0;
  double floor_seconds = 0;      ///< by the multiply-add peak and the read bandwidth, whichever is greater
  double estimated_seconds = 0;  ///< of the call, by some of its tasks, run and timed
};
[[nodiscard]] Explanation explain(const Problem& problem, const Options& options = {});

/// The instruction set that kernels use: the best that the machine has, or the one named by the environment
/// variable ATTNCORE_ISA or by use_isa(), which holds for the process.  Where there are matrix tiles (amx), the first call that
/// needs to know tries them, in a millisecond or two; config() says what it found.
[[nodiscard]] std::string isa();
[[nodiscard]] std::vector<std::string> available_isas();  ///< best first
void use_isa(const std::string& name);

[[nodiscard]] int
get_num_threads() noexcept;  ///< default: OMP_NUM_THREADS, else the cores that this process may use
void set_num_threads(int num_threads);

[[nodiscard]] const char* version() noexcept;  ///< "major.minor.patch"

/// What was built and what was found: (name, value) pairs.
[[nodiscard]] std::vector<std::pair<std::string, std::string>> config();

/// Multiply-add throughput of registers in GFLOP/s: the ceiling that a benchmark compares with.  Of bf16 that of
/// bfloat16's own products, where the instruction set has them.
[[nodiscard]] double fma_peak(const std::string& isa, DType dtype, int num_threads);

/// GB/s at which threads read so much memory, each its share, over and over: the ceiling of decoding.  The best of
/// several access patterns, in huge pages where the system gives them.  The memory stays for the next call.
[[nodiscard]] double read_bandwidth(Index bytes, int num_threads);

}  // namespace attncore
