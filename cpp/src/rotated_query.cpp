#include "rotated_query.h"

#include <bit>

#include "cache_format.h"
#include "resolve.h"

namespace attncore {
namespace {

Index ancestors(const Tree& tree, const Sequence& s, Index query) noexcept {
  const std::uint64_t* const line = tree.line(s.query_place.batch, s.query_place.first + query);
  Index count = 0;
  for (Index word = 0; word < tree.words; ++word) count += std::popcount(line[word]);
  return count - 1;  // a query's line has the query too
}

std::vector<Index> positions_of(const Call& call, Index tokens) {
  std::vector<Index> positions(static_cast<std::size_t>(call.batch * tokens));
  for (Index entry = 0; entry < call.batch; ++entry) {
    const Sequence s = call.sequence(entry);
    for (Index query = 0; query < s.queries; ++query) {
      const Index step = call.tree.given() ? ancestors(call.tree, s, query) : query;
      positions[static_cast<std::size_t>(entry * tokens + query)] = s.offset + step;
    }
  }
  return positions;
}

}  // namespace

void forward_rotated(const Problem& problem, const CacheSettings& settings, const Options& options) {
  if (!settings.rotary) reject("rotate_query", "is given, but the cache has no rotary embedding");
  const Call call = resolve(problem, Use::forward);
  const Tensor& query = problem.query;
  for (const auto& [argument, result] : {Named{"out", &problem.out}, Named{"lse", &problem.lse}}) {
    if (result->given()) require_apart(argument, *result, {{"query", &query}});
  }
  const Index entries = query.shape[0], tokens = query.shape[2], first = first_rotated(settings);
  std::vector<std::byte> memory(
      static_cast<std::size_t>(entries * query.shape[1] * tokens * query.shape[3] * item_size(query.dtype)));
  const Tensor turned = Tensor::contiguous(memory.data(), query.dtype, query.shape);
  for (Index entry = 0; first > 0 && entry < entries; ++entry) {
    convert(part_of(part_of(query, 0, entry, 1), 3, 0, first),
            part_of(part_of(turned, 0, entry, 1), 3, 0, first));
  }
  const std::vector<Index> positions = positions_of(call, tokens);
  Rope by_position = *settings.rotary;
  by_position.positions = Tensor::contiguous(positions.data(), DType::i64, {entries, 1, tokens, 1});
  const Index rotated = query.shape[3] - first;
  rope(part_of(query, 3, first, rotated), by_position, part_of(turned, 3, first, rotated), false, options);
  Problem same = problem;
  same.query = turned;
  forward(same, options);
}

}  // namespace attncore
