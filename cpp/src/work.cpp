#include "work.h"

#include <algorithm>

#include "score/steps.h"

namespace attncore {
namespace {

double item_bytes(DType dtype) noexcept {
  return dtype == DType::i4 ? 0.5 : static_cast<double>(item_size(dtype));
}

}  // namespace

Work work_of(const Call& call) {
  Work work;
  const double heads = static_cast<double>(call.heads), kv_heads = static_cast<double>(call.kv_heads);
  const double dim = static_cast<double>(call.dim), value_dim = static_cast<double>(call.value_dim);
  const double key_bytes = item_bytes(call.key.dtype) * dim + item_bytes(call.value.dtype) * value_dim;
  for (Index batch = 0; batch < call.batch; ++batch) {
    const Sequence sequence = call.sequence(batch);
    work.flops += 2 * visible_pairs(call, sequence) * heads * (dim + value_dim);
    work.bytes +=
        static_cast<double>(sequence.keys) * kv_heads * key_bytes +
        static_cast<double>(sequence.queries) * heads * (dim + value_dim) * item_bytes(call.query.dtype);
  }
  return work;
}

double visible_pairs(const Call& call, const Sequence& sequence) {
  if (sequence.queries == 0) return 0;
  const auto seen_by = [&](Index query) {
    return ScoreSteps::visible(call, {sequence, {0, 1}, {query, query + 1}});
  };
  // What is visible moves one way: if the first and the last query see the same keys, all do.
  const Range first = seen_by(0), last = seen_by(sequence.queries - 1);
  if (first.begin == last.begin && first.end == last.end) {
    return static_cast<double>(sequence.queries) * static_cast<double>(first.size());
  }
  const bool by_segments = call.segments.of(sequence.query_place) != nullptr;
  const Index band = by_segments ? 1 : ceil_div(sequence.queries, 64);
  double pairs = 0;
  for (Index query = 0; query < sequence.queries; query += band) {
    const Index count = min(band, sequence.queries - query);
    pairs += static_cast<double>(count) * static_cast<double>(seen_by(query + count / 2).size());
  }
  return pairs;
}

std::vector<Sequence> longest_first(const Call& call) {
  std::vector<Sequence> sequences;
  sequences.reserve(static_cast<std::size_t>(call.batch));
  for (Index batch = 0; batch < call.batch; ++batch) sequences.push_back(call.sequence(batch));
  const auto pairs = [](const Sequence& s) {
    return static_cast<double>(s.queries) * static_cast<double>(s.keys);
  };
  std::sort(sequences.begin(), sequences.end(), [&](const Sequence& a, const Sequence& b) {
    return pairs(a) != pairs(b) ? pairs(a) > pairs(b) : a.batch < b.batch;
  });
  return sequences;
}

}  // namespace attncore
