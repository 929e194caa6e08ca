// The same numbers on every machine.
#pragma once

#include <cstdint>

class Random {
 public:
  explicit Random(std::uint64_t seed = 1) : state_(seed) {}
  std::uint32_t bits() {
    state_ = state_ * 6364136223846793005U + 1442695040888963407U;
    return static_cast<std::uint32_t>(state_ >> 32U);
  }
  /// 0 … limit − 1
  std::int64_t below(std::int64_t limit) { return static_cast<std::int64_t>(bits()) % limit; }
  /// 1 of `cases` times.
  bool one_of(std::int64_t cases) { return below(cases) == 0; }
  /// −1 … 1
  float number() { return static_cast<float>(bits() >> 8U) / 8388608.0F - 1.0F; }

 private:
  std::uint64_t state_;
};
