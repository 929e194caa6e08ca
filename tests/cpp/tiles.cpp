// Products of a matrix unit in its model (tile_model.h): bit by bit what the instruction's order of sums says, whatever the tails.
#include <cmath>
#include <vector>

#include "isa_test.h"
#include "tile_product.h"

namespace {

using namespace attncore;

/// bfloat16 of −1 … 1, now and then subnormal or 0.
Bf16Pair half(Random& random) {
  if (random.one_of(16)) return static_cast<Bf16Pair>(random.below(0x80) | random.below(2) << 15);
  const float number = random.number();
  Bf16Pair bits = 0;
  std::memcpy(&bits, &number, sizeof bits);
  return bits >> 16U;
}
Bf16Pair pair(Random& random) {
  const Bf16Pair first = half(random);
  return first | half(random) << 16U;
}

/// A (rows, depth), in memory of its own and no more, and a panel that is deeper.
struct Case {
  Index rows, columns, depth, a_stride, c_stride;
  std::vector<Bf16Pair> a;
  std::vector<float> c, keep;
  OwnPanel<Bf16Pair> b;

  Case(Index r, Index n, Index d, Random& random)
      : rows(r),
        columns(n),
        depth(d),
        a_stride(d + 3),
        c_stride(round_up(n, kTileColumns) + 1),
        b(n, round_up(d, kTileDepth) + kTileDepth) {
    a.resize(static_cast<std::size_t>((rows - 1) * a_stride + depth));
    for (Bf16Pair& item : a) item = pair(random);
    for (Bf16Pair& item : b.memory) item = pair(random);
    c = noise(rows * c_stride, random);
    keep = noise(rows, random);
  }
  [[nodiscard]] Matrix<const Bf16Pair> left() const { return {a.data(), a_stride}; }
  [[nodiscard]] Bf16Pair& weight(Index row, Index k) {
    return a[static_cast<std::size_t>(row * a_stride + k)];
  }

  template <class Finish>
  [[nodiscard]] std::vector<float> multiply(Index of_rows, Index of_columns, Finish finish) const {
    std::vector<float> out = c;
    stream_gemm<Isa>(Matrix<float>{out.data(), c_stride}, left(), as_const(b.panel), of_rows, of_columns,
                     depth, finish);
    return out;
  }
  template <class Finish>
  [[nodiscard]] std::vector<float> multiply_visible(Finish finish) const {
    std::vector<float> out = c;
    TileUnit<Isa>::configure();
    gemm_of_visible<Isa, float>(Matrix<float>{out.data(), c_stride}, left(), as_const(b.panel), rows, depth,
                                finish);
    TileUnit<Isa>::release();
    return out;
  }

  /// Every element: the sum in the instruction's order, and near the sum in double.
  void check(const std::vector<float>& out) {
    for (Index row = 0; row < rows; ++row) {
      for (Index column = 0; column < columns; ++column) {
        float sum = 0;
        double exact = 0, size = 0;
        for (Index step = 0; step < depth; step += kTileDepth) {
          float first = 0, second = 0;
          for (Index k = step; k < min(depth, step + kTileDepth); ++k) {
            const Bf16Pair x = weight(row, k), y = b(k, column);
            first = fused(first_half(x), first_half(y), first);
            second = fused(second_half(x), second_half(y), second);
            const double terms[] = {double(first_half(x)) * double(first_half(y)),
                                    double(second_half(x)) * double(second_half(y))};
            exact += terms[0] + terms[1];
            size += std::fabs(terms[0]) + std::fabs(terms[1]);
          }
          sum = added(sum, added(first, second));
        }
        CHECK(out[static_cast<std::size_t>(row * c_stride + column)] == sum);
        const double bound = size * double(2 * depth + 2) * std::numeric_limits<float>::epsilon();
        CHECK(std::fabs(double(sum) - exact) <= bound);
      }
      const auto end = static_cast<std::size_t>((row + 1) * c_stride - 1);
      CHECK(out[end] == c[end]);  // the rest of the row is not written
    }
  }
};

constexpr Index kSomeRows[] = {1, 2, 9, 15, 16, 17, 31, 32, 33, 50};
constexpr Index kSomeColumns[] = {1, 15, 16, 17, 32, 40, 48, 64, 65, 131};

void products() {
  constexpr float kScale = 0.37F;
  Random random;
  for (const Index rows : kSomeRows) {
    for (const Index columns : kSomeColumns) {
      for (const Index depth : {1, 2, 15, 16, 17, 40}) {
        Case p(rows, columns, depth, random);
        const Accumulated<float> accumulated{p.keep.data()};
        const auto all = p.multiply(rows, columns, Stored<float>{});
        const auto scaled = p.multiply(rows, columns, Scaled<float>{kScale});
        const auto sums = p.multiply(rows, columns, accumulated);
        p.check(all);
        for (Index row = 0; row < rows; ++row) {
          const float keep = p.keep[static_cast<std::size_t>(row)];
          for (Index column = 0; column < columns; ++column) {
            const auto i = static_cast<std::size_t>(row * p.c_stride + column);
            CHECK(scaled[i] == all[i] * kScale);
            CHECK(sums[i] == std::fma(p.c[i], keep, all[i]) || sums[i] == p.c[i] * keep + all[i]);
          }
        }
        const Index fewer = 1 + random.below(rows), narrower = 1 + random.below(columns);
        CHECK(same_bits(p.multiply(fewer, columns, accumulated), sums, 0, fewer * p.c_stride));
        const auto narrow = p.multiply(rows, narrower, Stored<float>{});
        for (Index row = 0; row < rows; ++row) {
          for (Index column = 0; column < p.c_stride; ++column) {
            const auto i = static_cast<std::size_t>(row * p.c_stride + column);
            CHECK(narrow[i] == (column < round_up(narrower, kTileColumns) ? all[i] : p.c[i]));
          }
        }
      }
    }
  }
}

/// gemm_of_visible is the stream's product, bit by bit; what stands at keys of weight −0, or deeper, does not matter to it.
void products_of_visible() {
  constexpr Bf16Pair kPoison[] = {0x7f80, 0xff80, 0x7fc0};  // Inf, −Inf, NaN
  Random random;
  for (const Index columns : kSomeColumns) {
    for (const Index depth : {1, 3, 16, 40, 64}) {
      Case p(19, columns, depth, random);
      const auto hidden = [&](Index row, Index key) { return key % 3 == 0 || (key + row) % 5 == 0; };
      for (Index row = 0; row < p.rows; ++row) {
        for (Index key = 0; key < 2 * depth; ++key) {
          const Bf16Pair keep = key % 2 == 0 ? 0xffff0000U : 0xffffU, mark = 0x8000U << key % 2 * 16;
          Bf16Pair& weights = p.weight(row, key / 2);
          if (hidden(row, key)) weights = (weights & keep) | mark;
        }
      }
      const Accumulated<float> accumulated{p.keep.data()};
      const auto want = p.multiply(p.rows, columns, accumulated);
      const auto in_place = p.multiply(p.rows, columns, Continued{});
      const auto check_both = [&] {
        CHECK(same_bits(p.multiply_visible(accumulated), want));
        CHECK(same_bits(p.multiply_visible(Continued{}), in_place));
      };
      check_both();
      const auto poison = [&](Index key, Index column) {
        const Bf16Pair keep = key % 2 == 0 ? 0xffff0000U : 0xffffU;
        p.b(key / 2, column) = (p.b(key / 2, column) & keep) | kPoison[random.below(3)] << key % 2 * 16;
      };
      for (Index column = 0; column < columns; ++column) {
        for (Index key = 0; key < 2 * depth; key += 3) poison(key, column);
        for (Index key = 2 * depth; key < 2 * p.b.panel.depth; ++key) poison(key, column);
      }
      check_both();
      if (depth < 2) continue;  // row 0 sees key 2
      poison(2, 0);
      CHECK(!std::isfinite(p.multiply_visible(accumulated)[0]));
    }
  }
}

/// The model's own sums: std::fma's, but for subnormal numbers.
void model() {
  constexpr float kLeast = std::numeric_limits<float>::min();
  Random random;
  for (int i = 0; i < 100000; ++i) {
    const float a = first_half(pair(random)), b = second_half(pair(random));
    const float scales[] = {1, 0x1p-12F, 0x1p-24F, 0x1p-25F, 0x1p-30F};
    const float c = random.number() * scales[random.below(5)];
    const float want = std::fma(a, b, c);
    if (std::fabs(want) >= kLeast) CHECK(fused(a, b, c) == want);
  }
  CHECK(fused(0x1p-100F, 0x1p-40F, 0) == 0);
  CHECK(fused(0x1p-100F, 0x1p-26F, 0) == kLeast);
  CHECK(std::signbit(fused(-0x1p-100F, 0x1p-40F, 0)));
  CHECK(added(kLeast, -1.5F * kLeast) == 0);
  CHECK(bf16_value(0x7f) == 0 && bf16_value(0x80) == kLeast);
}

}  // namespace

void test() {
  model();
  products();
  products_of_visible();
}
