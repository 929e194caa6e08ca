// A problem's inputs as a call: every precondition on them, every default in place.
#pragma once

#include "call.h"

namespace attncore {

/// Throws as validate does.  Without a value, for attention_weights.
Call resolve(const Problem& problem, bool with_value);

[[nodiscard]] Coins coins_of(const Dropout& dropout);

void require_query_dtype(const char* argument, const Tensor& t, const Call& call);

}  // namespace attncore
