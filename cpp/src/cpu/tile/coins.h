// Dropout's factors for a row of weights: 0 or 1 / (1 − p), from score/dropout.h's generator, registers at a time.
#pragma once

#include "../../score/dropout.h"
#include "../dtype.h"

namespace attncore {

template <class U>
struct WideProduct {
  U high, low;
};

/// a · b as 64-bit products of 32-bit lanes.  g++ 12 multiplies 64-bit lanes in full: an ISA with an instruction for
/// 32 × 32 bits specialises it.
template <class Isa>
struct MultiplyWide {
  using Wide = typename Register<std::uint64_t, Isa::kBytes / 8>::type;

  static ATTN_INLINE WideProduct<U32<Isa>> of(U32<Isa> a, std::uint32_t b) noexcept {
    const Wide even = (bit_cast<Wide>(a) & 0xffffffffU) * b;
    const Wide odd = (bit_cast<Wide>(a) >> 32U) * b;
    return join(even, odd);
  }
  static ATTN_INLINE WideProduct<U32<Isa>> join(Wide even, Wide odd) noexcept {
    constexpr std::uint64_t kUpper = 0xffffffff00000000U;
    return {bit_cast<U32<Isa>>((even >> 32U) | (odd & kUpper)),
            bit_cast<U32<Isa>>((even & ~kUpper) | (odd << 32U))};
  }
};

template <class Isa>
ATTN_INLINE U32<Isa> consecutive(std::uint32_t first) noexcept {
  U32<Isa> v{};
  for (int i = 0; i < Isa::kBytes / 4; ++i) v[i] = first + static_cast<std::uint32_t>(i);
  return v;
}

/// The factors of Philox::kKeys keys from `first`, a multiple of them.
template <class Isa, class T>
void coin_factors(const Coins& coins, const Row& row, Index first, T* factors) noexcept {
  constexpr Index kLanes = Isa::kBytes / 4;
  static_assert(Philox::kCounters % kLanes == 0);
  const T factor = static_cast<T>(coins.factor());
  for (Index lane = 0; lane < Philox::kCounters; lane += kLanes) {
    const U32<Isa> zero{};
    const auto word = [](Index x) { return static_cast<std::uint32_t>(x); };
    U32<Isa> words[4] = {consecutive<Isa>(word(first / Philox::kKeys * Philox::kCounters + lane)),
                         zero + word(row.query), zero + word(row.head), zero + word(row.batch)};
    Philox::generate(coins.seed, words, MultiplyWide<Isa>::of);
    for (Index number = 0; number < Philox::kNumbers; ++number) {
      const U32<Isa> both = words[number / 2];
      const U32<Isa> value = number % 2 == 0 ? both & 0xffffU : both >> 16U;
      T* const out = factors + number * Philox::kCounters + lane;
      if constexpr (sizeof(T) == 4) {
        store(out, value >= coins.dropped ? broadcast<Vec<Isa, T>>(factor) : Vec<Isa, T>{});
      } else {
        for (Index i = 0; i < kLanes; ++i) out[i] = value[i] >= coins.dropped ? factor : T{0};
      }
    }
  }
}

/// The factors of a row's keys, of a key tile or of a part of one that no multiple of Philox::kKeys is within.
template <class Isa, class T>
struct TileCoins {
  static constexpr Index kKeys = Isa::template kKeyTile<T>;
  static_assert(kKeys % Philox::kKeys == 0);

  /// Valid until the next call.
  ATTN_INLINE T* of(const Coins& coins, const Row& row, Range keys) noexcept {
    const Index before = keys.begin % Philox::kKeys;
    for (Index first = -before; first < keys.size(); first += Philox::kKeys) {
      coin_factors<Isa, T>(coins, row, keys.begin + first, factors + before + first);
    }
    return factors + before;
  }

  alignas(Isa::kBytes) T factors[kKeys];
};

}  // namespace attncore
