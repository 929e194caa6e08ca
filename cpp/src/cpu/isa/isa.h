// An ISA is a header with its tag and what it specialises, and a file with its table.  (avx512_bf16, amx and amx_f32 are files
// with tables: their tag is avx512's.)
#pragma once

#include "../kernels/backward.h"
#include "../kernels/backward_bias.h"
#include "../kernels/backward_rows.h"
#include "../kernels/combine.h"
#include "../kernels/forward_task.h"
#include "../kernels/linear.h"
#include "../kernels/probe.h"
#include "../kernels/rope.h"
#include "../kernels/weights.h"

namespace attncore {

template <class Isa, class T, class Item>
BackwardSizes backward_sizes(const Call& call, Index owned_rows) noexcept {
  const Index rows = call.query.shape[0] * call.kv_heads * call.query.shape[2] * call.group;
  return {
      .row_tile = backward_rows(call, Isa::kRows),
      .stats = 3 * rows * Index{sizeof(T)},
      .scratch = max(BackwardKernel<Isa, T, Item>::bytes(call, owned_rows), rows_scratch<Isa, T, Item>(call)),
      .bias_queries = BackwardBiasKernel<Isa, T, Item>::bias_queries(call),
      .bias_scratch = BackwardBiasKernel<Isa, T, Item>::bytes(call)};
}

/// What forward calls; Item: what its products multiply.
template <class Isa, class T, class Item = T>
constexpr Kernels forward_kernels(const char* name) noexcept {
  return {
      .name = name,
      .row_block = Isa::kRows,
      .key_block = Isa::kColumns * kWidth<Isa, T>,
      .key_tile = Isa::template kKeyTile<T>,
      .most_rows = 96,
      .gang_rows = kDirectRows,
      .sizes = Scratch<Isa, T, Item>::sizes,
      .reads_in_place = reads_in_place<Isa, T, Item>,
      .pack = pack_key_tile<Isa, T, Item>,
      .forward = forward_task<Isa, T, Item>,
      .forward_gang = forward_gang<Isa, T, Item>,
      .combine = combine_parts<Isa, T>,
      .multiply_adds = multiply_adds<Isa, T, Item>,
      .read_memory = read_memory<Isa>,
  };
}

/// These, and what gradients and layers' products call.
template <class Isa, class T, class Item = T>
constexpr Kernels with_training(Kernels kernels) noexcept {
  kernels.backward_sizes = backward_sizes<Isa, T, Item>;
  kernels.backward_rows = backward_rows_task<Isa, T, Item>;
  kernels.backward = backward_task<Isa, T, Item>;
  kernels.backward_bias = backward_bias_task<Isa, T, Item>;
  kernels.product_sizes = ProductScratch<Isa, T, Item>::sizes;
  kernels.pack_product = pack_product<Isa, T, Item>;
  kernels.product = product_task<Isa, T, Item>;
  return kernels;
}

template <class Isa, class T>
constexpr Kernels make_kernels(const char* name) noexcept {
  Kernels kernels = with_training<Isa, T>(forward_kernels<Isa, T>(name));
  kernels.weights = weights_task<Isa, T>;
  kernels.column_sums = column_sums<Isa, T>;
  kernels.rope_scratch = rope_scratch<Isa, T>;
  kernels.rope = rope_task<Isa, T>;
  return kernels;
}

template <class Isa>
inline constexpr Kernels kF32 = make_kernels<Isa, float>("fma f32");
template <class Isa>
inline constexpr Kernels kF64 = make_kernels<Isa, double>("fma f64");

/// Whatever is not float64 takes float32's kernels.
template <class Isa>
constexpr IsaTable make_table(const char* name, bool (*supported)() noexcept, const Kernels& f32 = kF32<Isa>,
                              const Kernels& f64 = kF64<Isa>) noexcept {
  return {.name = name,
          .supported = supported,
          .preferred = supported,
          .f32 = &f32,
          .f64 = &f64,
          .bf16 = &f32,
          .f16 = &f32,
          .highest = &f32,
          .high = &f32,
          .medium = &f32,
          .bf16_products = &f32,
          .bf16_gradients = &f32};
}

}  // namespace attncore
