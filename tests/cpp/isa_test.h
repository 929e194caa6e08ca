// A test that is compiled once for each instruction set of the build, with the flags of that ISA
// (attn_isa_test in CMakeLists.txt): its tag and what it specialises are what is tested.
#pragma once

#include ATTN_ISA_FILE  // NOLINT(bugprone-suspicious-include)

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"
#include "cpu/kernels/forward_task.h"
#include "kit.h"

using attncore::Index;
using Isa = attncore::ATTN_ISA_TAG;

/// What each of these tests is.
void test();

int main() {
  if (!attncore::supported()) {
    std::printf("skipped: this machine has no %s\n", ATTN_ISA_NAME);
    return 77;
  }
  test();
  return finish();
}

/// A panel of its own, in memory of the promised size and no more.
template <class T>
struct OwnPanel {
  std::vector<T> memory;
  attncore::Panel<T> panel;

  OwnPanel(Index columns, Index depth)
      : memory(static_cast<std::size_t>(attncore::panel_items<Isa, T>(columns, depth)), T(77)),
        panel{memory.data(), columns, depth} {}

  T& operator()(Index row, Index column) {
    constexpr Index n = attncore::kWidth<Isa, T>;
    constexpr Index kStrip = Isa::kColumns * n;
    const Index first = column / kStrip * kStrip;
    const Index width = std::min(kStrip, attncore::round_up(panel.columns, n) - first);
    return memory[static_cast<std::size_t>(first * panel.depth + row * width + column - first)];
  }
};
