// bfloat16 by each instruction set that the machine has, prefill and decoding, as forward_tiles.cpp tests it on the model of a matrix unit.
#include "decode_checks.h"
#include "forward_checks.h"

int main() {
  for (const attncore::IsaTable* const table : attncore::available_tables()) {
    const int before = failures;
    attncore::check_forward(*table->bf16);
    attncore::check_decoding(*table->bf16);
    if (failures != before) std::printf("by %s\n", table->name);
  }
  return finish();
}
