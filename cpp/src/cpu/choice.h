// Which ISA a process takes where nobody says.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace attncore {

/// What running the kernels of two ISAs, by turns and in one thread, has shown.
struct Trial {
  bool right = false;  // the candidate's results are the other's, but for rounding
  double speedup = 0;  // the other's time by the candidate's; 0 where it is wrong
};

/// Of forward in one dtype.
[[nodiscard]] Trial try_kernels(const Kernels& candidate, const Kernels& other, DType dtype);

struct Choice {
  const IsaTable* table = nullptr;
  std::string reason;
};

/// `tables` are those that the machine can run, best first; the last one is preferred.  Where some are to be tried it takes a
/// millisecond or two.
[[nodiscard]] Choice choose(const std::vector<const IsaTable*>& tables);

}  // namespace attncore
