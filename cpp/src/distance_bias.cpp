#include "distance_bias.h"

#include <cmath>

#include "number.h"

namespace attncore {

// Half of one direction's buckets are for the distances 0, 1, …; the others divide the rest up to max_distance evenly
// on a logarithmic scale, and the last one has all that is farther.
Index bucket_of(const RelativeBias& bias, Index distance) noexcept {
  const Index all = bias.table.shape[3];
  const Index buckets = bias.bidirectional ? all / 2 : all;
  const Index first = bias.bidirectional && distance > 0 ? buckets : 0;
  const Index away = bias.bidirectional ? std::abs(distance) : max(-distance, 0);
  const Index exact = buckets / 2;
  if (away < exact) return first + away;
  const double ratio = std::log(static_cast<double>(away) / static_cast<double>(exact)) /
                       std::log(static_cast<double>(bias.max_distance) / static_cast<double>(exact));
  const double beyond = ratio * static_cast<double>(buckets - exact);
  return first + min(exact + static_cast<Index>(beyond), buckets - 1);
}

DistanceBias lay_out(const Call& call) {
  const RelativeBias& bias = call.score.relative_bias;
  const DType compute = call.compute();
  DistanceBias laid;
  for (Index entry = 0; entry < call.batch; ++entry) {
    const Sequence s = call.sequence(entry);
    const Index before = s.offset + s.queries - 1, after = s.keys - 1 - s.offset;
    laid.farthest = max(laid.farthest, min(bias.max_distance, max(before, after)));
  }
  laid.buckets = bias.table.shape[3];
  const Index heads = bias.table.shape[1], distances = laid.distances();
  const Index item = item_size(compute);
  const Index line_bytes = heads * distances * item;
  const std::shared_ptr<std::byte[]> memory(
      new std::byte[static_cast<std::size_t>(line_bytes + distances * Index{sizeof(std::int32_t)})]);
  auto* const bucket = reinterpret_cast<std::int32_t*>(memory.get() + line_bytes);
  for (Index i = 0; i < distances; ++i) {
    bucket[i] = static_cast<std::int32_t>(bucket_of(bias, i - laid.farthest));
  }
  for (Index head = 0; head < heads; ++head) {
    for (Index i = 0; i < distances; ++i) {
      const double entry = read_number(at(bias.table, 0, head, 0, bucket[i]), bias.table.dtype);
      write_number(entry, memory.get() + (head * distances + i) * item, compute);
    }
  }
  laid.line = memory.get();
  laid.bucket = bucket;
  laid.memory = memory;
  return laid;
}

}  // namespace attncore
