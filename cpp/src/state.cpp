// AttentionState: what holds for all pieces, results, merging.  state_update.cpp takes pieces into account.
#include <cmath>
#include <cstring>

#include "require.h"
#include "resolve.h"
#include "state_held.h"

namespace attncore {
namespace {

using Settings = AttentionStateSettings;

void require_whole(const Settings& settings) {
  require_dtype("dtype", {nullptr, settings.dtype}, {DType::f32, DType::f64});
  if (settings.value_dim < 0) {
    reject("value_dim", "is " + std::to_string(settings.value_dim) + ", must be at least 1");
  }
  const Score& s = settings.score;
  for (const auto& [argument, given] : {std::pair{"mask", s.mask.given()},
                                        {"bias", s.biases.size > 0},
                                        {"key_segments", s.key_segments.given()},
                                        {"key_lengths", s.key_lengths.given()},
                                        {"tree_parents", s.tree_parents.given()}}) {
    if (given) reject(argument, "is given for all pieces, must be given with each");
  }
  const bool by_position = s.causal || s.left != kUnbounded || s.right != kUnbounded || s.alibi.given() ||
                           s.relative_bias.table.given();
  if (by_position && !s.query_offset.given()) {
    reject(
        "query_offset",
        "is not given; causal, window, alibi and relative_bias need the position of query 0 among all keys");
  }
}

/// The settings as a call without keys, checked.
Call resolve_settings(const Tensor& query, const Settings& settings) {
  static constexpr std::byte kNothing{};
  require_given("query", query);
  require_float("query", query);
  require_whole(settings);
  Problem problem{.query = query, .score = settings.score};
  problem.query.dtype = settings.dtype;  // what it will be
  const Index batch = query.shape[0], heads = query.shape[1], dim = query.shape[3];
  problem.key = Tensor::contiguous(&kNothing, settings.dtype, {batch, heads, 0, dim});
  problem.value = problem.key;
  problem.value.shape[3] = settings.value_dim > 0 ? settings.value_dim : dim;
  if (settings.score.query_segments.given()) {
    problem.score.key_segments = Tensor::contiguous(&kNothing, DType::i64, {batch, 1, 0, 1});
  }
  const Call call = resolve(problem, Use::forward);
  for (Index entry = 0; call.score.query_offset.given() && entry < batch; ++entry) {
    const Index offset = call.sequence(entry).offset;
    if (offset < -kFarthestKey || offset > kFarthestKey) {
      reject("query_offset", "is " + std::to_string(offset) + ", must be within ± 2**59");
    }
  }
  return call;
}

bool is_int(const Tensor& t) noexcept { return t.dtype == DType::i32 || t.dtype == DType::i64; }

/// Numbers of any strides, without gaps; ints become i64.
void copy_items(const Tensor& from, const Tensor& to) {
  const auto copy = [&](const std::byte* x, std::byte* y) {
    const Index integer = is_int(from) ? read_int(x, from.dtype) : 0;
    std::memcpy(y, is_int(from) ? reinterpret_cast<const std::byte*>(&integer) : x,
                static_cast<std::size_t>(item_size(to.dtype)));
  };
  for (Index b = 0; b < from.shape[0]; ++b) {
    for (Index h = 0; h < from.shape[1]; ++h) {
      for (Index t = 0; t < from.shape[2]; ++t) {
        for (Index d = 0; d < from.shape[3]; ++d) copy(at(from, b, h, t, d), at(to, b, h, t, d));
      }
    }
  }
}

Index bytes_of(const Tensor& t) {
  return item_size(t.dtype) * t.shape[0] * t.shape[1] * t.shape[2] * t.shape[3];
}

/// Whether two tensors without gaps hold the same.
bool same(const Tensor& a, const Tensor& b) {
  if (a.given() != b.given()) return false;
  if (!a.given()) return true;
  return a.dtype == b.dtype && a.shape == b.shape &&
         std::memcmp(a.data, b.data, static_cast<std::size_t>(bytes_of(a))) == 0;
}

void require_same(const char* name, bool are_same) {
  if (!are_same) reject("other", std::string("has another ") + name + ", must be a state of the same");
}

void require_mergeable(const AttentionState& a, const AttentionState& b) {
  const Settings &mine = a.settings(), &theirs = b.settings();
  const Score &s = mine.score, &t = theirs.score;
  require_same("dtype", mine.dtype == theirs.dtype);
  require_same("value_dim", mine.value_dim == theirs.value_dim);
  require_same("query", same(a.query(), b.query()));
  require_same("scale", s.scale == t.scale);
  require_same("softcap", s.softcap == t.softcap);
  require_same("window", s.left == t.left && s.right == t.right);
  require_same("query_offset", same(s.query_offset, t.query_offset));
  require_same("alibi", same(s.alibi, t.alibi));
  const RelativeBias &r = s.relative_bias, &q = t.relative_bias;
  require_same("relative_bias", same(r.table, q.table) && r.bidirectional == q.bidirectional &&
                                    r.max_distance == q.max_distance);
  require_same("sinks", same(s.sinks, t.sinks));
  require_same("query_segments", same(s.query_segments, t.query_segments));
  require_same("query_lengths", same(s.query_lengths, t.query_lengths));
}

}  // namespace

Seen::Seen(const Tensor& query, Index value_dim) {
  const Shape rows{query.shape[0], query.shape[1], query.shape[2], 1};
  Shape outputs = rows;
  outputs[3] = value_dim;
  Tensors tensors;
  for (Tensor* const t : {&sums.maximum, &sums.sum}) tensors.add(*t, DType::f64, rows);
  tensors.add(sums.output, DType::f64, outputs);
  if (query.dtype == DType::f64) {
    tensors.add(sums.sum_rest, DType::f64, rows);
    tensors.add(sums.output_rest, DType::f64, outputs);
  }
  tensors.add(next_key, DType::i64, {query.shape[0], 1, 1, 1});
  tensors.reserve(memory);
  for (const auto& [name, t] : parts()) std::memset(t.data, 0, static_cast<std::size_t>(bytes_of(t)));
  auto* const maximum = static_cast<double*>(sums.maximum.data);
  std::fill_n(maximum, rows[0] * rows[1] * rows[2], -HUGE_VAL);
}

std::vector<AttentionState::Part> Seen::parts() const {
  std::vector<AttentionState::Part> parts{
      {"maximum", sums.maximum}, {"sum", sums.sum}, {"output", sums.output}, {"next_key", next_key}};
  if (sums.sum_rest.given()) {
    parts.push_back({"sum_rest", sums.sum_rest});
    parts.push_back({"output_rest", sums.output_rest});
  }
  return parts;
}

void Seen::copy(const Seen& other) const {
  const auto to = parts(), from = other.parts();
  for (std::size_t i = 0; i < to.size(); ++i) {
    std::memcpy(to[i].tensor.data, from[i].tensor.data, static_cast<std::size_t>(bytes_of(to[i].tensor)));
  }
}

AttentionState::AttentionState(const Tensor& query, const Settings& settings) {
  const Call call = resolve_settings(query, settings);
  held_ = std::make_unique<Held>();
  Held& held = *held_;
  held.settings = settings;
  held.settings.value_dim = call.value_dim;
  Score& score = held.settings.score;
  score.scale = call.scale;
  score.left = call.score.left;
  score.right = call.score.right;
  Tensors tensors;
  tensors.add(held.query, settings.dtype, query.shape);
  std::vector<std::pair<Tensor*, Tensor>> copies;  // to, from
  for (Tensor* const t : {&score.query_offset, &score.alibi, &score.relative_bias.table, &score.sinks,
                          &score.query_segments, &score.query_lengths}) {
    if (!t->given()) continue;
    copies.emplace_back(t, *t);
    tensors.add(*t, is_int(*t) ? DType::i64 : t->dtype, t->shape);
  }
  tensors.reserve(held.memory);
  convert(query, held.query, {});
  for (const auto& [to, from] : copies) copy_items(from, *to);
  held.seen = Seen(held.query, call.value_dim);
}

AttentionState::~AttentionState() = default;
AttentionState::AttentionState(AttentionState&&) noexcept = default;
AttentionState& AttentionState::operator=(AttentionState&&) noexcept = default;

const Settings& AttentionState::settings() const noexcept { return held_->settings; }
const Tensor& AttentionState::query() const noexcept { return held_->query; }

void AttentionState::read_parts(const std::function<void(const Part&)>& read) const {
  const Reading reading(held_->exclusion);
  for (const Part& part : held_->seen.parts()) read(part);
}

void AttentionState::write_parts(const std::function<void(const Part&)>& write) {
  const Writing writing(held_->exclusion);
  for (const Part& part : held_->seen.parts()) write(part);
}

void AttentionState::merge(const AttentionState& other, const Options& options) {
  if (&other == this) reject("other", "is the state itself: its keys would count twice");
  const Writing writing(held_->exclusion);
  const Reading reading(other.held_->exclusion, "other");
  require_mergeable(*this, other);
  const Seen &mine = held_->seen, &theirs = other.held_->seen;
  add_sums(mine.sums, theirs.sums, options);
  for (Index entry = 0; entry < held_->query.shape[0]; ++entry) {
    mine.next(entry) = max(mine.next(entry), theirs.next(entry));
  }
}

void AttentionState::result(const Tensor& out, const Tensor& lse, const Options& options) const {
  const Reading reading(held_->exclusion);
  const Tensor& query = held_->query;
  const Shape rows{query.shape[0], query.shape[1], query.shape[2], 1};
  Shape outputs = rows;
  outputs[3] = held_->settings.value_dim;
  const auto require = [&](const char* argument, const Tensor& t, const Shape& shape, const AxisNames& axes) {
    require_tensor(argument, t, query.dtype, shape, axes);
  };
  require("out", out, outputs, kTokenAxes);
  require_apart("out", out);
  if (is_given("lse", lse)) {
    require("lse", lse, rows, {"batch", "head", "token"});
    require_apart("lse", lse, {{"out", &out}});
  }
  finish_sums(held_->seen.sums, held_->settings.score.sinks, out, lse, options);
}

}  // namespace attncore
