// T5's relative position bias (Raffel et al. 2020), laid out by distance.
#pragma once

#include "call.h"

namespace attncore {

inline constexpr Index kFarthestDistance = Index{1} << 20;

/// The bucket of key − position = distance.
[[nodiscard]] Index bucket_of(const RelativeBias& bias, Index distance) noexcept;

/// The table of a validated call as lines of the accumulation type, over the distances that occur.
[[nodiscard]] DistanceBias lay_out(const Call& call);

}  // namespace attncore
