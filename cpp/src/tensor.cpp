#include "tensor.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <numeric>

namespace attncore {

Index item_size(DType dtype) noexcept {
  switch (dtype) {
    case DType::boolean:
    case DType::i8:
    case DType::f8:
    case DType::i4:
      return 1;
    case DType::f16:
    case DType::bf16:
      return 2;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::f64:
    case DType::i64:
      return 8;
  }
  return 0;
}

const char* name(DType dtype) noexcept {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::f64:
      return "float64";
    case DType::f16:
      return "float16";
    case DType::bf16:
      return "bfloat16";
    case DType::boolean:
      return "bool";
    case DType::i32:
      return "int32";
    case DType::i64:
      return "int64";
    case DType::i8:
      return "int8";
    case DType::f8:
      return "float8_e4m3fn";
    case DType::i4:
      return "int4";
  }
  return "unknown";
}

Tensor Tensor::contiguous(const void* data, DType dtype, const std::array<Index, 4>& shape) noexcept {
  Tensor t{const_cast<void*>(data), dtype, shape, {}};
  Index stride = item_size(dtype);
  for (std::size_t axis = 4; axis-- > 0;) {
    t.stride[axis] = stride;
    if (__builtin_mul_overflow(stride, std::max<Index>(shape[axis], 1), &stride)) stride = kUnbounded;
    if (axis == 3 && dtype == DType::i4) stride = (stride + 1) / 2;
  }
  return t;
}

bool is_empty(const Tensor& t) noexcept {
  return std::find(t.shape.begin(), t.shape.end(), Index{0}) != t.shape.end();
}

std::string shape_text(const Shape& shape) {
  std::string text = "(";
  for (const Index extent : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(extent);
  return text + ")";
}

namespace {

/// From the first byte to past the last, of a tensor that is not empty.
struct Reach {
  std::uintptr_t begin = 0, end = 0;

  explicit Reach(const Tensor& t) noexcept
      : begin(reinterpret_cast<std::uintptr_t>(t.data)),
        end(begin + static_cast<std::uintptr_t>(item_size(t.dtype))) {
    for (std::size_t axis = 0; axis < 4; ++axis) {
      const Index extent = axis == 3 && t.dtype == DType::i4 ? (t.shape[axis] + 1) / 2 : t.shape[axis];
      const Index last = t.stride[axis] * (extent - 1);
      (last < 0 ? begin : end) += static_cast<std::uintptr_t>(last);
    }
  }
};

struct Axis {
  Index stride, extent;
};

/// Memory as runs of `run` bytes without gaps, at `start` plus multiples of the strides of `axes`, smallest
/// first.
struct Runs {
  std::uintptr_t start = 0;
  Index run = 0;
  std::array<Axis, 4> axes{};
  std::size_t count = 0;
  bool overlaps_itself = false;

  explicit Runs(const Tensor& t) noexcept
      : start(reinterpret_cast<std::uintptr_t>(t.data)), run(item_size(t.dtype)) {
    for (std::size_t axis = 0; axis < 4; ++axis) {
      const Index extent = axis == 3 && t.dtype == DType::i4 ? (t.shape[axis] + 1) / 2 : t.shape[axis];
      if (extent == 1) continue;
      if (t.stride[axis] < 0) start -= static_cast<std::uintptr_t>(-t.stride[axis] * (extent - 1));
      const Axis next{std::abs(t.stride[axis]), extent};
      std::size_t place = count++;
      for (; place > 0 && next.stride < axes[place - 1].stride; --place) axes[place] = axes[place - 1];
      axes[place] = next;
    }
    Index reach = run;  // from the first byte to past the last, of the axes so far
    std::size_t kept = 0;
    for (std::size_t i = 0; i < count; ++i) {
      overlaps_itself |= axes[i].stride < reach;
      if (axes[i].stride <= run) {
        run += axes[i].stride * (axes[i].extent - 1);
      } else {
        axes[kept++] = axes[i];
      }
      reach += axes[i].stride * (axes[i].extent - 1);
    }
    count = kept;
  }
};

}  // namespace

bool may_overlap(const Tensor& a, const Tensor& b) noexcept {
  if (is_empty(a) || is_empty(b)) return false;
  const Reach of_a(a), of_b(b);
  if (of_a.end <= of_b.begin || of_b.end <= of_a.begin) return false;
  const Runs x(a), y(b);
  // Interleaved views (q, k, v and out in one buffer): every run starts at `start` modulo the strides' common
  // divisor.
  Index divisor = 0;
  for (std::size_t i = 0; i < x.count; ++i) divisor = std::gcd(divisor, x.axes[i].stride);
  for (std::size_t i = 0; i < y.count; ++i) divisor = std::gcd(divisor, y.axes[i].stride);
  if (divisor == 0) return true;
  const auto modulus = static_cast<std::uintptr_t>(divisor);
  const auto y_after_x = static_cast<Index>((y.start % modulus + modulus - x.start % modulus) % modulus);
  return y_after_x < x.run || y_after_x + y.run > divisor;
}

bool may_overlap_itself(const Tensor& t) noexcept { return !is_empty(t) && Runs(t).overlaps_itself; }

void Tensors::add(Tensor& tensor, DType dtype, const Shape& shape) {
  constexpr Index kAlignment = 64;
  tensor = Tensor::contiguous(nullptr, dtype, shape);
  tensors_.emplace_back(&tensor, bytes_);
  Index bytes = 0;
  if (__builtin_mul_overflow(shape[0], tensor.stride[0], &bytes) || bytes > kFarthest - bytes_) {
    throw std::bad_alloc();
  }
  bytes_ = round_up(bytes_ + bytes, kAlignment);
}

void Tensors::reserve(Workspace& memory) {
  std::byte* const data = memory.reserve(static_cast<std::size_t>(max(bytes_, 1)));
  for (const auto& [tensor, offset] : tensors_) tensor->data = data + offset;
}

Tensor ints(const std::vector<Index>& numbers) noexcept {
  static constexpr Index kNone = 0;  // an empty list is no list that was left out
  return Tensor::contiguous(numbers.empty() ? &kNone : numbers.data(), DType::i64,
                            {static_cast<Index>(numbers.size()), 1, 1, 1});
}

Tensor tokens_of(const Tensor& t, Index entry, Index first, Index count) noexcept {
  return t.given() ? part_of(part_of(t, 0, entry, 1), 2, first, count) : t;
}

Tensor part_of(const Tensor& t, std::size_t axis, Index first, Index count) noexcept {
  Tensor part = t;
  part.data = static_cast<std::byte*>(t.data) + first * t.stride[axis];
  part.shape[axis] = count;
  return part;
}

}  // namespace attncore
