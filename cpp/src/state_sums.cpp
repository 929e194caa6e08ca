#include "state_sums.h"

#include <cmath>
#include <limits>

#include "cpu/dtype.h"
#include "number.h"
#include "row_tasks.h"

namespace attncore {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double& number_at(const Tensor& t, Index row) noexcept { return *reinterpret_cast<double*>(row_at(t, row)); }

/// x += y, and what rounding takes from that to `rest` (Knuth's two-sum).
void add(double& x, double& rest, double y) noexcept {
  const double sum = x + y, added = sum - x;
  rest += (x - (sum - added)) + (y - added);
  x = sum;
}

/// An infinite or undefined sum has no rest.
double whole(double x, double rest) noexcept { return std::isfinite(x) ? x + rest : x; }

/// One row of the sums.
struct RowSums {
  double &maximum, &sum;
  double* output;
  double *sum_rest = nullptr, *output_rest = nullptr;
  Index dims;

  RowSums(const Sums& s, Index row) noexcept
      : maximum(number_at(s.maximum, row)),
        sum(number_at(s.sum, row)),
        output(&number_at(s.output, row)),
        dims(s.output.shape[3]) {
    if (!s.sum_rest.given()) return;
    sum_rest = &number_at(s.sum_rest, row);
    output_rest = &number_at(s.output_rest, row);
  }

  /// Measures the row from another maximum.
  void rescale(double to) const noexcept {
    if (maximum == to) return;
    const double factor = std::exp(maximum - to);
    const bool nothing = maximum == -kInfinity;
    maximum = to;
    if (nothing) return;
    sum *= factor;
    for (Index i = 0; i < dims; ++i) output[i] *= factor;
    if (sum_rest == nullptr) return;
    *sum_rest *= factor;
    for (Index i = 0; i < dims; ++i) output_rest[i] *= factor;
  }

  void add_to_sum(double term) const noexcept {
    if (sum_rest == nullptr) {
      sum += term;
    } else {
      add(sum, *sum_rest, term);
    }
  }

  /// output += weight · terms
  template <class T>
  void add_to_output(double weight, const T* terms) const noexcept {
    if (output_rest == nullptr) {
      for (Index i = 0; i < dims; ++i) output[i] += weight * static_cast<double>(terms[i]);
    } else {
      for (Index i = 0; i < dims; ++i) add(output[i], output_rest[i], weight * static_cast<double>(terms[i]));
    }
  }
};

template <class T>
T value_at(const Tensor& t, Index row) noexcept {
  return *reinterpret_cast<const T*>(row_at(t, row));
}

template <class T>
void add_pieces_rows(const Sums& sums, const PieceResult& piece, Range rows) noexcept {
  for (Index row = rows.begin; row < rows.end; ++row) {
    const auto theirs = static_cast<double>(value_at<T>(piece.maximum, row));
    const auto sum = static_cast<double>(value_at<T>(piece.sum, row));
    if (sum == 0) continue;  // saw nothing, whatever its output holds
    const RowSums mine(sums, row);
    if (mine.maximum == -kInfinity || theirs > mine.maximum + kLag) mine.rescale(theirs);
    const double weight = std::exp(theirs - mine.maximum) * sum;
    mine.add_to_sum(weight);
    mine.add_to_output(weight, reinterpret_cast<const T*>(row_at(piece.out, row)));
  }
}

}  // namespace

void add_piece(const Sums& sums, const PieceResult& piece, const Options& options) {
  for_rows(piece.out, kRowsATask, uninterrupted(options), [&](Range rows) {
    if (piece.out.dtype == DType::f64) {
      add_pieces_rows<double>(sums, piece, rows);
    } else {
      add_pieces_rows<float>(sums, piece, rows);
    }
  });
}

void add_sums(const Sums& sums, const Sums& other, const Options& options) {
  for_rows(sums.output, kRowsATask, uninterrupted(options), [&](Range rows) {
    for (Index row = rows.begin; row < rows.end; ++row) {
      const RowSums mine(sums, row), theirs(other, row);
      if (theirs.sum == 0) continue;
      if (mine.maximum == -kInfinity || theirs.maximum > mine.maximum) mine.rescale(theirs.maximum);
      const double weight = std::exp(theirs.maximum - mine.maximum);
      mine.add_to_sum(weight * theirs.sum);
      mine.add_to_output(weight, theirs.output);
      if (mine.sum_rest == nullptr) continue;
      *mine.sum_rest += weight * *theirs.sum_rest;
      for (Index i = 0; i < mine.dims; ++i) mine.output_rest[i] += weight * theirs.output_rest[i];
    }
  });
}

namespace {

template <class T>
void finish_rows(const Sums& sums, const Tensor& sinks, const Tensor& out, const Tensor& lse,
                 Range rows) noexcept {
  for (Index row = rows.begin; row < rows.end; ++row) {
    const RowSums mine(sums, row);
    const Index head = row / out.shape[2] % out.shape[1];
    const double sink = sinks.given() ? read_number(at(sinks, 0, head), sinks.dtype) : -kInfinity;
    const double top = sink > mine.maximum ? sink : mine.maximum;
    const double origin = top == -kInfinity ? 0 : top;  // nothing seen: −inf − (−inf) would be NaN
    const double scale = std::exp(mine.maximum - origin);
    const double seen = whole(mine.sum, mine.sum_rest == nullptr ? 0 : *mine.sum_rest) * scale;
    const double denominator = seen + std::exp(sink - origin);
    std::byte* const to = row_at(out, row);
    for (Index i = 0; i < mine.dims; ++i) {
      const double output = whole(mine.output[i], mine.output_rest == nullptr ? 0 : mine.output_rest[i]);
      const T item = denominator == 0 ? T{0} : static_cast<T>(output * scale / denominator);
      __builtin_memcpy(to + i * out.stride[3], &item, sizeof item);
    }
    if (!lse.given()) continue;
    const T log_sum =
        denominator == 0 ? static_cast<T>(-kInfinity) : static_cast<T>(origin + std::log(denominator));
    __builtin_memcpy(row_at(lse, row), &log_sum, sizeof log_sum);
  }
}

}  // namespace

void finish_sums(const Sums& sums, const Tensor& sinks, const Tensor& out, const Tensor& lse,
                 const Options& options) {
  for_rows(out, kRowsATask, options, [&](Range rows) {
    if (out.dtype == DType::f64) {
      finish_rows<double>(sums, sinks, out, lse, rows);
    } else {
      finish_rows<float>(sums, sinks, out, lse, rows);
    }
  });
}

namespace {

/// Rows of floats that are read as From, as T without gaps.
template <class From, class T>
void convert_rows(const Tensor& from, const Tensor& to, Range rows) noexcept {
  constexpr Index n = kWidth<Portable, From>;
  const Index stride = from.stride[3], dims = from.shape[3];
  with_storage<From>(from.dtype, [&]<DType kStorage>() {
    for (Index row = rows.begin; row < rows.end; ++row) {
      const std::byte* const x = row_at(from, row);
      T* const y = reinterpret_cast<T*>(row_at(to, row));
      for (Index i = 0; i < dims; i += n) {
        const Index count = min(n, dims - i);
        const auto items = load_items<Portable, From, kStorage>(x + i * stride, stride, count);
        for (Index lane = 0; lane < count; ++lane) y[i + lane] = static_cast<T>(items[lane]);
      }
    }
  });
}

}  // namespace

void convert(const Tensor& from, const Tensor& to, const Options& options) {
  for_rows(from, kRowsATask, options, [&](Range rows) {
    if (to.dtype == DType::f64) {
      from.dtype == DType::f64 ? convert_rows<double, double>(from, to, rows)
                               : convert_rows<float, double>(from, to, rows);
    } else {
      from.dtype == DType::f64 ? convert_rows<double, float>(from, to, rows)
                               : convert_rows<float, float>(from, to, rows);
    }
  });
}

}  // namespace attncore
