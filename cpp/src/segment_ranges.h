// Packed documents mostly stand in queries and keys in one order: then a query's segment is a range of keys, and segments are a band.
#pragma once

#include "call.h"

namespace attncore {

/// The range of keys of each query, where no range begins or ends before the one of the query before; else Call has none.
/// Key and query segments have been looked at.
[[nodiscard]] SegmentRanges segment_ranges(const Call& call);

}  // namespace attncore
