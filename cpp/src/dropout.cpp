// Which weights dropout keeps, for people and for tests: the same coins as the kernels', one at a time.
#include "score/dropout.h"

#include "require.h"
#include "resolve.h"

namespace attncore {
namespace {

struct Product {
  std::uint32_t high, low;
};

Product multiply(std::uint32_t a, std::uint32_t b) noexcept {
  const std::uint64_t product = std::uint64_t{a} * b;
  return {static_cast<std::uint32_t>(product >> 32U), static_cast<std::uint32_t>(product)};
}

/// words: those of the counter that key k belongs to.
void draw(std::uint64_t seed, Index batch, Index head, Index query, Index k,
          std::uint32_t (&words)[4]) noexcept {
  const auto word = [](Index x) { return static_cast<std::uint32_t>(x); };
  words[0] = word(k / Philox::kKeys * Philox::kCounters + k % Philox::kCounters);
  words[1] = word(query);
  words[2] = word(head);
  words[3] = word(batch);
  Philox::generate(seed, words, multiply);
}

}  // namespace

void dropout_mask(const Dropout& dropout, const Tensor& rows, const Tensor& keep, const Options& options) {
  const Coins coins = coins_of(dropout);
  require_dtype("keep", keep, {DType::boolean});
  require_given("keep", keep);
  require_apart("keep", keep, {{"rows", &rows}});
  const auto& [batches, heads, queries, keys] = keep.shape;
  if (is_given("rows", rows)) require_ints("rows", rows, {1, 1, queries, 1}, {"", "", "rows"});
  if (queries == 0 || keys == 0) return;  // however many heads
  for (Index batch = 0; batch < batches; ++batch) {
    for (Index head = 0; head < heads; ++head) {
      for (Index i = 0; i < queries; ++i) {
        if (options.cancelled && options.cancelled()) throw Cancelled();
        const Index query = rows.given() ? read_int(at(rows, 0, 0, i), rows.dtype) : i;
        for (Index chunk = 0; chunk < keys; chunk += Philox::kKeys) {
          for (Index lane = 0; lane < Philox::kCounters; ++lane) {
            std::uint32_t words[4];
            draw(coins.seed, batch, head, query, chunk + lane, words);
            for (Index number = 0; number < Philox::kNumbers; ++number) {
              const Index key = chunk + number * Philox::kCounters + lane;
              if (key >= keys) break;
              const std::uint32_t both = words[number / 2];
              const std::uint32_t value = number % 2 == 0 ? both & 0xffffU : both >> 16U;
              *at(keep, batch, head, i, key) = std::byte{value >= coins.dropped};
            }
          }
        }
      }
    }
  }
}

}  // namespace attncore
