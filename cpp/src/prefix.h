// Sequences that begin with the same pages attend to them together, so that these are read once (Juravsky et al. 2024).
#pragma once

#include <functional>
#include <vector>

#include "call.h"

namespace attncore {

/// Part `part` of the keys is the same for some of a group's sequences.
struct SharedPart {
  Index part = 0;
  std::vector<std::size_t> members;  // two or more, of PrefixGroup::sequences
};

/// At most `most` sequences that share at least their first part; or one that shares nothing.
struct PrefixGroup {
  std::vector<Sequence> sequences;
  std::vector<SharedPart> parts;
};

/// part_keys(sequence): the keys of its parts; 0 where it shares nothing.  Groups stand where their first sequence did.
[[nodiscard]] std::vector<PrefixGroup> prefix_groups(const Pages& pages,
                                                     const std::vector<Sequence>& sequences, std::size_t most,
                                                     const std::function<Index(const Sequence&)>& part_keys);

}  // namespace attncore
