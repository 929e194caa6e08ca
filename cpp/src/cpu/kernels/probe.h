// What the machine reaches at its best, for benchmarks to compare with: multiply-adds in registers, reading memory.
#pragma once

#include "task.h"

namespace attncore {

/// The peak of a core: independent multiply-adds, enough to hide their latency.
template <class Isa, class T, class Item = T>
double multiply_adds(Index rounds) noexcept {
  using V = Vec<Isa, T>;
  constexpr double kProducts = kNumbers<T, Item>;
  constexpr int kChains = Isa::kRows * 2;
  V chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = broadcast<V>(static_cast<T>(i));
  Vec<Isa, Item> factor = bit_cast<Vec<Isa, Item>>(broadcast<V>(T(0.999)));
  asm volatile("" : "+m"(factor));  // keeps the compiler from foreseeing the results
  for (Index round = 0; round < rounds; ++round) {
    for (int i = 0; i < kChains; ++i) chain[i] = multiply_add<Isa>(factor, factor, chain[i]);
  }
  V total{};
  for (int i = 0; i < kChains; ++i) total += chain[i];
  asm volatile("" : : "m"(total));
  return 2.0 * kProducts * kChains * kWidth<Isa, T> * static_cast<double>(rounds);
}

/// One access pattern: kStreams equal parts of the memory side by side, a cache line of each in turn, asked for kAhead
/// bytes before its use (0: the hardware foresees it).
template <class Isa, int kStreams, Index kAhead>
std::uint64_t read_streams(const std::byte* memory, Index bytes) noexcept {
  using V = Vec<Isa, std::uint64_t>;
  constexpr Index kLine = 64;
  constexpr int kLines = 4;  // between two looks at the end
  constexpr Index kStep = kLine * kLines / kStreams;
  const Index part = bytes / kStreams;
  V seen[kLines]{};
  for (Index at = 0; at < part; at += kStep) {
    for (int i = 0; i < kLines; ++i) {
      const std::byte* const line = memory + i % kStreams * part + at + i / kStreams * kLine;
      if constexpr (kAhead > 0) __builtin_prefetch(line + kAhead);
      for (Index j = 0; j < kLine; j += Isa::kBytes) seen[i] |= load<V>(line + j);
    }
  }
  for (int i = 1; i < kLines; ++i) seen[0] |= seen[i];
  return fold<std::uint64_t, kWidth<Isa, std::uint64_t>>(seen[0], [](auto a, auto b) { return a | b; });
}

/// Reads each byte once, in one of kReadPatterns ways; returns the bits that were seen in any of the 8-byte words, so
/// that reading has a use.  bytes is a multiple of kReadStep.
template <class Isa>
std::uint64_t read_memory(const std::byte* memory, Index bytes, int pattern) noexcept {
  constexpr Index kNear = 2048, kFar = 8192;
  switch (pattern) {
    case 0:
      return read_streams<Isa, 1, 0>(memory, bytes);
    case 1:
      return read_streams<Isa, 1, kNear>(memory, bytes);
    case 2:
      return read_streams<Isa, 1, kFar>(memory, bytes);
    case 3:
      return read_streams<Isa, 4, 0>(memory, bytes);
    case 4:
      return read_streams<Isa, 4, kNear>(memory, bytes);
    default:
      return read_streams<Isa, 4, kFar>(memory, bytes);
  }
}

}  // namespace attncore
