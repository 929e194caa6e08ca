// AMX: tiles of bfloat16, Sapphire Rapids (2023) and later.
//
// It has been tested with a model of the unit (tests/cpp/amx.cpp), not on such a machine: so each process tries it once, and
// prefers it where it is right and clearly faster (choice.h).
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../kernels/forward_tiles.h"
#include "avx512_bf16.h"
#include "isa.h"

namespace attncore {
namespace {

struct alignas(64) TileConfiguration {
  std::uint8_t palette = 1, start_row = 0, reserved[14]{};
  std::uint16_t row_bytes[8] = {64, 64, 64, 64, 64, 64, 64, 64}, reserved_row_bytes[8]{};
  std::uint8_t rows[8] = {16, 16, 16, 16, 16, 16, 16, 16}, reserved_rows[8]{};
};
static_assert(sizeof(TileConfiguration) == 64);

}  // namespace

/// The compilers' intrinsics take literals only, and g++ 12's don't say which memory they read.
template <>
struct TileUnit<Avx512> {
  static ATTN_INLINE void configure() noexcept {
    static constexpr TileConfiguration kTiles;
    asm volatile("ldtilecfg %0" : : "m"(kTiles));
  }
  static ATTN_INLINE void release() noexcept { asm volatile("tilerelease"); }
  template <int kTile>
  static ATTN_INLINE void zero() noexcept {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  template <int kTile>
  static ATTN_INLINE void load(const void* p, Index stride) noexcept {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(kTile), "r"(p), "r"(stride) : "memory");
  }
  template <int kTile>
  static ATTN_INLINE void store(void* p, Index stride) noexcept {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(kTile), "r"(p), "r"(stride) : "memory");
  }
  template <int kSum, int kA, int kB>
  static ATTN_INLINE void multiply() noexcept {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
  }
};

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

bool supported_with_tiles() noexcept { return supported_with_pairs() && has_tiles() && leave_to_use_tiles(); }

constexpr Kernels kTiles =
    tile_kernels<Avx512>(forward_kernels<Avx512, float, Bf16Pair>("tiles of bf16 pairs"));

}  // namespace

/// But for bfloat16, avx512's own kernels: float32 is not rounded yet.
extern constinit const IsaTable amx = {"amx",   supported_with_tiles, nullptr, &avx512_f32, &avx512_f64,
                                       &kTiles, &avx512_f32};

}  // namespace attncore
