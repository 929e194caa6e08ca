#include "avx512.h"

#include "isa.h"

namespace attncore {

/// By name, since avx512_bf16 and amx have them too.
extern constinit const Kernels avx512_f32 = kF32<Avx512>, avx512_f64 = kF64<Avx512>;

extern constinit const IsaTable avx512 = make_table<Avx512>("avx512", supported, avx512_f32, avx512_f64);

}  // namespace attncore
