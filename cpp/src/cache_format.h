// Rows of numbers as caches store them: rounded to a float, or as small numbers with a common factor.  Tensors here are
// (1, head, token, dim), of one shape.
#pragma once

#include "call.h"

namespace attncore {

/// Whether a dtype of storage has a factor for each (token, head).
[[nodiscard]] constexpr bool is_quantised(DType dtype) noexcept {
  return dtype == DType::i8 || dtype == DType::f8 || dtype == DType::i4;
}

/// Of `dim` numbers without gaps.
[[nodiscard]] Index row_bytes(DType dtype, Index dim) noexcept;

/// To the same dtype; rows have no gaps.
void copy_rows(const Tensor& from, const Tensor& to) noexcept;

/// Floats to floats.
void convert(const Tensor& from, const Tensor& to);

/// A row that cannot be stored.
struct BadRow {
  Index head = 0, token = 0;
};

/// The error that says so; `row` counts from token `first` of those that come.
[[noreturn]] void reject_row(const char* argument, Index entry, const BadRow& row, Index first, DType dtype);

/// Floats to i8, i4 or f8, and their factors.  Ends at a row with a NaN or an infinity and returns it.
[[nodiscard]] std::optional<BadRow> quantise(const Tensor& from, const Tensor& to, const Tensor& scale);

/// i8, i4 or f8 to floats.
void dequantise(const Tensor& from, const Tensor& scale, const Tensor& to);

}  // namespace attncore
