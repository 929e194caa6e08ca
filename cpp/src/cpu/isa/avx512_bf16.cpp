// avx512 with the dot product of bfloat16 pairs, and VBMI, which looks bytes up: Zen 4 (2022), Sapphire Rapids (2023) and later.
//
// AMD's cores start as many dot products in a cycle as multiply-adds (measured on Zen 4 and 5): twice their work.  On Intel's
// they take twice as long, so that there avx512 is as fast and more exact.
#include "avx512_bf16.h"

#include "isa.h"

namespace attncore {
namespace {
constexpr Kernels kPairs = with_training<Avx512, float, Bf16Pair>(
    forward_kernels<Avx512, float, Bf16Pair>("dot products of bf16 pairs"));

bool few_rows(const Call& call, const Task& task) noexcept {
  return reads_in_place<Avx512, float>(call, task.sequence);
}

/// Medium: memory is what few rows of float32 wait for, so that theirs may as well be float32's own products.
void forward_rounded(const Call& call, const Task& task, std::byte* scratch) noexcept {
  (few_rows(call, task) ? avx512_f32 : kPairs).forward(call, task, scratch);
}
void forward_rounded_gang(const Call& call, const Task* tasks, Index count, std::byte* scratch) noexcept {
  avx512_f32.forward_gang(call, tasks, count, scratch);
}
constexpr Kernels rounded_kernels() noexcept {
  Kernels kernels = kPairs;
  kernels.name = "dot products of bf16 pairs, fma f32 for few rows";
  kernels.forward = forward_rounded;
  kernels.forward_gang = forward_rounded_gang;
  return kernels;
}
constexpr Kernels kRounded = rounded_kernels();

bool preferred() noexcept { return supported_with_pairs() && __builtin_cpu_is("amd") != 0; }

/// But for bfloat16 and what is rounded to it, avx512's own kernels.
constexpr IsaTable pairs_table() noexcept {
  IsaTable table = make_table<Avx512>("avx512_bf16", supported_with_pairs, avx512_f32, avx512_f64);
  table.preferred = preferred;
  table.bf16 = table.bf16_products = table.bf16_gradients = &avx512_bf16_pairs;
  table.medium = &kRounded;
  return table;
}

}  // namespace

/// By name, since amx has its products of layers too.
extern constinit const Kernels avx512_bf16_pairs = kPairs;

extern constinit const IsaTable avx512_bf16 = pairs_table();

}  // namespace attncore
