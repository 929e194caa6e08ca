// Dropout's coins.  They are a format, which docs/semantics.md describes: Philox 4×32-10 (Salmon et al. 2011), a
// counter-based generator, with
//
//     key     = (seed's low 32 bits, seed's high 32 bits)
//     counter = (16 · (k / 128) + k mod 16, query, head, batch)        for the key at k
//
// gives four words, that is eight 16-bit numbers, the low half of a word first.  Number (k mod 128) / 16 belongs to key
// k, so that lanes of consecutive keys take the same number of consecutive counters.  The weight is kept if the number
// is at least round(65536 · probability).
#pragma once

#include "score.h"

namespace attncore {

struct Philox {
  static constexpr Index kCounters = 16;  // side by side, each for kNumbers keys
  static constexpr Index kNumbers = 8;    // 16-bit, of one counter
  static constexpr Index kKeys = kCounters * kNumbers;
  static constexpr int kRounds = 10;

  /// counter → four words.  `U` is a 32-bit integer or a register of them; multiply(a, b) gives {high, low} of a · b.
  template <class U, class Multiply>
  static ATTN_FN void generate(std::uint64_t seed, U (&counter)[4], Multiply multiply) noexcept {
    constexpr std::uint32_t kMultiply0 = 0xD2511F53U, kMultiply1 = 0xCD9E8D57U;
    constexpr std::uint32_t kWeyl0 = 0x9E3779B9U, kWeyl1 = 0xBB67AE85U;
    auto key0 = static_cast<std::uint32_t>(seed);
    auto key1 = static_cast<std::uint32_t>(seed >> 32U);
    for (int round = 0; round < kRounds; ++round) {
      const auto product0 = multiply(counter[0], kMultiply0);
      const auto product1 = multiply(counter[2], kMultiply1);
      counter[0] = product1.high ^ counter[1] ^ key0;
      counter[1] = product1.low;
      counter[2] = product0.high ^ counter[3] ^ key1;
      counter[3] = product0.low;
      key0 += kWeyl0;
      key1 += kWeyl1;
    }
  }
};

}  // namespace attncore
