// A problem's inputs as a call: every precondition on them, every default in place.
#pragma once

#include "call.h"

namespace attncore {

/// attention_weights has no value; only forward knows pages and storage other than query's dtype.
enum class Use : std::uint8_t { forward, backward, weights };

/// Throws as validate does.
Call resolve(const Problem& problem, Use use);

[[nodiscard]] Coins coins_of(const Dropout& dropout);

}  // namespace attncore
