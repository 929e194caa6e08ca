// avx512 with the dot product of bfloat16 pairs: Zen 4 (2022) and later, Cooper Lake (2020), Sapphire Rapids (2023).
//
// AMD's cores start as many of them in a cycle as multiply-adds (measured on Zen 5): twice their work.  On Intel's they take
// twice as long, so that there avx512 is as fast and more exact.
#include "avx512_bf16.h"

#include "isa.h"

namespace attncore {
namespace {
constexpr Kernels kPairs = forward_kernels<Avx512, float, Bf16Pair>("dot products of bf16 pairs");
bool preferred() noexcept { return supported_with_pairs() && __builtin_cpu_is("amd") != 0; }
}  // namespace

/// But for bfloat16, avx512's own kernels.
extern constinit const IsaTable avx512_bf16 = {"avx512_bf16", supported_with_pairs, preferred,
                                               &avx512_f32,   &avx512_f64,          &kPairs};

}  // namespace attncore
