// One traits struct a storage dtype: how items become registers of the accumulation type, and back.
//
// The 16-bit formats are converted with integer operations, so that every ISA gives the same bits,
// subnormals, Inf and NaN included, without hardware support.  An ISA with conversion instructions
// specialises `Widen`.
#pragma once

#include "tile/simd.h"

namespace attncore {

/// An instruction set's tag for code outside of cpu/isa: the registers that every machine of the architecture has.
struct Portable {
  static constexpr int kBytes = 16;
};

/// An item as it is stored; of i4, a pair.
template <DType kStorage>
struct Storage {
  static constexpr bool kOf16Bits = kStorage == DType::f16 || kStorage == DType::bf16;
  using Bits = std::conditional_t<kOf16Bits, std::uint16_t, std::uint8_t>;
  using Item = std::conditional_t<kStorage == DType::f32, float,
                                  std::conditional_t<kStorage == DType::f64, double, Bits>>;
};

/// Where item `i` of a row stands, in bytes; of i4, even ones.
template <DType kStorage>
ATTN_INLINE constexpr Index item_offset(Index i, Index stride) noexcept {
  return kStorage == DType::i4 ? i / 2 : i * stride;
}

template <class Isa>
using U32 = typename Register<std::uint32_t, Isa::kBytes / 4>::type;

/// As many small integers as a register has lanes of Int, zero-extended.  g++ 12 does this element by
/// element: an ISA with an instruction for it specialises it.
template <class Isa, class Int, class Small>
struct ZeroExtend {
  static constexpr int kLanes = Isa::kBytes / static_cast<int>(sizeof(Int));
  using Result = typename Register<Int, kLanes>::type;
  static ATTN_INLINE Result load(const void* p) noexcept {
    return __builtin_convertvector(attncore::load<typename Register<Small, kLanes>::type>(p), Result);
  }
};

template <class Isa>
ATTN_INLINE U32<Isa> load_u16(const void* p) noexcept {
  return ZeroExtend<Isa, std::uint32_t, std::uint16_t>::load(p);
}

/// Two registers of neighbouring items, the even ones and the odd ones, where that costs less than to load them in order.
template <class Isa, class T, DType kStorage>
struct LoadPair {
  static constexpr bool kGiven = false;
};
template <class Isa>
struct LoadPair<Isa, float, DType::bf16> {  // each 32 bits hold two
  static constexpr bool kGiven = true;
  static ATTN_INLINE void load(const void* p, Vec<Isa, float>& even, Vec<Isa, float>& odd) noexcept {
    const U32<Isa> bits = attncore::load<U32<Isa>>(p);
    even = bit_cast<Vec<Isa, float>>(bits << 16);
    odd = bit_cast<Vec<Isa, float>>(bits & 0xffff0000U);
  }
};

template <class Isa, class T, DType kStorage>
struct Widen {  // f32 → f32, f64 → f64, and f32 → f64 for a float32 bias of float64 queries
  static ATTN_INLINE Vec<Isa, T> load(const void* p) noexcept {
    using Item = typename Storage<kStorage>::Item;
    using Items = typename Register<Item, kWidth<Isa, T>>::type;
    return __builtin_convertvector(attncore::load<Items>(p), Vec<Isa, T>);
  }
};

template <class Isa>
struct Widen<Isa, float, DType::bf16> {  // bfloat16 is the upper half of a float32
  static ATTN_INLINE Vec<Isa, float> load(const void* p) noexcept {
    return bit_cast<Vec<Isa, float>>(load_u16<Isa>(p) << 16);
  }
};

template <class Isa>
struct Widen<Isa, float, DType::f16> {
  static ATTN_INLINE Vec<Isa, float> load(const void* p) noexcept {
    const U32<Isa> half = load_u16<Isa>(p);
    // Exponent and fraction moved into place, then the bias (127 − 15) by a product, which normalises
    // subnormals too.
    const Vec<Isa, float> magnitude = bit_cast<Vec<Isa, float>>((half & 0x7fff) << 13) * 0x1p112F;
    const U32<Isa> inf_or_nan = (half & 0x7c00) == 0x7c00 ? U32<Isa>{} + 0x7f800000U : U32<Isa>{};
    return bit_cast<Vec<Isa, float>>(bit_cast<U32<Isa>>(magnitude) | inf_or_nan | (half & 0x8000) << 16);
  }
};

template <class Isa>
using I32 = typename Register<std::int32_t, Isa::kBytes / 4>::type;

template <class Isa>
struct Widen<Isa, float, DType::i8> {
  static ATTN_INLINE Vec<Isa, float> load(const void* p) noexcept {
    const U32<Isa> bits = ZeroExtend<Isa, std::uint32_t, std::uint8_t>::load(p);
    const I32<Isa> high = bit_cast<I32<Isa>>(bits << 24);
    return __builtin_convertvector(high >> 24, Vec<Isa, float>);
  }
};

template <class Isa>
struct Widen<Isa, float, DType::f8> {
  static ATTN_INLINE Vec<Isa, float> load(const void* p) noexcept {
    const U32<Isa> bits = ZeroExtend<Isa, std::uint32_t, std::uint8_t>::load(p);
    // As for f16: the bias is 7 here, and the largest magnitude is a NaN.
    const Vec<Isa, float> magnitude = bit_cast<Vec<Isa, float>>((bits & 0x7f) << 20) * 0x1p120F;
    const U32<Isa> nan = (bits & 0x7f) == 0x7f ? U32<Isa>{} + 0x7fc00000U : U32<Isa>{};
    return bit_cast<Vec<Isa, float>>(bit_cast<U32<Isa>>(magnitude) | nan | (bits & 0x80) << 24);
  }
};

template <class Isa>
struct Widen<Isa, float, DType::i4> {
  static ATTN_INLINE Vec<Isa, float> load(const void* p) noexcept {
    // A byte in each 64 bits; then its halves at the top of each 32.
    const auto pairs = ZeroExtend<Isa, std::uint64_t, std::uint8_t>::load(p);
    const I32<Isa> high = bit_cast<I32<Isa>>(pairs << 28 | (pairs >> 4) << 60);
    return __builtin_convertvector(high >> 28, Vec<Isa, float>);
  }
};

/// float32 → bfloat16, round to nearest even; a NaN stays one.
template <class Isa>
ATTN_INLINE U32<Isa> narrow_bf16(Vec<Isa, float> v) noexcept {
  const U32<Isa> bits = bit_cast<U32<Isa>>(v);
  const U32<Isa> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U32<Isa> quiet_nan = (bits >> 16) | 0x40;
  return (bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded;
}

/// float32 → float16, round to nearest even.
template <class Isa>
ATTN_INLINE U32<Isa> narrow_f16(Vec<Isa, float> v) noexcept {
  const U32<Isa> bits = bit_cast<U32<Isa>>(v);
  const U32<Isa> sign = (bits >> 16) & 0x8000;
  const U32<Isa> magnitude = bits & 0x7fffffff;
  // Below 2⁻¹⁴ the result is subnormal: adding 0.5 leaves its 10 bits, rounded, at the end of the sum.
  const U32<Isa> subnormal = bit_cast<U32<Isa>>(bit_cast<Vec<Isa, float>>(magnitude) + 0.5F) - 0x3f000000;
  // Else the exponent's bias changes by 127 − 15 (0xc8000000 is that, negative, << 23) and 13 bits are
  // rounded away.
  const U32<Isa> normal = (magnitude + 0xc8000fff + ((magnitude >> 13) & 1)) >> 13;
  const U32<Isa> finite = magnitude < 0x38800000 ? subnormal : normal;
  const U32<Isa> overflow = magnitude > 0x7f800000 ? U32<Isa>{} + 0x7e00U : U32<Isa>{} + 0x7c00U;
  return sign | (magnitude >= 0x477ff000 ? overflow : finite);  // 65520 and more round to infinity
}

/// Writes a register as items of the storage dtype.
template <class Isa, class T, DType kStorage>
ATTN_INLINE void store_as(void* p, Vec<Isa, T> v) noexcept {
  using U16 = typename Register<std::uint16_t, Isa::kBytes / 4>::type;
  if constexpr (kStorage == DType::bf16) {
    store(p, __builtin_convertvector(narrow_bf16<Isa>(v), U16));
  } else if constexpr (kStorage == DType::f16) {
    store(p, __builtin_convertvector(narrow_f16<Isa>(v), U16));
  } else {
    using Items = typename Register<typename Storage<kStorage>::Item, kWidth<Isa, T>>::type;
    store(p, __builtin_convertvector(v, Items));
  }
}

/// run(stride between items): items beside each other, nearly all, have a constant.
template <DType kStorage, class Run>
ATTN_INLINE decltype(auto) with_stride(Index stride, Run run) noexcept {
  constexpr std::integral_constant<Index, sizeof(typename Storage<kStorage>::Item)> kBeside;
  return stride == kBeside ? run(kBeside) : run(stride);
}

/// A register's first bytes, the rest is 0.  Never reads past them.  An ISA with masked loads specialises it: several short stores would
/// have to reach the cache before a long load reads them.
template <class Isa>
struct FirstBytes {
  using Bytes = typename Register<std::uint8_t, Isa::kBytes>::type;
  static ATTN_INLINE Bytes load(const std::byte* p, Index count) noexcept {
    Bytes bytes{};
    __builtin_memcpy(&bytes, p, static_cast<std::size_t>(count));
    return bytes;
  }
};

/// Items p[0], p[stride], … (n of them, in bytes; n ≤ the width, and none if it is negative) as a register; the rest is 0.  Never
/// reads past them.
template <class Isa, class T, DType kStorage>
ATTN_INLINE Vec<Isa, T> load_items(const std::byte* p, Index stride, Index n) noexcept {
  using Item = typename Storage<kStorage>::Item;
  constexpr Index kItem = sizeof(Item);
  if (n == kWidth<Isa, T> && stride == kItem) return Widen<Isa, T, kStorage>::load(p);
  const Index count = max(Index{0}, kStorage == DType::i4 ? n / 2 : n);
  if (stride == kItem) {
    alignas(Isa::kBytes) std::byte room[Isa::kBytes];
    store(static_cast<void*>(room), FirstBytes<Isa>::load(p, count * kItem));
    return Widen<Isa, T, kStorage>::load(room);
  }
  alignas(Isa::kBytes) Item items[kWidth<Isa, T>]{};
  for (Index i = 0; i < count; ++i) __builtin_memcpy(&items[i], p + i * stride, sizeof(Item));
  return Widen<Isa, T, kStorage>::load(items);
}

template <class Isa, class T, DType kStorage>
ATTN_INLINE void store_items(std::byte* p, Index stride, Index n, Vec<Isa, T> v) noexcept {
  using Item = typename Storage<kStorage>::Item;
  constexpr Index kItem = sizeof(Item);
  if (n == kWidth<Isa, T> && stride == kItem) return store_as<Isa, T, kStorage>(p, v);
  alignas(Isa::kBytes) Item items[kWidth<Isa, T>];
  store_as<Isa, T, kStorage>(items, v);
  for (Index i = 0; i < n; ++i) __builtin_memcpy(p + i * stride, &items[i], sizeof(Item));
}

/// Calls run.template operator()<kStorage>() for the dtypes that can be accumulated in T: once a row or
/// panel.
template <class T, class Run>
ATTN_INLINE decltype(auto) with_storage(DType dtype, Run run) noexcept {
  if constexpr (sizeof(T) == 8) {
    return dtype == DType::f64 ? run.template operator()<DType::f64>()
                               : run.template operator()<DType::f32>();
  } else {
    switch (dtype) {
      case DType::f16:
        return run.template operator()<DType::f16>();
      case DType::bf16:
        return run.template operator()<DType::bf16>();
      default:
        return run.template operator()<DType::f32>();
    }
  }
}

/// The same for keys and values, which may be quantised too.
template <class T, class Run>
ATTN_INLINE decltype(auto) with_key_storage(DType dtype, Run run) noexcept {
  if constexpr (sizeof(T) == 4) {
    if (dtype == DType::i8) return run.template operator()<DType::i8>();
    if (dtype == DType::f8) return run.template operator()<DType::f8>();
    if (dtype == DType::i4) return run.template operator()<DType::i4>();
  }
  return with_storage<T>(dtype, run);
}

/// One item, converted.
template <class Isa, class T>
ATTN_INLINE T load_scalar(const std::byte* p, DType dtype) noexcept {
  return with_storage<T>(dtype, [&]<DType kStorage>() { return load_items<Isa, T, kStorage>(p, 0, 1)[0]; });
}

}  // namespace attncore
