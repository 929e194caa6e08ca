// What the back end and the kernels of products tell each other.
#pragma once

#include "../../layer_call.h"

namespace attncore {

/// The depth of a packed panel.  Sums over more are sums of sums, so it is part of the result's bits.
inline constexpr Index kDepthBlock = 256;

/// A piece of a product: a tile of c, over some of the depth, which begins at a multiple of kDepthBlock.
struct ProductTask {
  Range rows, columns, depth;
  bool first = true;  // the tile's first depth: begin with zeros
  bool last = true;   // its last: write c

  std::byte* state = nullptr;  // ProductSizes::state bytes: the sums so far
  const std::byte* packed =
      nullptr;  // `columns` of b over `depth`, ProductSizes::panel bytes; none: pack them here
};

/// A piece of the packing of b (depth, columns) for the tasks that share it.
struct ProductPacking {
  Range columns, depth;              // what the tasks share
  Range piece_columns, piece_depth;  // what to pack: whole strips, and one depth block
  std::byte* packed = nullptr;
};

/// Bytes of memory for a tile of so many rows and columns over so much depth.
struct ProductSizes {
  Index scratch, state, panel;
};

inline constexpr Index kRopeTokens = 32;

/// Up to kRopeTokens rows of a rotation, all heads of them.
struct RopeTask {
  Index batch = 0;
  Index batches = 1;  // so many entries share their positions
  Range tokens;
};

}  // namespace attncore
