#include "rows.h"

#include <cmath>

#include "cpu/dtype.h"
#include "row_tasks.h"

namespace attncore {
namespace {

/// run.template operator()<T, kStorage>() for a dtype and what it is accumulated in.
template <class Run>
void with_dtype(DType dtype, Run run) {
  switch (dtype) {
    case DType::f64:
      return run.template operator()<double, DType::f64>();
    case DType::f16:
      return run.template operator()<float, DType::f16>();
    case DType::bf16:
      return run.template operator()<float, DType::bf16>();
    default:
      return run.template operator()<float, DType::f32>();
  }
}

/// run(first item, items) for each register of a row.
template <class T, class Run>
ATTN_INLINE void for_registers(Index dim, Run run) noexcept {
  constexpr Index n = kWidth<Portable, T>;
  for (Index i = 0; i < dim; i += n) run(i, min(n, dim - i));
}

template <class T, DType kStorage>
ATTN_INLINE Vec<Portable, T> load_at(const std::byte* row, Index item, Index n) noexcept {
  constexpr Index kItem = sizeof(typename Storage<kStorage>::Item);
  return load_items<Portable, T, kStorage>(row + item * kItem, kItem, n);
}

template <class T, DType kStorage>
ATTN_INLINE void store_at(std::byte* row, Index item, Index n, Vec<Portable, T> v) noexcept {
  constexpr Index kItem = sizeof(typename Storage<kStorage>::Item);
  store_items<Portable, T, kStorage>(row + item * kItem, kItem, n, v);
}

template <class T>
T read(const Tensor& t, Index row) noexcept {
  T value;
  __builtin_memcpy(&value, row_at(t, row), sizeof value);
  return value;
}

template <class T>
void write(const Tensor& t, Index row, T value) noexcept {
  __builtin_memcpy(row_at(t, row), &value, sizeof value);
}

/// exp(part − whole); 0 for a part without keys.
template <class T>
T share(T part, T whole) noexcept {
  return part == -std::numeric_limits<T>::infinity() ? T(0) : std::exp(part - whole);
}

template <class T>
T log_of_sum(T a, T b) noexcept {
  const T top = a > b ? a : b, low = a > b ? b : a;
  return low == -std::numeric_limits<T>::infinity() ? top : top + std::log1p(std::exp(low - top));
}

}  // namespace

void merge_states(const State& first, const State& second, const State& merged, const Options& options) {
  with_dtype(merged.out.dtype, [&]<class T, DType kStorage>() {
    for_rows(merged.out, kRowsATask, options, [&](Range rows) {
      for (Index row = rows.begin; row < rows.end; ++row) {
        const T a = read<T>(first.lse, row), b = read<T>(second.lse, row), lse = log_of_sum(a, b);
        const T first_share = share(a, lse), second_share = share(b, lse);
        const std::byte *const x = row_at(first.out, row), *const y = row_at(second.out, row);
        std::byte* const out = row_at(merged.out, row);
        for_registers<T>(merged.out.shape[3], [&](Index i, Index n) {
          const auto sum =
              load_at<T, kStorage>(x, i, n) * first_share + load_at<T, kStorage>(y, i, n) * second_share;
          store_at<T, kStorage>(out, i, n, sum);
        });
        write(merged.lse, row, lse);
      }
    });
  });
}

void split_gradient(const Tensor& d_out, const State& merged, const State& part, const State& d_part,
                    const Options& options) {
  with_dtype(d_out.dtype, [&]<class T, DType kStorage>() {
    for_rows(d_out, kRowsATask, options, [&](Range rows) {
      for (Index row = rows.begin; row < rows.end; ++row) {
        const T weight = share(read<T>(part.lse, row), read<T>(merged.lse, row));
        const std::byte *const d = row_at(d_out, row), *const whole = row_at(merged.out, row),
                               *const own = row_at(part.out, row);
        std::byte* const to = row_at(d_part.out, row);
        Vec<Portable, T> sum{};
        for_registers<T>(d_out.shape[3], [&](Index i, Index n) {
          const auto gradient = load_at<T, kStorage>(d, i, n);
          sum += gradient * (load_at<T, kStorage>(own, i, n) - load_at<T, kStorage>(whole, i, n));
          store_at<T, kStorage>(to, i, n, gradient * weight);
        });
        write(d_part.lse, row, weight * horizontal_sum<Portable, T>(sum));
      }
    });
  });
}

namespace {

/// 1 / √(mean x² + ε)
template <class T, DType kStorage>
T inverse_rms(const std::byte* x, Index dim, double epsilon) noexcept {
  Vec<Portable, T> squares{};
  for_registers<T>(dim, [&](Index i, Index n) {
    const auto item = load_at<T, kStorage>(x, i, n);
    squares += item * item;
  });
  return 1 / std::sqrt(horizontal_sum<Portable, T>(squares) / static_cast<T>(dim) + static_cast<T>(epsilon));
}

/// One row of rms_norm_backward.  With h = x·r, r = 1 / √(mean x² + ε) and g = d_y·gain:
/// d_x = r·(g − h·mean(g·h)), d_gain += d_y·h.
template <class T, DType kStorage>
void norm_row_backward(std::byte* d, const std::byte* x, const std::byte* gain, double epsilon, Index dim,
                       double* d_gain) noexcept {
  const T r = inverse_rms<T, kStorage>(x, dim, epsilon);
  Vec<Portable, T> products{};
  for_registers<T>(dim, [&](Index i, Index n) {
    const auto h = load_at<T, kStorage>(x, i, n) * r, d_y = load_at<T, kStorage>(d, i, n);
    products += d_y * load_at<T, kStorage>(gain, i, n) * h;
    for (Index lane = 0; lane < n; ++lane) d_gain[i + lane] += double(d_y[lane]) * double(h[lane]);
  });
  const T mean = horizontal_sum<Portable, T>(products) / static_cast<T>(dim);
  for_registers<T>(dim, [&](Index i, Index n) {
    const auto h = load_at<T, kStorage>(x, i, n) * r;
    const auto g = load_at<T, kStorage>(d, i, n) * load_at<T, kStorage>(gain, i, n);
    store_at<T, kStorage>(d, i, n, (g - h * mean) * r);
  });
}

}  // namespace

void rms_norm(const Tensor& x, const Tensor& gain, double epsilon, const Tensor& y, const Options& options) {
  with_dtype(x.dtype, [&]<class T, DType kStorage>() {
    for_rows(x, kRowsATask, options, [&](Range rows) {
      const auto* const gains = static_cast<const std::byte*>(gain.data);
      for (Index row = rows.begin; row < rows.end; ++row) {
        const std::byte* const from = row_at(x, row);
        std::byte* const to = row_at(y, row);
        const T r = inverse_rms<T, kStorage>(from, x.shape[3], epsilon);
        for_registers<T>(x.shape[3], [&](Index i, Index n) {
          store_at<T, kStorage>(to, i, n,
                                load_at<T, kStorage>(from, i, n) * r * load_at<T, kStorage>(gains, i, n));
        });
      }
    });
  });
}

void rms_norm_backward(const Tensor& d_y, const Tensor& x, const Tensor& gain, double epsilon,
                       const Tensor& d_gain, const Options& options) {
  constexpr Index kMostTasks = 64;
  const Index dim = x.shape[3], rows_a_task = max(kRowsATask, ceil_div(row_count(x), kMostTasks));
  const Index tasks = ceil_div(row_count(x), rows_a_task);
  with_dtype(x.dtype, [&]<class T, DType kStorage>() {
    // Each task sums over its rows; the sums of tasks are added in their order.
    std::vector<double> sums(static_cast<std::size_t>(max(1, tasks) * dim));
    const auto* const gains = static_cast<const std::byte*>(gain.data);
    for_rows(x, rows_a_task, options, [&](Range rows) {
      double* const sum = sums.data() + rows.begin / rows_a_task * dim;
      for (Index row = rows.begin; row < rows.end; ++row) {
        norm_row_backward<T, kStorage>(row_at(d_y, row), row_at(x, row), gains, epsilon, dim, sum);
      }
    });
    for (Index i = dim; i < tasks * dim; ++i) sums[i % dim] += sums[i];
    for_registers<T>(dim, [&](Index i, Index n) {
      Vec<Portable, T> v{};
      for (Index lane = 0; lane < n; ++lane) v[lane] = static_cast<T>(sums[i + lane]);
      store_at<T, kStorage>(static_cast<std::byte*>(d_gain.data), i, n, v);
    });
  });
}

void add_rows(const Tensor& from, const Tensor& to, const Options& options) {
  with_dtype(to.dtype, [&]<class T, DType kStorage>() {
    for_rows(to, kRowsATask, options, [&](Range rows) {
      for (Index row = rows.begin; row < rows.end; ++row) {
        const std::byte* const x = row_at(from, row);
        std::byte* const y = row_at(to, row);
        for_registers<T>(to.shape[3], [&](Index i, Index n) {
          store_at<T, kStorage>(y, i, n, load_at<T, kStorage>(y, i, n) + load_at<T, kStorage>(x, i, n));
        });
      }
    });
  });
}

void sum_over_batch(const Tensor& x, const Tensor& sum) {
  with_dtype(x.dtype, [&]<class T, DType kStorage>() {
    for (Index head = 0; head < x.shape[1]; ++head) {
      for_registers<T>(x.shape[3], [&](Index i, Index n) {
        Vec<Portable, T> total{};
        for (Index entry = 0; entry < x.shape[0]; ++entry)
          total += load_at<T, kStorage>(at(x, entry, head), i, n);
        store_at<T, kStorage>(at(sum, 0, head), i, n, total);
      });
    }
  });
}

void scale_by_part(const Tensor& probabilities, const Tensor& part_lse, const Tensor& lse,
                   const Options& options) {
  with_dtype(probabilities.dtype, [&]<class T, DType kStorage>() {
    for_rows(probabilities, kRowsATask, options, [&](Range rows) {
      for (Index row = rows.begin; row < rows.end; ++row) {
        const T weight = share(read<T>(part_lse, row), read<T>(lse, row));
        std::byte* const p = row_at(probabilities, row);
        for_registers<T>(probabilities.shape[3], [&](Index i, Index n) {
          store_at<T, kStorage>(p, i, n, load_at<T, kStorage>(p, i, n) * weight);
        });
      }
    });
  });
}

void mean_over_heads(const Tensor& probabilities, const Tensor& mean, const Options& options) {
  with_dtype(mean.dtype, [&]<class T, DType kStorage>() {
    for_rows(mean, kRowsATask, options, [&](Range rows) {
      for (Index row = rows.begin; row < rows.end; ++row) {
        const Index entry = row / mean.shape[2], token = row % mean.shape[2];
        for_registers<T>(mean.shape[3], [&](Index i, Index n) {
          Vec<Portable, T> sum{};
          for (Index head = 0; head < probabilities.shape[1]; ++head) {
            sum += load_at<T, kStorage>(at(probabilities, entry, head, token), i, n);
          }
          store_at<T, kStorage>(at(mean, entry, 0, token), i, n,
                                sum / static_cast<T>(probabilities.shape[1]));
        });
      }
    });
  });
}

}  // namespace attncore
