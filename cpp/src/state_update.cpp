// AttentionState: a piece of keys, walked in stretches.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "backend.h"
#include "cpu/memory.h"
#include "require.h"
#include "resolve.h"
#include "segment_ranges.h"
#include "state_held.h"

namespace attncore {
namespace {

using Piece = AttentionState::Piece;

/// Key and value bytes of a stretch: few enough that a file's pages are no burden, enough for all threads.  How many
/// keys that are depends on an entry's own shape, so that its bits don't depend on the batch; entries go together as
/// far as they fit.
constexpr Index kStretchBytes = Index{32} << 20;
constexpr Index kConvertedBytes = Index{4} << 20;  // where they are converted

/// The part of an option that belongs to some batch entries and keys; axes of extent 1 are for all.
Tensor option_part(Tensor t, Range entries, std::size_t key_axis, Range keys) noexcept {
  if (!t.given()) return t;
  if (t.shape[0] > 1) t = part_of(t, 0, entries.begin, entries.size());
  if (t.shape[key_axis] > 1) t = part_of(t, key_axis, keys.begin, keys.size());
  return t;
}

/// Gives back the pages that a tensor's heads lie on, as far as they belong to a mapping.
void give_back(const Tensor& t, const Mapping& mapping) noexcept {
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto first = reinterpret_cast<std::uintptr_t>(mapping.data), past = first + mapping.bytes;
  for (Index entry = 0; entry < t.shape[0]; ++entry) {
    for (Index head = 0; head < t.shape[1]; ++head) {
      auto low = reinterpret_cast<std::uintptr_t>(at(t, entry, head)), high = low;
      for (const std::size_t axis : {2, 3}) {
        const Index reach = t.stride[axis] * (t.shape[axis] - 1);
        (reach < 0 ? low : high) += static_cast<std::uintptr_t>(reach);
      }
      high += static_cast<std::uintptr_t>(item_size(t.dtype));
      low = std::max(low, first);
      high = std::min(high, past);
      if (low >= high) continue;
      low -= low % page;
      madvise(reinterpret_cast<void*>(low), high - low, MADV_DONTNEED);
    }
  }
}

/// One call of AttentionState::update.
class Update {
 public:
  Update(const AttentionStateSettings& settings, const Tensor& query, const Seen& seen, const Piece& piece,
         const Options& options)
      : piece_(piece), options_(options), value_dim_(settings.value_dim) {
    problem_.query = query;
    problem_.key = operand("key", piece.key);
    problem_.value = operand("value", piece.value);
    problem_.key_scale = piece.key_scale;
    problem_.value_scale = piece.value_scale;
    problem_.precision = settings.precision;
    problem_.score = settings.score;
    Score& score = problem_.score;
    score.sinks = {};  // once, in the end
    score.mask = piece.mask;
    score.biases = piece.biases;
    score.key_segments = piece.key_segments;
    score.key_lengths = piece.key_lengths;
    read_first(seen);
    const Call call = resolve(problem_, Use::forward);  // all checks, before any work
    if (call.value_dim != value_dim_) {
      reject("value", "has a dim of " + std::to_string(call.value_dim) + ", the state's value_dim is " +
                          std::to_string(value_dim_));
    }
    read_lengths(call);
    divide();
  }

  [[nodiscard]] Index steps() const noexcept {
    return ceil_div(problem_.query.shape[0], entries_) * ceil_div(problem_.key.shape[2], keys_);
  }

  void run(const Seen& seen, Workspace& scratch) const {
    const Index batch = problem_.query.shape[0], keys = problem_.key.shape[2];
    for (Index entry = 0; entry < batch; entry += entries_) {
      for (Index key = 0; key < keys; key += keys_) {
        step(seen, {entry, min(entry + entries_, batch)}, {key, min(key + keys_, keys)}, scratch);
      }
    }
    for (Index entry = 0; entry < batch; ++entry) {
      const auto i = static_cast<std::size_t>(entry);
      seen.next(entry) = max(seen.next(entry), first_[i] + lengths_[i]);
    }
  }

 private:
  /// A key or value; what the core does not take beside these queries is said to be what it will be converted to.
  Tensor operand(const char* argument, Tensor t) {
    require_given(argument, t);
    if (problem_.query.dtype != DType::f64 || t.dtype == DType::f64) return t;
    require_dtype(argument, t, {DType::f64, DType::f32, DType::f16, DType::bf16});
    t.dtype = DType::f64;
    converted_ = true;
    return t;
  }

  /// Where the piece begins, in each entry.
  void read_first(const Seen& seen) {
    const Index batch = problem_.query.shape[0];
    Tensor given = piece_.first_key;
    if (is_given("first_key", given)) {
      require_dtype("first_key", given, {DType::i32, DType::i64});
      broadcast_to("first_key", given, {batch, 1, 1, 1}, {"batch"});
    }
    Tensor offset = problem_.score.query_offset;
    if (offset.given()) broadcast_to("query_offset", offset, {batch, 1, 1, 1}, {"batch"});
    const Index most = kFarthestKey - max(problem_.key.shape[2], 0);
    for (Index entry = 0; entry < batch; ++entry) {
      const Index first = given.given() ? read_int(at(given, entry, 0), given.dtype) : seen.next(entry);
      if (first < 0 || first > most) {
        reject("first_key", "is " + std::to_string(first) + ", must be 0 … 2**59 without the piece's keys");
      }
      first_.push_back(first);
      if (offset.given()) offsets_.push_back(read_int(at(offset, entry, 0), offset.dtype) - first);
    }
    if (offset.given()) problem_.score.query_offset = ints(offsets_);
  }

  void read_lengths(const Call& call) {
    for (Index entry = 0; entry < call.batch; ++entry) lengths_.push_back(call.sequence(entry).keys);
  }

  void divide() {
    const Tensor &key = problem_.key, &value = problem_.value;
    const Index of_key = max(
        1, key.shape[1] * (key.shape[3] * item_size(key.dtype) + value.shape[3] * item_size(value.dtype)));
    const Index bytes = converted_ ? kConvertedBytes : kStretchBytes;
    constexpr Index kFew = 128, kMany = 2048;  // multiples of what kernels take at a time
    const Index fit = bytes / of_key, unit = fit < kMany ? kFew : kMany;
    keys_ = max(fit / unit, 1) * unit;
    entries_ = max(1, bytes / (of_key * min(keys_, max(key.shape[2], 1))));
  }

  [[nodiscard]] Problem problem_of(Range entries, Range keys) const {
    Problem p = problem_;
    p.query = part_of(p.query, 0, entries.begin, entries.size());
    for (Tensor* const t : {&p.key, &p.value, &p.key_scale, &p.value_scale}) {
      if (t->given()) *t = part_of(part_of(*t, 0, entries.begin, entries.size()), 2, keys.begin, keys.size());
    }
    Score& s = p.score;
    s.mask = option_part(s.mask, entries, 3, keys);
    for (std::size_t i = 0; i < s.biases.size; ++i) {
      s.biases.items[i] = option_part(s.biases.items[i], entries, 3, keys);
    }
    s.key_segments = option_part(s.key_segments, entries, 2, keys);
    for (Tensor* const t : {&s.alibi, &s.query_segments, &s.query_lengths}) {
      if (t->given() && t->shape[0] > 1) *t = part_of(*t, 0, entries.begin, entries.size());
    }
    return p;
  }

  void step(const Seen& seen, Range entries, Range keys, Workspace& scratch) const {
    std::vector<Index> offsets, lengths;
    for (Index entry = entries.begin; entry < entries.end; ++entry) {
      const auto i = static_cast<std::size_t>(entry);
      lengths.push_back(max(0, min(lengths_[i] - keys.begin, keys.size())));
      if (!offsets_.empty()) offsets.push_back(offsets_[i] - keys.begin);
    }
    if (std::none_of(lengths.begin(), lengths.end(), [](Index length) { return length > 0; })) return;
    Problem problem = problem_of(entries, keys);
    if (!offsets.empty()) problem.score.query_offset = ints(offsets);
    if (problem.score.key_lengths.given()) problem.score.key_lengths = ints(lengths);
    const PieceResult result = attend(problem, scratch);
    Sums sums = seen.sums;
    for (Tensor* const t : {&sums.maximum, &sums.sum, &sums.output, &sums.sum_rest, &sums.output_rest}) {
      if (t->given()) *t = part_of(*t, 0, entries.begin, entries.size());
    }
    add_piece(sums, result, options_);
    for (const Tensor& whole : {piece_.key, piece_.value}) {
      const Tensor t = part_of(part_of(whole, 0, entries.begin, entries.size()), 2, keys.begin, keys.size());
      for (std::size_t i = 0; i < piece_.mappings.size; ++i) give_back(t, piece_.mappings.items[i]);
    }
  }

  /// Attention to these keys alone.
  PieceResult attend(Problem& problem, Workspace& scratch) const {
    const Tensor& query = problem.query;
    const Shape rows{query.shape[0], query.shape[1], query.shape[2], 1};
    Shape outputs = rows;
    outputs[3] = value_dim_;
    PieceResult result;
    Tensors tensors;
    tensors.add(result.out, query.dtype, outputs);
    tensors.add(result.maximum, query.dtype, rows);
    tensors.add(result.sum, query.dtype, rows);
    std::vector<std::pair<Tensor, Tensor*>> converted;  // from, to
    for (const auto& [from, to] : {std::pair{&piece_.key, &problem.key}, {&piece_.value, &problem.value}}) {
      if (from->dtype == to->dtype) continue;
      Tensor part = *to;
      part.dtype = from->dtype;
      converted.emplace_back(part, to);
      tensors.add(*to, to->dtype, to->shape);
    }
    tensors.reserve(scratch);
    for (const auto& [from, to] : converted) convert(from, *to, options_);
    Call call = resolve(problem, Use::forward);
    resolve_segments(call);
    call.out = result.out;
    call.lse = result.maximum;
    call.sum = result.sum;
    const Backend& device = backend(options_.device);
    device.forward(call, device.plan(call, options_), options_);
    return result;
  }

  const Piece& piece_;
  const Options& options_;
  Index value_dim_;
  Problem problem_;         // over the whole piece
  bool converted_ = false;  // key or value
  std::vector<Index> first_, offsets_,
      lengths_;                   // of each entry: the piece's first key, query 0 from there, keys
  Index entries_ = 1, keys_ = 1;  // of a step
};

}  // namespace

void AttentionState::update(const Piece& piece, const Options& options) {
  Held& held = *held_;
  const Writing writing(held.exclusion);
  const Update update(held.settings, held.query, held.seen, piece, options);
  if (update.steps() <= 1) {
    update.run(held.seen, held.scratch);  // nothing fails once the only step is attended
  } else {
    Seen seen(held.query, held.settings.value_dim);
    seen.copy(held.seen);
    update.run(seen, held.scratch);
    std::swap(held.seen, seen);
  }
  held.scratch.trim(kKeptBytes);
}

}  // namespace attncore
