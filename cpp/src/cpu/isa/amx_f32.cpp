// amx, and float32 by its tiles too, in three parts of bfloat16, as exact as by multiply-adds.  It is an instruction set of its
// own, since results have other bits: each process tries it after amx.
#include "amx.h"

namespace attncore {
namespace {
constexpr Kernels kThreeParts =
    exact_for_few<Part<3>>("tiles of f32 in three bf16 parts, fma f32 for few rows");
}

extern constinit const IsaTable amx_f32 = amx_table("amx_f32", kThreeParts);

}  // namespace attncore
