// The queries of a cache's call, rotated as its keys are.
#pragma once

#include <vector>

#include "cache_call.h"

namespace attncore {

class RotatedQuery {
 public:
  /// Each query turns by the position of its own token: the last new one stands at its entry's last, and a tree's at as
  /// many steps past the tokens before it as it has ancestors.  `problem` is whole; its query becomes the rotated copy.
  RotatedQuery(Problem& problem, const CacheSettings& settings, const Options& options);

 private:
  std::vector<std::byte> memory_;
  std::vector<Index> positions_;  // (entry, token)
};

}  // namespace attncore
