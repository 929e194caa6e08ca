// What the compiler emits by default: SSE2 on x86-64, NEON on AArch64.
#pragma once

#include "../tile/coins.h"

namespace attncore {
namespace {

struct Baseline {
  static constexpr int kBytes = 16, kRows = 6, kColumns = 2;
  template <class T>
  static constexpr Index kKeyTile = 128;
};

bool supported() noexcept { return true; }

}  // namespace

}  // namespace attncore
