// A test that is compiled once for each instruction set of the build, with the flags of that ISA (attn_isa_test in
// CMakeLists.txt).  The ISA's own file is included, so that its tag and what it specialises are what is tested.
#pragma once

#include ATTN_ISA_FILE  // NOLINT(bugprone-suspicious-include)

#include <cstdint>
#include <cstring>

#include "check.h"

using Isa = attncore::ATTN_ISA_TAG;

/// What each of these tests is.
void test();

int main() {
  if (!attncore::supported()) {
    std::printf("skipped: this machine has no %s\n", attncore::ATTN_ISA_NAME.name);
    return 77;
  }
  test();
  return finish();
}

/// The same numbers on every machine.
class Random {
 public:
  std::uint32_t bits() {
    state_ = state_ * 6364136223846793005U + 1442695040888963407U;
    return static_cast<std::uint32_t>(state_ >> 32U);
  }
  /// −1 … 1
  float number() { return static_cast<float>(bits() >> 8U) / 8388608.0F - 1.0F; }
  int below(int limit) { return static_cast<int>(bits() % static_cast<std::uint32_t>(limit)); }

 private:
  std::uint64_t state_ = 1;
};
