// amx, and float32 by its tiles too, in three parts of bfloat16, as exact as by multiply-adds.  It is an instruction set of its
// own, since results have other bits: each process tries it after amx.
#include "amx.h"

namespace attncore {
namespace {
constexpr Kernels kThreeParts =
    exact_for_few<Part<3>>("tiles of f32 in three bf16 parts, fma f32 for few rows");
}

extern constinit const IsaTable amx_f32 = {.name = "amx_f32",
                                           .supported = amx_supported,
                                           .preferred = nullptr,
                                           .f32 = &avx512_f32,
                                           .f64 = &avx512_f64,
                                           .bf16 = &amx_bf16,
                                           .f16 = &amx_f16,
                                           .highest = &kThreeParts,
                                           .high = &amx_high,
                                           .medium = &amx_medium,
                                           .bf16_products = &avx512_bf16_pairs,
                                           .bf16_gradients = &avx512_f32};

}  // namespace attncore
