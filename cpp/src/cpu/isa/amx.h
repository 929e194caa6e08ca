// What amx and amx_f32 share: the tiles of Sapphire Rapids (2023) and later.
#pragma once

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
  static ATTN_INLINE void configure(Index rows = 2 * kTileRows) noexcept {
    TileConfiguration tiles;
    const Index rest = rows > kTileRows ? rows - kTileRows : kTileRows;
    for (const int tile : {0, 1, 4}) tiles.rows[tile] = static_cast<std::uint8_t>(min(rows, kTileRows));
    for (const int tile : {2, 3, 5}) tiles.rows[tile] = static_cast<std::uint8_t>(rest);
    asm volatile("ldtilecfg %0" : : "m"(tiles));
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

/// float32's own products: few rows wait for memory, and may as well be exact.
struct ExactRows {
  static constexpr Index kGangRows = kDirectRows;
  static bool reads_in_place(const Call& call, const Sequence& sequence) noexcept {
    return avx512_f32.reads_in_place(call, sequence);
  }
  static void forward(const Call& call, const Task& task, std::byte* scratch) noexcept {
    avx512_f32.forward(call, task, scratch);
  }
  static void forward_gang(const Call& call, const Task* tasks, Index count, std::byte* scratch) noexcept {
    avx512_f32.forward_gang(call, tasks, count, scratch);
  }
};

/// By tiles, but for few rows.
template <class Item>
constexpr Kernels exact_for_few(const char* name) noexcept {
  return tile_kernels<Avx512, Item, ExactRows>(name, forward_kernels<Avx512, float, Bf16Pair>(name));
}

}  // namespace

bool amx_supported() noexcept;
extern const Kernels amx_bf16, amx_f16, amx_high, amx_medium;

namespace {

/// Tiles for all but gradients and exact float32, of which `highest` has the forward; avx512_bf16's pairs for layers.
constexpr IsaTable amx_table(const char* name, const Kernels& highest) noexcept {
  IsaTable table = make_table<Avx512>(name, amx_supported, avx512_f32, avx512_f64);
  table.preferred = nullptr;
  table.bf16 = &amx_bf16;
  table.f16 = &amx_f16;
  table.highest = &highest;
  table.high = &amx_high;
  table.medium = &amx_medium;
  table.bf16_products = &avx512_bf16_pairs;
  return table;
}

}  // namespace

}  // namespace attncore
