// A task's rows: queries in, out and lse out.
#pragma once

#include "task.h"

namespace attncore {

/// Rows of a tensor over (batch, head, query, dims) in the accumulation type, into `room`.
template <class Isa, class T>
void load_rows(const Tensor& t, Index dims, const TaskRows& row_at, Matrix<T> room, Index rows) noexcept {
  with_storage<T>(t.dtype, [&]<DType kStorage>() {
    for (Index row = 0; row < rows; ++row) {
      const Row r = row_at(row);
      const std::byte* const in = at(t, r);
      for (Index dim = 0; dim < dims; dim += kWidth<Isa, T>) {
        const Index count = min(kWidth<Isa, T>, dims - dim);
        store(room.row(row) + dim, load_items<Isa, T, kStorage>(in + dim * t.stride[3], t.stride[3], count));
      }
    }
  });
}

/// Rows of bfloat16, or of float32 rounded to it, two by two.
template <class Isa>
void load_pair_rows(const Tensor& t, Index dims, const TaskRows& row_at, Matrix<float> room,
                    Index rows) noexcept {
  constexpr Index n = 2 * kWidth<Isa, float>;
  with_pair_storage(t.dtype, [&]<DType kStorage>() {
    for (Index row = 0; row < rows; ++row) {
      const std::byte* const in = at(t, row_at(row));
      for (Index dim = 0; dim < dims; dim += n) {
        store(reinterpret_cast<Bf16Pair*>(room.row(row)) + dim / 2,
              load_pairs<Isa, kStorage>(in + dim * t.stride[3], t.stride[3], dims - dim));
      }
    }
  });
}

/// Rows in parts; `harmed`: those that a split would harm.
template <class Isa, int n>
void load_part_rows(const Tensor& t, Index dims, const TaskRows& row_at, Matrix<float> room, Index rows,
                    std::uint32_t* harmed) noexcept {
  with_part_storage(t.dtype, [&]<DType kStorage>() {
    for (Index row = 0; row < rows; ++row) {
      const std::byte* const in = at(t, row_at(row));
      auto* out = reinterpret_cast<Bf16Pair*>(room.row(row));
      for (Index dim = 0; dim < dims; dim += kRunItems) {
        U32<Isa> parts[n];
        split<Isa, n>(load_dims<Isa, kStorage>(in, t.stride[3], dim, dims),
                      load_dims<Isa, kStorage>(in, t.stride[3], dim + kTileDepth, dims), parts);
        for (int part = 0; part < n; ++part, out += kTileDepth) store(static_cast<void*>(out), parts[part]);
      }
      harmed[row] = is_harmed<Isa, kStorage>(in, t.stride[3], dims) ? 1 : 0;
    }
  });
}

/// Rows where they lie, if products can take them from there; else no data.  Of pairs, so that all their dims have a partner.
template <class T, class Item = T>
ATTN_INLINE Matrix<Item> rows_in_place(const Tensor& t, const TaskRows& row_at) noexcept {
  constexpr Index kItem = sizeof(Item), kDims = kNumbers<T, Item>;
  const DType dtype = kInPairs<T, Item> ? DType::bf16 : row_at.call.compute();
  std::byte* const data = at(t, row_at(0));
  const bool aligned =
      t.stride[2] % kItem == 0 && reinterpret_cast<std::uintptr_t>(data) % alignof(Item) == 0;
  const bool beside = t.dtype == dtype && row_at.call.group == 1 && t.stride[3] * kDims == kItem &&
                      t.shape[3] % kDims == 0 && aligned;
  return {beside ? reinterpret_cast<Item*>(data) : nullptr, t.stride[2] / kItem};
}

/// Rows as products take them: where they lie, if that can be; else in `room`, loaded if asked.  Of pairs that are read in whole registers
/// (`padded`) always there.
template <class Isa, class T, class Item = T>
ATTN_INLINE Matrix<const Item> rows_of(const Tensor& t, Index dims, const TaskRows& row_at, Matrix<T> room,
                                       Index rows, bool load, bool padded = false) noexcept {
  if (!kInPairs<T, Item> || !padded) {
    if (const auto in_place = rows_in_place<T, Item>(t, row_at); in_place.data != nullptr)
      return as_const(in_place);
  }
  if constexpr (kInPairs<T, Item>) {
    if (load) load_pair_rows<Isa>(t, dims, row_at, room, rows);
    return {reinterpret_cast<const Item*>(room.data), room.stride};
  } else {
    if (load) load_rows<Isa, T>(t, dims, row_at, room, rows);
    return as_const(room);
  }
}

/// lse of rows that have seen all their keys, or maximum and sum, where they are asked for.
template <class Isa, class T>
void finish_sums(const Call& call, const TaskRows& row_at, const OnlineSoftmax<Isa, T>& softmax,
                 Index rows) noexcept {
  if (!call.sum.given() && !call.lse.given()) return;
  for (Index row = 0; row < rows; ++row) {
    const Row r = row_at(row);
    if (call.sum.given()) {
      __builtin_memcpy(at(call.lse, r), softmax.maximum + row, sizeof(T));
      __builtin_memcpy(at(call.sum, r), softmax.exact_sum + row, sizeof(T));
    } else {
      const T lse = softmax.log_sum_exp(row);
      __builtin_memcpy(at(call.lse, r), &lse, sizeof lse);
    }
  }
}

/// Each row's sink is a key; head_of(row) is its head.
template <class Isa, class T, class HeadOf>
ATTN_INLINE void add_sinks(const Call& call, const OnlineSoftmax<Isa, T>& softmax, Index rows,
                           HeadOf head_of) noexcept {
  const Tensor& sinks = call.score.sinks;
  for (Index row = 0; sinks.given() && row < rows; ++row)
    softmax.add_sink(row, load_scalar<Isa, T>(at(sinks, 0, head_of(row)), sinks.dtype));
}

/// out and lse of rows that have seen all their keys.
template <class Isa, class T>
void finish_rows(const Call& call, const TaskRows& row_at, const OnlineSoftmax<Isa, T>& softmax,
                 Index rows) noexcept {
  constexpr Index n = kWidth<Isa, T>;
  add_sinks<Isa, T>(call, softmax, rows, [&](Index row) { return row_at(row).head; });
  with_storage<T>(call.out.dtype, [&]<DType kStorage>() {
    with_stride<kStorage>(call.out.stride[3], [&](auto stride) {
      for (Index row = 0; row < rows; ++row) {
        const T factor = softmax.sum[row] == 0 ? T{0} : 1 / softmax.sum[row];  // nothing visible: 0
        std::byte* const out = at(call.out, row_at(row));
        const auto write = [&](Index dim, Index count) {
          // Whether −0 met a tile of hidden keys, and became 0, depends on the row's neighbours: + 0 hides it.
          const auto items = load<Vec<Isa, T>>(softmax.output.row(row) + dim) * factor + T{0};
          store_items<Isa, T, kStorage>(out + dim * stride, stride, count, items);
        };
        Index dim = 0;
        for (; dim + n <= call.value_dim; dim += n) write(dim, n);
        if (dim < call.value_dim) write(dim, call.value_dim - dim);
      }
    });
  });
  finish_sums(call, row_at, softmax, rows);
}

}  // namespace attncore
