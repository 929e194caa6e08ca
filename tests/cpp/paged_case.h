// A random call with pages, in buffers of exactly their size, and the same keys and values gathered.  Slots of no token are
// poison: NaN, and under AddressSanitizer memory that must not be touched.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "attncore/attncore.hpp"
#include "random.h"
#if __has_include(<sanitizer/asan_interface.h>)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

namespace paged_case {

using namespace attncore;

/// Memory of exactly so many bytes, so that a sanitizer sees the first one past it.
struct Buffer {
  std::unique_ptr<std::byte[]> bytes;
  std::size_t size = 0;

  Buffer() = default;
  explicit Buffer(std::size_t n) : bytes(new std::byte[n]()), size(n) {}
  Buffer(Buffer&&) = default;
  Buffer& operator=(Buffer&&) = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (bytes) ASAN_UNPOISON_MEMORY_REGION(bytes.get(), size);
  }
};

template <class T>
Buffer buffer_of(const std::vector<T>& items) {
  Buffer buffer(items.size() * sizeof(T));
  if (!items.empty()) std::memcpy(buffer.bytes.get(), items.data(), buffer.size);
  return buffer;
}

/// i32 or i64, (batch, 1, 1, width) or, of width 1, (batch, 1, 1, 1).
inline Tensor ints(Buffer& memory, const std::vector<Index>& items, Index width, bool wide) {
  memory = wide ? buffer_of(items) : buffer_of(std::vector<std::int32_t>(items.begin(), items.end()));
  const Index batch = static_cast<Index>(items.size()) / std::max<Index>(1, width);
  return Tensor::contiguous(memory.bytes.get(), wide ? DType::i64 : DType::i32, {batch, 1, 1, width});
}

// ---- numbers as they are stored ----

struct Stored {
  std::uint16_t bits;
  float value;
};

/// ± (1 + f) · 2^e of a float with a narrow exponent and fraction.
inline Stored narrow_float(Random& random, int exponent_bits, int fraction_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const auto exponent = static_cast<int>(bias - 6 + random.below(8));
  const auto fraction = static_cast<int>(random.below(Index{1} << fraction_bits));
  const auto sign = static_cast<int>(random.below(2));
  const double size = std::ldexp(1 + std::ldexp(fraction, -fraction_bits), exponent - bias);
  const int bits =
      sign << (exponent_bits + fraction_bits) | std::max(exponent, 0) << fraction_bits | fraction;
  return {static_cast<std::uint16_t>(bits), static_cast<float>(sign != 0 ? -size : size)};
}

/// float8_e4m3fn of any bits but NaN.
inline Stored any_float8(Random& random) {
  auto bits = static_cast<int>(random.below(256));
  if ((bits & 0x7f) == 0x7f) bits &= 0x80;
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  const double size = exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, exponent - 10);
  return {static_cast<std::uint16_t>(bits), static_cast<float>((bits & 0x80) != 0 ? -size : size)};
}

inline Stored any_number(Random& random, DType dtype) {
  switch (dtype) {
    case DType::f16:
      return narrow_float(random, 5, 10);
    case DType::bf16:
      return narrow_float(random, 8, 7);
    case DType::f8:
      return any_float8(random);
    case DType::i4: {
      const Index x = random.below(16) - 8;
      return {static_cast<std::uint16_t>(x & 15), static_cast<float>(x)};
    }
    default: {
      const Index x = random.below(256) - 128;
      return {static_cast<std::uint16_t>(x & 255), static_cast<float>(x)};
    }
  }
}

/// Writes a number at `dim` of a row without gaps; what it is.
inline double put(Random& random, std::byte* row, Index dim, DType dtype) {
  if (dtype == DType::f32 || dtype == DType::f64) {
    const float x = random.number();
    const double y = x;
    if (dtype == DType::f32) std::memcpy(row + dim * 4, &x, 4);
    if (dtype == DType::f64) std::memcpy(row + dim * 8, &y, 8);
    return y;
  }
  const Stored number = any_number(random, dtype);
  if (dtype == DType::i4) {
    row[dim / 2] = static_cast<std::byte>(
        dim % 2 == 0 ? number.bits : (static_cast<int>(row[dim / 2]) & 15) | number.bits << 4);
  } else {
    std::memcpy(row + dim * item_size(dtype), &number.bits, static_cast<std::size_t>(item_size(dtype)));
  }
  return number.value;
}

// ---- a case ----

inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// Keys or values: in pages, and gathered as (batch, head, token, dim) floats.
struct Pool {
  Buffer memory, scale_memory, gathered_memory;
  Tensor pages, scale, gathered;
};

struct Case {
  Random& random;
  Index batch, kv_heads, group, queries, dim, value_dim, slots, width, pages;
  DType compute;
  bool wide_ints, by_head;
  std::vector<Index> lengths, table;
  Pool key, value;
  Buffer query_memory, out_memory, lse_memory, table_memory, length_memory, tree_memory;
  Problem problem;

  explicit Case(Random& random) : random(random) {
    batch = random.below(4), kv_heads = 1 + random.below(2),
    queries = random.one_of(4) ? 20 + random.below(20) : random.below(6);
    group = random.one_of(3) ? 8 : 1 + random.below(3);
    slots = random.one_of(3) ? 16 : 1 + random.below(40);
    width = random.below(5), pages = 1 + random.below(12);
    if (random.one_of(8)) {  // long entries, many of which begin with the same pages
      batch = 2 + random.below(4), slots = 400 + random.below(500), width = 2 + random.below(3), pages = 2;
    }
    compute = random.one_of(5) ? DType::f64 : DType::f32;
    dim = 2 * (1 + random.below(20)), value_dim = 2 * (1 + random.below(20));
    wide_ints = random.one_of(2), by_head = random.one_of(2);
    for (Index entry = 0; entry < batch; ++entry) {
      const Index room = width * slots;
      lengths.push_back(random.one_of(4) ? room : random.below(room + 1));
      for (Index i = 0; i < width; ++i) {  // what lies past the length is anything
        const bool used = i * slots < lengths.back();
        table.push_back(used || random.one_of(2) ? random.below(pages) : random.below(1000) - 500);
      }
    }
    set_problem();
  }

  [[nodiscard]] bool is_used(Index page, Index slot) const {
    for (Index entry = 0; entry < batch; ++entry) {
      for (Index i = 0; i < width; ++i) {
        const bool there = table[static_cast<std::size_t>(entry * width + i)] == page;
        if (there && i * slots + slot < lengths[static_cast<std::size_t>(entry)]) return true;
      }
    }
    return false;
  }

  void set_problem() {
    const Index heads = kv_heads * group;
    query_memory = Buffer(static_cast<std::size_t>(batch * heads * queries * dim * item_size(compute)));
    problem.query = Tensor::contiguous(query_memory.bytes.get(), compute, {batch, heads, queries, dim});
    for (Index row = 0; row < batch * heads * queries; ++row) {
      for (Index i = 0; i < dim; ++i)
        put(random, query_memory.bytes.get() + row * dim * item_size(compute), i, compute);
    }
    out_memory = Buffer(static_cast<std::size_t>(batch * heads * queries * value_dim * item_size(compute)));
    lse_memory = Buffer(static_cast<std::size_t>(batch * heads * queries * item_size(compute)));
    problem.out = Tensor::contiguous(out_memory.bytes.get(), compute, {batch, heads, queries, value_dim});
    problem.lse = Tensor::contiguous(lse_memory.bytes.get(), compute, {batch, heads, queries, 1});
    set_pool(key, dim, problem.key, problem.key_scale);
    set_pool(value, value_dim, problem.value, problem.value_scale);
    problem.score.key_lengths = ints(length_memory, lengths, 1, wide_ints);
    problem.paging.block_table = ints(table_memory, table, width, wide_ints);
    problem.paging.block_table.shape[0] = batch;
    problem.score.causal = random.one_of(2);
    if (random.one_of(4)) problem.score.left = random.below(30);
  }

  void set_pool(Pool& pool, Index dims, Tensor& tensor, Tensor& scale) {
    constexpr DType kStored[] = {DType::f32, DType::f16, DType::bf16, DType::i8, DType::f8, DType::i4};
    const DType dtype = compute == DType::f64 ? DType::f64 : kStored[random.below(6)];
    const Index row = dtype == DType::i4 ? dims / 2 : dims * item_size(dtype);
    pool.memory = Buffer(static_cast<std::size_t>(pages * kv_heads * slots * row));
    tensor = {pool.memory.bytes.get(),
              dtype,
              {pages, kv_heads, slots, dims},
              {kv_heads * slots * row, by_head ? slots * row : row, by_head ? row : kv_heads * row,
               dtype == DType::i4 ? 1 : item_size(dtype)}};
    pool.scale_memory =
        buffer_of(std::vector<float>(static_cast<std::size_t>(pages * kv_heads * slots), kNan));
    const bool scaled = compute == DType::f32 && random.one_of(2);
    if (scaled)
      scale = Tensor::contiguous(pool.scale_memory.bytes.get(), DType::f32, {pages, kv_heads, slots, 1});
    std::vector<double> numbers(static_cast<std::size_t>(pages * kv_heads * slots * dims));
    for (Index page = 0; page < pages; ++page) {
      for (Index head = 0; head < kv_heads; ++head) {
        for (Index slot = 0; slot < slots; ++slot) {
          std::byte* const to = pool.memory.bytes.get() + page * tensor.stride[0] + head * tensor.stride[1] +
                                slot * tensor.stride[2];
          double* const exact = numbers.data() + ((page * kv_heads + head) * slots + slot) * dims;
          auto* const factor = reinterpret_cast<float*>(pool.scale_memory.bytes.get()) +
                               (page * kv_heads + head) * slots + slot;
          fill_row(to, exact, dims, dtype, row, scaled ? factor : nullptr, is_used(page, slot));
        }
      }
    }
    gather(pool, numbers, dims);
  }

  void fill_row(std::byte* to, double* exact, Index dims, DType dtype, Index bytes, float* factor,
                bool used) {
    if (!used) {
      std::memset(to, 0xff, static_cast<std::size_t>(bytes));  // NaN, where there is one
      ASAN_POISON_MEMORY_REGION(to, static_cast<std::size_t>(bytes));
      if (factor != nullptr) ASAN_POISON_MEMORY_REGION(factor, sizeof *factor);
      return;
    }
    if (factor != nullptr) *factor = random.number() / 8;
    for (Index i = 0; i < dims; ++i) exact[i] = put(random, to, i, dtype) * (factor != nullptr ? *factor : 1);
  }

  void gather(Pool& pool, const std::vector<double>& numbers, Index dims) {
    const Index tokens = width * slots, item = item_size(compute);
    pool.gathered_memory = Buffer(static_cast<std::size_t>(batch * kv_heads * tokens * dims * item));
    std::byte* to = pool.gathered_memory.bytes.get();
    pool.gathered = Tensor::contiguous(to, compute, {batch, kv_heads, tokens, dims});
    for (Index i = 0; i < batch * kv_heads * tokens; ++i) {
      const Index entry = i / tokens / kv_heads, head = i / tokens % kv_heads, token = i % tokens;
      const bool exists = token < lengths[static_cast<std::size_t>(entry)];
      const Index page = exists ? table[static_cast<std::size_t>(entry * width + token / slots)] : 0;
      const double* const from = numbers.data() + ((page * kv_heads + head) * slots + token % slots) * dims;
      for (Index k = 0; k < dims; ++k, to += item) {
        const double number = exists ? from[k] : 0;
        const auto narrow = static_cast<float>(number);
        std::memcpy(to, item == 8 ? static_cast<const void*>(&number) : &narrow,
                    static_cast<std::size_t>(item));
      }
    }
  }
};

}  // namespace paged_case
