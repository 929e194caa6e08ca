#include "segment_ranges.h"

#include <algorithm>
#include <new>
#include <vector>

#include "score/window.h"

namespace attncore {
namespace {

/// Tokens in a row that have one segment.
struct Run {
  Index segment;
  Range tokens;
};

void find_runs(const Tensor& segments, const Place& place, Range tokens, std::vector<Run>& runs) {
  runs.clear();
  for (Index token = tokens.begin; token < tokens.end; ++token) {
    const Index segment = read_int(at(segments, place.batch, 0, place.first + token), segments.dtype);
    if (!runs.empty() && runs.back().segment == segment) {
      ++runs.back().tokens.end;
    } else {
      runs.push_back({segment, {token, token + 1}});
    }
  }
}

/// Sorts runs by their segments, where that is no more work than to look at all of them for each query.  Returns whether each segment is
/// one run.
bool sort_runs(std::vector<Run>& runs, Index queries) {
  constexpr std::size_t kFew = 64;
  const auto less = [](const Run& a, const Run& b) { return a.segment < b.segment; };
  if (!std::is_sorted(runs.begin(), runs.end(), less)) {
    if (runs.size() > kFew + static_cast<std::size_t>(queries)) return false;
    std::sort(runs.begin(), runs.end(), less);
  }
  const auto same = [](const Run& a, const Run& b) { return a.segment == b.segment; };
  return std::adjacent_find(runs.begin(), runs.end(), same) == runs.end();
}

/// Of a sequence's queries; false: they have none that move one way.
bool find_ranges(const std::vector<Run>& queries, const std::vector<Run>& keys, Range* of_query) {
  Range last;
  for (const Run& run : queries) {
    const auto found = std::lower_bound(keys.begin(), keys.end(), run.segment,
                                        [](const Run& key, Index segment) { return key.segment < segment; });
    const bool none = found == keys.end() || found->segment != run.segment;
    const Range seen = none ? Range{last.end, last.end} : found->tokens;
    if (seen.begin < last.begin) return false;
    std::fill(of_query + run.tokens.begin, of_query + run.tokens.end, seen);
    last = seen;
  }
  return true;
}

}  // namespace

void resolve_segments(Call& call) {
  const Tensor &of_queries = call.score.query_segments, &of_keys = call.score.key_segments;
  if (!of_queries.given()) return;
  constexpr Index kMostTokens = Index{1} << 40;
  const Index entries = of_queries.shape[0], tokens = of_queries.shape[2];
  if (entries > kMostTokens / max(1, tokens)) throw std::bad_alloc();
  const auto memory = std::make_shared<Range[]>(static_cast<std::size_t>(max(1, entries * tokens)));
  std::vector<Run> queries, keys;
  for (Index entry = 0; entry < call.batch; ++entry) {
    const Sequence s = call.sequence(entry);
    if (s.queries == 0) continue;
    Range* const of_query = memory.get() + s.query_place.batch * tokens + s.query_place.first;
    find_runs(of_queries, s.query_place, {0, s.queries}, queries);
    const Range seen = Window::visible(call, {s, {}, {0, s.queries}});  // others may be anything
    find_runs(of_keys, s.key_place, intersect(seen, {0, s.keys}), keys);
    if (!sort_runs(keys, s.queries) || !find_ranges(queries, keys, of_query))
      std::fill_n(of_query, s.queries, SegmentRanges::kNone);
  }
  call.segments = {.of_query = memory.get(), .tokens = tokens, .memory = memory};
}

}  // namespace attncore
