// Forward attention on the model of a matrix unit.
#include "cpu/isa/isa.h"
#include "isa_test.h"
#include "tile_case.h"

void test() {
  using namespace attncore;
  static constexpr Kernels kModel = tile_kernels<Isa>(forward_kernels<Isa, float, Bf16Pair>("model"));
  check_forward(kModel);
}
