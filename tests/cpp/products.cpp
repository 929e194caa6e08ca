// Products of one ISA against sums in double, and against each other bit by bit.
#include <cmath>
#include <limits>
#include <vector>

#include "isa_test.h"

namespace {

using namespace attncore;

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <class T>
struct Product {
  Index rows, columns, depth, stride;
  std::vector<T> a, c, keep;
  OwnPanel<T> b;

  Product(Index r, Index n, Index d, Random& random) : rows(r), columns(n), depth(d), b(n, d + 2) {
    stride = round_up(n, kWidth<Isa, T>) + 1;
    a = noise<T>(rows * (depth + 3), random);
    c = noise<T>(rows * stride, random);
    keep = noise<T>(rows, random);
    b.memory = noise<T>(static_cast<Index>(b.memory.size()), random);
    b.panel.data = b.memory.data();
  }

  [[nodiscard]] T weight(Index row, Index k) const {
    return a[static_cast<std::size_t>(row * (depth + 3) + k)];
  }
  [[nodiscard]] Matrix<const T> left() const { return {a.data(), depth + 3}; }

  template <class Finish>
  [[nodiscard]] std::vector<T> multiply(Index of_rows, Finish finish) const {
    std::vector<T> out = c;
    gemm<Isa, T>(Matrix<T>{out.data(), stride}, left(), as_const(b.panel), of_rows, columns, depth, finish);
    return out;
  }

  /// want(c, sum, row) is what the finish makes of the exact sum.
  template <class Want>
  void check(const std::vector<T>& out, Want want) {
    for (Index row = 0; row < rows; ++row) {
      for (Index column = 0; column < columns; ++column) {
        double sum = 0, size = 1;
        for (Index k = 0; k < depth; ++k)
          sum += double(weight(row, k)) * double(b(k, column)), size += std::fabs(double(weight(row, k)));
        const auto i = static_cast<std::size_t>(row * stride + column);
        const double error = std::fabs(want(double(c[i]), sum, row) - double(out[i]));
        CHECK(error <= size * static_cast<double>(depth + 2) * std::numeric_limits<T>::epsilon());
      }
      // The rest of the row is not written.
      CHECK(out[static_cast<std::size_t>((row + 1) * stride - 1)] ==
            c[static_cast<std::size_t>((row + 1) * stride - 1)]);
    }
  }
};

template <class T>
void products() {
  constexpr Index n = kWidth<Isa, T>;
  Random random;
  for (Index rows = 1; rows <= 2 * Isa::kRows + 1; ++rows) {
    for (const Index columns : {Index{1}, n - 1, n, n + 1, (Isa::kColumns - 1) * n, Isa::kColumns * n,
                                2 * Isa::kColumns * n + n + 3}) {
      for (const Index depth : {0, 1, 2, 7, 64, 131}) {
        Product<T> p(rows, columns, depth, random);
        const auto scaled = p.multiply(rows, Scaled<T>{T(0.37)});
        const auto accumulated = p.multiply(rows, Accumulated<T>{p.keep.data()});
        p.check(scaled, [](double, double sum, Index) { return sum * double(T(0.37)); });
        p.check(accumulated, [&](double c, double sum, Index row) {
          return c * double(p.keep[static_cast<std::size_t>(row)]) + sum;
        });
        for (Index fewer = 1; fewer < rows; ++fewer) {
          CHECK(same_bits(p.multiply(fewer, Scaled<T>{T(0.37)}), scaled, 0, fewer * p.stride));
          CHECK(
              same_bits(p.multiply(fewer, Accumulated<T>{p.keep.data()}), accumulated, 0, fewer * p.stride));
        }
      }
    }
  }
}

/// gemm_of_visible is gemm, bit by bit, and what stands at keys of weight −0 does not matter to it.
template <class T>
void products_of_visible() {
  Random random;
  for (const Index columns : {1, 5, 16, 17, 64, 100, 131}) {
    for (const Index depth : {1, 3, 50, 128}) {
      Product<T> p(Isa::kRows + 3, columns, depth, random);
      for (T& weight : p.a) weight = random.one_of(3) ? -T(0) : std::fabs(weight) * T(random.below(4) != 0);
      for (Index row = 0; row < p.rows; ++row) {
        for (Index k = 0; k < depth; k += 3) p.a[static_cast<std::size_t>(row * (depth + 3) + k)] = -T(0);
      }
      const auto visible = [&] {
        std::vector<T> out = p.c;
        gemm_of_visible<Isa, T>(Matrix<T>{out.data(), p.stride}, p.left(), as_const(p.b.panel), p.rows, depth,
                                Accumulated<T>{p.keep.data()});
        return out;
      };
      const auto want = p.multiply(p.rows, Accumulated<T>{p.keep.data()});
      CHECK(same_bits(visible(), want));
      for (Index k = 0; k < depth; k += 3) {
        for (Index column = 0; column < columns; ++column) {
          p.b(k, column) = column % 2 == 0 ? kInfinity<T> : std::numeric_limits<T>::quiet_NaN();
        }
      }
      CHECK(same_bits(visible(), want));
    }
  }
}

/// Ranges of so many queries that never move back, some of them empty, over the keys around a tile.
std::vector<Range> ranges_around(Range tile, Index queries, Random& random) {
  std::vector<Range> ranges;
  Range last{tile.begin - random.below(20), tile.begin};
  for (Index query = 0; query < queries; ++query) {
    if (random.one_of(1 + random.below(8))) last = {last.end, last.end + random.below(tile.size())};
    ranges.push_back(last);
  }
  return ranges;
}

/// A band over rows × keys: what it says of one row or key, from the definition, and of several, as of all of them.  `ranges` is what it
/// may point to.
Band check_band(Index rows, Index keys, std::vector<Range>& ranges, Random& random) {
  const Index begin = random.below(4 * keys) - 3 * keys, group = 1 + random.below(3);
  const Index first_end = random.one_of(4) ? kBeyond : begin + random.below(2 * keys);
  const Index lead = random.below(group), tile = random.below(100);
  if (random.one_of(2)) ranges = ranges_around({tile, tile + keys}, (lead + rows - 1) / group + 1, random);
  const Band band{.first = {random.one_of(3) ? -kBeyond : begin, first_end},
                  .rows = rows,
                  .keys = keys,
                  .lead = lead,
                  .group = group,
                  .of_query = ranges.empty() ? nullptr : ranges.data(),
                  .tile = tile};
  const auto sees = [&](Index row, Index key) {
    const Index query = (band.lead + row) / group;
    const Range seen = ranges.empty() ? Range{tile, tile + keys} : ranges[static_cast<std::size_t>(query)];
    return key >= band.first.begin + query && key < band.first.end + query && tile + key >= seen.begin &&
           tile + key < seen.end;
  };
  bool whole = true;
  for (Index row = 0; row < rows; ++row) {
    const Range seen = band.keys_of({row, row + 1}), later = band.keys_of({row, rows});
    for (Index key = 0; key < keys; ++key) {
      const Range seeing = band.rows_of({key, key + 1}), of_later = band.rows_of({key, keys});
      whole &= sees(row, key);
      CHECK(sees(row, key) == (key >= seen.begin && key < seen.end));
      CHECK(sees(row, key) == (row >= seeing.begin && row < seeing.end));
      CHECK(!sees(row, key) || (seen.begin == later.begin && seen.end <= later.end));
      CHECK(!sees(row, key) || (seeing.begin == of_later.begin && seeing.end <= of_later.end));
    }
  }
  CHECK(band.whole == whole);
  return band;
}

/// What a band leaves out changes nothing that is read.
template <class T>
void products_of_band() {
  Random random;
  for (int repeat = 0; repeat < 400; ++repeat) {
    const Index rows = 1 + random.below(3 * Isa::kRows), keys = 1 + random.below(100);
    std::vector<Range> ranges;
    const Band band = check_band(rows, keys, ranges, random);
    Product<T> scores(rows, keys, 5, random);
    std::vector<T> some = scores.c;
    const std::vector<T> all = scores.multiply(rows, Stored<T>{});
    gemm<Isa, T>(Matrix<T>{some.data(), scores.stride}, scores.left(), as_const(scores.b.panel), rows, keys,
                 5, Stored<T>{}, SeenScores{band});

    Product<T> outputs(rows, 20, keys, random);  // its A: weights
    for (Index row = 0; row < rows; ++row) {
      const Range seen = band.keys_of({row, row + 1});
      for (Index key = 0; key < keys; ++key) {
        const auto at = static_cast<std::size_t>(row * scores.stride + key);
        const bool hidden = key < seen.begin || key >= seen.end;
        CHECK(hidden || some[at] == all[at]);
        if (hidden) outputs.a[static_cast<std::size_t>(row * (keys + 3) + key)] = 0;
      }
    }
    std::vector<T> out = outputs.c;
    gemm<Isa, T>(Matrix<T>{out.data(), outputs.stride}, outputs.left(), as_const(outputs.b.panel), rows, 20,
                 keys, Added<T>{}, SeenWeights<1>{band});
    CHECK(same_bits(out, outputs.multiply(rows, Added<T>{})));

    const Product<T> of_keys(keys, 20, rows, random);  // the same weights, transposed
    std::vector<T> sums = of_keys.c, every_row = sums;
    const auto multiply = [&](std::vector<T>& c, auto extents) {
      gemm<Isa, T>(Matrix<T>{c.data(), of_keys.stride}, transposed(outputs.left()), as_const(of_keys.b.panel),
                   keys, 20, rows, Added<T>{}, extents);
    };
    multiply(sums, SeenWeights<1, true>{band});
    multiply(every_row, Everything{});
    CHECK(same_bits(sums, every_row));
  }
}

}  // namespace

void test() {
  products<float>();
  products<double>();
  products_of_visible<float>();
  products_of_visible<double>();
  products_of_band<float>();
  products_of_band<double>();
}
