// Forward attention of bfloat16 on the model of a matrix unit, and whether it is chosen.
#include "choice_checks.h"
#include "cpu/isa/isa.h"
#include "decode_checks.h"
#include "forward_checks.h"
#include "isa_test.h"

void test() {
  using namespace attncore;
  static constexpr Kernels kModel =
      tile_kernels<Isa, Bf16Pair>("model", forward_kernels<Isa, float, Bf16Pair>("pairs"));
  check_choice(kModel);
  check_forward(kModel);
  check_decoding(kModel);
}
