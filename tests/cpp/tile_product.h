// Products by a matrix unit's stream (tile_stream.h), block by block as forward_pipeline.h has them, with gemm.h's interface.
#pragma once

#include <vector>

#include "check.h"
#include "cpu/tile/tile_stream.h"

namespace attncore {
namespace {

/// Row tiles of just C's rows; C has room for whole tiles' columns.  Between products a call each.  Continued: C is summed in place.
template <class Isa, class Item, class Values, class Finish>
void stream_gemm(Matrix<float> c, Matrix<const Item> a, Panel<const Values> b, Index rows, Index columns,
                 Index depth, Finish finish) {
  using V = Vec<Isa, float>;
  const Index deep = round_up(depth, kTileDepth), steps = deep / kTileDepth / kParts<Item>;
  std::vector<Bf16Pair> left(static_cast<std::size_t>(rows * deep));
  for (Index row = 0; row < rows; ++row) std::copy_n(pairs_of(a.row(row)), depth, left.data() + row * deep);
  constexpr bool kAdds = std::is_same_v<Finish, Continued>;
  std::vector<float> sums(static_cast<std::size_t>(rows * c.stride));
  if (kAdds) std::copy_n(c.data, rows * c.stride, sums.data());
  Index products = 0, calls = 0;
  auto between = [&] { ++calls; };
  for (Index row = 0; row < rows; row += 2 * kTileRows) {
    const Index given = min(2 * kTileRows, rows - row);
    TileUnit<Isa>::configure(given);
    TileStream<Isa> stream;
    for (Index column = 0; column < columns; column += 2 * kTileColumns) {
      const Index strip = column - column % (Isa::kColumns * kTileColumns);
      const Index stride = strip_registers<Isa, float>(b.columns, strip) * kTileColumns;
      const PairTile right{pairs_of(b.data) + strip * b.depth + (column - strip), stride};
      const bool tall = given > kTileRows, wide = columns - column > kTileColumns;
      const SumTiles out{sums.data() + row * c.stride + column, c.stride, tall, wide};
      stream.template multiply<Item>({left.data() + row * deep, deep}, right, steps, out, kAdds, between);
      products += (tall ? 2 : 1) * (wide ? 2 : 1) * steps * kProducts<Item>;
    }
    stream.flush();
    TileUnit<Isa>::release();
  }
  CHECK(calls == products);
  for (Index row = 0; row < rows; ++row) {
    for (Index column = 0; column < columns; column += kTileColumns) {
      float* const at = c.row(row) + column;
      store(at, finish(at, load<V>(sums.data() + row * c.stride + column), row));
    }
  }
}

}  // namespace
}  // namespace attncore
