// Forward attention of float16 and float32 on the model of a matrix unit, in parts of bfloat16, and of float32 as bfloat16 pairs.
#include "cpu/isa/isa.h"
#include "isa_test.h"
#include "split_checks.h"

namespace {
using namespace attncore;

/// The model's kernels of float32's own products, for few rows.
struct ExactRows {
  static constexpr Index kGangRows = kDirectRows;
  static constexpr auto reads_in_place = attncore::reads_in_place<Isa, float>;
  static constexpr auto forward = forward_task<Isa, float, float>;
  static constexpr auto forward_gang = attncore::forward_gang<Isa, float, float>;
};
template <class Item>
constexpr Kernels kTiles = tile_kernels<Isa, Item, ExactRows>("model", forward_kernels<Isa, float>("rows"));

}  // namespace

void test() {
  check_medium(kTiles<Bf16Pair>);
  check_split({&kTiles<Part<2>>, DType::f16});
  check_split({&kTiles<Part<2>>, DType::f32, Precision::high});
  check_split({&kTiles<Part<3>>, DType::f32});
}
