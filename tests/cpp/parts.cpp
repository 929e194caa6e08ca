// float16 and float32 in parts of bfloat16: exact splits, what a split would harm, and products of parts in the model of a matrix
// unit (tile_model.h) beside sums in double.
#include <cmath>
#include <vector>

#include "isa_test.h"
#include "tile_product.h"

namespace {

using namespace attncore;
using V = Vec<Isa, float>;
using Floats = std::vector<float>;

float float_of(std::uint32_t bits) {
  float x = 0;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
/// Any bits, but numbers that are neither too small nor infinite.
float any_number(Random& random) {
  const auto exponent = static_cast<std::uint32_t>(27 + random.below(228));
  return float_of((random.bits() & 0x807fffffU) | exponent << 23U);
}

/// The parts of (x, y), and what they add up to in double.
template <int n>
struct Splitting {
  U32<Isa> parts[n];
  Splitting(float x, float y) { split<Isa, n>(broadcast<V>(x), broadcast<V>(y), parts); }
  [[nodiscard]] double first() const { return sum(&first_half); }
  [[nodiscard]] double second() const { return sum(&second_half); }
  [[nodiscard]] bool has_subnormal() const {
    bool found = false;
    for (const U32<Isa>& part : parts) {
      for (const float x : {first_of<Isa>(part)[3], second_of<Isa>(part)[3]})
        found |= std::fpclassify(x) == FP_SUBNORMAL;
    }
    return found;
  }

 private:
  /// As the unit reads them.
  [[nodiscard]] double sum(float (*half)(Bf16Pair)) const {
    double total = 0;
    for (const U32<Isa>& part : parts) total += double(half(part[3]));
    return total;
  }
};

void splits() {
  for (std::uint32_t bits = 0; bits < 0x10000U; ++bits) {
    if ((bits & 0x7c00U) == 0x7c00U) continue;
    const auto half = static_cast<std::uint16_t>(bits);
    const auto* const p = reinterpret_cast<const std::byte*>(&half);
    const float x = load_items<Isa, float, DType::f16>(p, 2, 1)[0];
    const Splitting<2> s(x, -x);
    CHECK(s.first() == double(x) && s.second() == -double(x) && !s.has_subnormal());
    V first, second;
    join<Isa, 2>(s.parts, first, second);
    CHECK(first[0] == x && second[0] == -x);
  }
  Random random;
  for (int i = 0; i < 200000; ++i) {
    const float x = any_number(random), y = any_number(random);
    const Splitting<3> s(x, y);
    CHECK(s.first() == double(x) && s.second() == double(y) && !s.has_subnormal());
    const Splitting<2> rounded(x, y);
    CHECK(std::fabs(rounded.first() - double(x)) <= std::fabs(double(x)) * 0x1p-16);
    CHECK(std::fabs(rounded.second() - double(y)) <= std::fabs(double(y)) * 0x1p-16);
  }
  const Splitting<2> hidden(-0.0F, 0);
  CHECK(hidden.parts[0][0] == 0x8000U && hidden.parts[1][0] == 0);
}

void harm() {
  Random random;
  constexpr std::uint32_t kEdges[] = {0,           1,           0x0d7fffffU, 0x0d800000U, 0x007fffffU,
                                      0x7f7fffffU, 0x7f800000U, 0x7f800001U, 0x7fc00000U, 0x7fffffffU};
  for (int i = 0; i < 100000; ++i) {
    const std::uint32_t bits = i < 10 ? kEdges[i] : random.bits();
    for (const float x : {float_of(bits), float_of(bits ^ 0x80000000U)}) {
      const bool harmed = x != 0 && !(std::fabs(x) >= 0x1p-100F && std::isfinite(x));
      V items{};
      items[random.below(kWidth<Isa, float>)] = x;
      CHECK(any_lane<Isa>(harmed_lanes<Isa>(items)) == harmed);
      if (!harmed && x != 0) CHECK(Splitting<3>(x, 0).first() == double(x));
    }
  }
}

/// Numbers of A (rows, depth) and of B (depth, columns), as float32 or float16; A in parts, in rows; B in panels.
template <int n, DType kStorage>
struct Case {
  using Item = typename Storage<kStorage>::Item;
  Index rows, columns, depth, stride, c_stride;
  Floats a, c, keep;
  std::vector<Item> b;  // transposed: columns are tokens
  std::vector<Bf16Pair> parts;

  Case(Index r, Index m, Index d, Random& random)
      : rows(r), columns(m), depth(d), stride(parts_depth<n>(d) + 7), c_stride(round_up(m, 16) + 1) {
    const auto number = [&] {
      return random.one_of(9) ? 0 : random.number() * (random.one_of(3) ? 0x1p-9F : 1);
    };
    for (Index i = 0; i < rows * depth; ++i) a.push_back(rounded(number()));
    for (Index i = 0; i < columns * depth; ++i) b.push_back(item(number()));
    c = noise(rows * c_stride, random);
    keep = noise(rows, random);
    parts.resize(static_cast<std::size_t>(rows * stride));
    for (Index row = 0; row < rows; ++row) write(row);
  }
  static Item item(float x) {
    Item items[kWidth<Isa, float>];
    store_as<Isa, float, kStorage>(items, broadcast<V>(x));
    return items[0];
  }
  static float value(const Item& x) {
    return load_items<Isa, float, kStorage>(reinterpret_cast<const std::byte*>(&x), 0, 1)[0];
  }
  static float rounded(float x) { return value(item(x)); }

  /// A's row in parts, as queries are.
  void write(Index row) {
    const auto* const in = reinterpret_cast<const std::byte*>(a.data() + row * depth);
    Bf16Pair* out = parts.data() + row * stride;
    for (Index k = 0; k < depth; k += kRunItems) {
      U32<Isa> own[n];
      split<Isa, n>(load_dims<Isa, DType::f32>(in, 4, k, depth),
                    load_dims<Isa, DType::f32>(in, 4, k + kTileDepth, depth), own);
      for (int part = 0; part < n; ++part, out += kTileDepth)
        attncore::store(static_cast<void*>(out), own[part]);
    }
  }
  void hide(Index row, Index k) {
    a[static_cast<std::size_t>(row * depth + k)] = -0.0F;
    write(row);
  }

  /// B's columns as keys, or its rows as values.
  [[nodiscard]] OwnPanel<Part<n>> panel(bool transposed, bool whole) const {
    OwnPanel<Part<n>> out(columns, parts_depth<n>(depth));
    constexpr Index kItem = sizeof(Item);
    KeySource source{};
    source.data = reinterpret_cast<std::byte*>(const_cast<Item*>(b.data()));
    source.storage = kStorage;
    source.token_stride = transposed ? depth * kItem : kItem;
    source.dim_stride = transposed ? kItem : depth * kItem;
    const bool good = transposed ? pack_parts_transposed<Isa, kStorage>(out.panel, source, 0, depth)
                                 : pack_parts<Isa, kStorage>(out.panel, source, 0, depth);
    CHECK(good == whole);
    return out;
  }
  template <class A, class Finish>
  [[nodiscard]] Floats multiply(const OwnPanel<Part<n>>& panel, bool visible, Finish finish) const {
    Floats out = c;
    const Matrix<float> result{out.data(), c_stride};
    const Matrix<const A> left{reinterpret_cast<const A*>(parts.data()), stride};
    if (visible) {
      TileUnit<Isa>::configure();
      gemm_of_visible<Isa, float>(result, left, as_const(panel.panel), rows, parts_depth<n>(depth), finish);
      TileUnit<Isa>::release();
    } else {
      stream_gemm<Isa>(result, left, as_const(panel.panel), rows, columns, parts_depth<n>(depth), finish);
    }
    return out;
  }
  void check(const Floats& out, double left_out) const {
    for (Index row = 0; row < rows; ++row) {
      for (Index column = 0; column < columns; ++column) {
        double exact = 0, size = 0;
        for (Index k = 0; k < depth; ++k) {
          const double x = double(a[static_cast<std::size_t>(row * depth + k)]),
                       y = double(value(b[static_cast<std::size_t>(column * depth + k)]));
          exact += x * y;
          size += std::fabs(x * y);
        }
        const double unit = std::numeric_limits<float>::epsilon();
        const double error =
            std::fabs(double(out[static_cast<std::size_t>(row * c_stride + column)]) - exact);
        CHECK(error <= size * (left_out + double(depth + 8) * unit));
      }
      const auto end = static_cast<std::size_t>((row + 1) * c_stride - 1);
      CHECK(out[end] == c[end]);  // the rest of the row is not written
    }
  }
};

/// `A`: how A's parts are multiplied; what that leaves out.
template <class A, int n, DType kStorage>
void products(double left_out) {
  Random random;
  for (const Index rows : {1, 16, 17, 33}) {
    for (const Index columns : {1, 16, 40, 65, 131}) {
      for (const Index depth : {1, 31, 32, 33, 90}) {
        Case<n, kStorage> p(rows, columns, depth, random);
        const auto keys = p.panel(true, true), values = p.panel(false, true);
        const Floats out = p.template multiply<A>(keys, false, Stored<float>{});
        p.check(out, left_out);
        CHECK(same_bits(out, p.template multiply<A>(values, false, Stored<float>{})));
        const Accumulated<float> accumulated{p.keep.data()};
        const Floats want = p.template multiply<A>(values, false, accumulated);
        CHECK(same_bits(p.template multiply<A>(values, true, accumulated), want));
        CHECK(same_bits(p.template multiply<A>(values, true, Continued{}),
                        p.template multiply<A>(values, false, Continued{})));
      }
    }
  }
}

/// What stands at hidden keys does not matter to gemm_of_visible.
template <class A, int n, DType kStorage>
void hidden() {
  constexpr float kPoison[] = {HUGE_VALF, -HUGE_VALF, NAN};
  Random random;
  for (const Index columns : {1, 40, 65}) {
    for (const Index depth : {3, 33, 90}) {
      Case<n, kStorage> p(19, columns, depth, random);
      for (Index row = 0; row < p.rows; ++row) {
        for (Index k = 0; k < depth; ++k) {
          if (k % 3 == 0 || (k + row) % 5 == 0) p.hide(row, k);
        }
      }
      const Accumulated<float> accumulated{p.keep.data()};
      const Floats want = p.template multiply<A>(p.panel(false, true), true, accumulated);
      for (Index column = 0; column < columns; ++column) {
        for (Index k = 0; k < depth; k += 3) {
          p.b[static_cast<std::size_t>(column * depth + k)] =
              Case<n, kStorage>::item(kPoison[random.below(3)]);
        }
      }
      CHECK(same_bits(p.template multiply<A>(p.panel(false, false), true, accumulated), want));
    }
  }
}

}  // namespace

void test() {
  splits();
  harm();
  constexpr double kExact = 0;
  products<Part<2>, 2, DType::f16>(kExact);
  products<RoundedPart, 2, DType::f16>(0x1p-14);
  products<Part<2>, 2, DType::f32>(0x1p-15);
  products<Part<3>, 3, DType::f32>(0x1p-22);
  hidden<RoundedPart, 2, DType::f16>();
  hidden<Part<3>, 3, DType::f32>();
}
