// AMX: tiles of bfloat16, for all dtypes that need at most two of them a number, and float32 by lower precision.
//
// It has been tested with a model of the unit (tests/cpp/amx.cpp), not on such a machine: so each process tries it once, and
// prefers it where it is right and clearly faster (choice.h).
#include "amx.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace attncore {
namespace {

bool has_tiles() noexcept {
  constexpr unsigned kLeaf = 7, kBf16 = 1U << 22U, kTile = 1U << 24U;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(kLeaf, 0, &a, &b, &c, &d) != 0 && (d & kBf16) != 0 && (d & kTile) != 0;
}

/// Linux saves the tiles of threads that it has given leave to use them: once a process.
bool leave_to_use_tiles() noexcept {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace

bool amx_supported() noexcept { return supported_with_pairs() && has_tiles() && leave_to_use_tiles(); }

extern constinit const Kernels amx_bf16 = tile_kernels<Avx512, Bf16Pair>(
    "tiles of bf16 pairs", forward_kernels<Avx512, float, Bf16Pair>("tiles of bf16 pairs"));
extern constinit const Kernels amx_medium =
    exact_for_few<Bf16Pair>("tiles of bf16 pairs, fma f32 for few rows");
extern constinit const Kernels amx_high =
    exact_for_few<Part<2>>("tiles of f32 in two bf16 parts, fma f32 for few rows");
extern constinit const Kernels amx_f16 =
    exact_for_few<Part<2>>("tiles of f16 in two bf16 parts, fma f32 for few rows");

extern constinit const IsaTable amx = amx_table("amx", avx512_f32);

}  // namespace attncore
