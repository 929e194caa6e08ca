// What an AttentionState holds.
#pragma once

#include <attncore/state.hpp>

#include "exclusion.h"
#include "state_sums.h"

namespace attncore {

inline constexpr Index kFarthestKey = Index{1}
                                      << 59;  // positions: the difference of two stays in forward's range

/// All that pieces change.
struct Seen {
  Sums sums;
  Tensor next_key;  // i64 (batch, 1, 1, 1): where a piece begins that does not say so

  Seen() = default;
  Seen(const Tensor& query, Index value_dim);
  void copy(const Seen& other) const;
  [[nodiscard]] std::vector<AttentionState::Part> parts() const;
  [[nodiscard]] Index& next(Index entry) const noexcept { return static_cast<Index*>(next_key.data)[entry]; }

 private:
  Workspace memory;
};

struct AttentionState::Held {
  AttentionStateSettings settings;  // its tensors lie in `memory`
  Tensor query;                     // of settings.dtype, without gaps
  Workspace memory;
  Seen seen;
  Workspace scratch;  // of the last update
  Exclusion exclusion{"state"};
};

}  // namespace attncore
