// Packed documents mostly stand in queries and keys in one order: then a query's segment is a range of keys, and segments are a band.
#pragma once

#include "call.h"

namespace attncore {

/// The range of keys of each query, where no range begins or ends before the one of the query before; else kNone for all queries of the
/// sequence.  All else of the call has been checked.
void resolve_segments(Call& call);

}  // namespace attncore
