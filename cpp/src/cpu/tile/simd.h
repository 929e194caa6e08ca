// The vector vocabulary: the compiler's vector extension, as wide as an ISA's registers.
//
// An ISA is a tag: struct Isa { static constexpr int kBytes (of a register), kRows, kColumns (of a product's
// block) }. Everything here is inlined by force (inline.h says why).
#pragma once

#include <cstdint>
#include <utility>

#include "../../call.h"

namespace attncore {

// N must be a plain parameter: g++ 12 makes a scalar of vector_size(4 * Isa::kWidth).
template <class T, int N>
struct Register {
  using type __attribute__((vector_size(N * sizeof(T)))) = T;
};

template <class Isa, class T>
inline constexpr int kWidth = Isa::kBytes / static_cast<int>(sizeof(T));

template <class Isa, class T>
using Vec = typename Register<T, kWidth<Isa, T>>::type;

template <class T>
struct IntOf;
template <>
struct IntOf<float> {
  using type = std::int32_t;
  using unsigned_type = std::uint32_t;
};
template <>
struct IntOf<double> {
  using type = std::int64_t;
  using unsigned_type = std::uint64_t;
};

/// A register in memory that is aligned as its items are, and aliases nothing but them: a copy of bytes might
/// alias whatever a loop reads, which then could not stay in registers.
template <class T, int N>
struct InMemory {
  using type __attribute__((vector_size(N * sizeof(T)), aligned(alignof(T)))) = T;
};

template <class V, class T>
ATTN_INLINE V load(const T* p) noexcept {
  return *reinterpret_cast<const typename InMemory<T, sizeof(V) / sizeof(T)>::type*>(p);
}

template <class V, class T>
ATTN_INLINE void store(T* p, V v) noexcept {
  *reinterpret_cast<typename InMemory<T, sizeof(V) / sizeof(T)>::type*>(p) = v;
}

/// From and to memory of any alignment.
template <class V>
ATTN_INLINE V load(const void* p) noexcept {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
ATTN_INLINE void store(void* p, V v) noexcept {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class V>
ATTN_INLINE V load(const std::byte* p) noexcept {
  return load<V>(static_cast<const void*>(p));
}

template <class V, class T>
ATTN_INLINE V broadcast(T x) noexcept {
  return x - V{};  // x − 0 is x for every x, so the compiler may fold it; 0 + x is not (signed zero)
}

/// v, loaded once: g++ would load it again for each of the multiply-adds that it is in.
template <class V>
ATTN_INLINE V in_register(V v) noexcept {
#ifdef __AVX512F__
  constexpr std::size_t kWidest = 64;
#elif defined(__AVX__)
  constexpr std::size_t kWidest = 32;
#elif defined(__SSE2__)
  constexpr std::size_t kWidest = 16;
#else
  constexpr std::size_t kWidest = 0;
#endif
  if constexpr (sizeof(V) <= kWidest) asm("" : "+v"(v));
  return v;
}

template <class To, class From>
ATTN_INLINE To bit_cast(From v) noexcept {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &v, sizeof to);
  return to;
}

// A NaN in `x` stays, and bounds are no NaN; maximum(a, b) keeps one in b.
template <class V>
ATTN_INLINE V at_least(V x, V bound) noexcept {
  return x < bound ? bound : x;
}

template <class V>
ATTN_INLINE V maximum(V a, V b) noexcept {
  return a > b ? a : b;
}

template <class V>
ATTN_INLINE V absolute(V x) noexcept {
  return x < 0 ? -x : x;
}

/// 0, 1, 2, …
template <class Isa, class T>
ATTN_INLINE Vec<Isa, T> lanes() noexcept {
  Vec<Isa, T> v{};
  for (int i = 0; i < kWidth<Isa, T>; ++i) v[i] = static_cast<T>(i);
  return v;
}

/// The low (kHigh: high) halves of a and b, element by element in turn.
template <bool kHigh, class T, class V, int... I>
ATTN_INLINE V interleave(V a, V b, std::integer_sequence<int, I...>) noexcept {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (I / 2 + (I % 2) * n + (kHigh ? n / 2 : 0))...);
}

/// Every second element of a, then of b, from the first or the second on.
template <bool kOdd, class V, int... I>
ATTN_INLINE V every_second(V a, V b, std::integer_sequence<int, I...>) noexcept {
  return __builtin_shufflevector(a, b, (2 * I + (kOdd ? 1 : 0))...);
}

/// Transposes a square block of registers, or a part of one, in log2(kTurns) rounds of interleaving: each rotates the bits of
/// (register's number, lane) left by one.
template <class Isa, class T, int kRows = kWidth<Isa, T>, int kTurns = kWidth<Isa, T>>
ATTN_INLINE void transpose(Vec<Isa, T>* rows) noexcept {
  using Lanes = std::make_integer_sequence<int, kWidth<Isa, T>>;
  for (int round = 1; round < kTurns; round *= 2) {
    Vec<Isa, T> next[kRows];
    for (int i = 0; i < kRows / 2; ++i) {
      next[2 * i] = interleave<false, T>(rows[i], rows[i + kRows / 2], Lanes{});
      next[2 * i + 1] = interleave<true, T>(rows[i], rows[i + kRows / 2], Lanes{});
    }
    for (int i = 0; i < kRows; ++i) rows[i] = next[i];
  }
}

template <class V, int... I>
ATTN_INLINE auto low_half(V v, std::integer_sequence<int, I...>) noexcept {
  return __builtin_shufflevector(v, v, I...);
}
template <class V, int... I>
ATTN_INLINE auto high_half(V v, std::integer_sequence<int, I...>) noexcept {
  return __builtin_shufflevector(v, v, (I + int{sizeof...(I)})...);
}

/// Folds halves onto each other: an order of operations that depends on the width alone.
template <class T, int kLanes, class V, class Fold>
ATTN_INLINE T fold(V v, Fold combine) noexcept {
  if constexpr (kLanes == 1) {
    return v[0];
  } else if constexpr (kLanes == 2) {
    return combine(v[0], v[1]);
  } else {
    using Half = std::make_integer_sequence<int, kLanes / 2>;
    return fold<T, kLanes / 2>(combine(low_half(v, Half{}), high_half(v, Half{})), combine);
  }
}

template <class Isa, class T>
ATTN_INLINE T horizontal_sum(Vec<Isa, T> v) noexcept {
  return fold<T, kWidth<Isa, T>>(v, [](auto a, auto b) { return a + b; });
}

template <class Isa, class T>
ATTN_INLINE T horizontal_max(Vec<Isa, T> v) noexcept {
  return fold<T, kWidth<Isa, T>>(v, [](auto a, auto b) { return maximum(a, b); });
}

/// Whether any lane is above a bound.  No compiler makes a test of a mask of it: an ISA with an instruction for it specialises it.
template <class Isa, class T>
struct AnyAbove {
  static ATTN_INLINE bool of(Vec<Isa, T> v, T bound) noexcept { return horizontal_max<Isa, T>(v) > bound; }
};

}  // namespace attncore
