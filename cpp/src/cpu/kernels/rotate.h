// Rows of tensors as numbers of the accumulation type, and their rotation by rope.
#pragma once

#include "../dtype.h"
#include "kernels.h"

namespace attncore {

template <class T>
inline constexpr DType kDType = sizeof(T) == 8 ? DType::f64 : DType::f32;

/// `count` items p[0], p[stride], … become numbers; writes up to a register more than that.
template <class Isa, class T>
void load_span(const std::byte* p, Index stride, DType dtype, Index count, T* out) noexcept {
  constexpr Index n = kWidth<Isa, T>;
  with_storage<T>(dtype, [&]<DType kStorage>() {
    for (Index i = 0; i < count; i += n) {
      store(out + i, load_items<Isa, T, kStorage>(p + i * stride, stride, min(n, count - i)));
    }
  });
}

template <class Isa, class T>
void store_span(std::byte* p, Index stride, DType dtype, Index count, const T* in) noexcept {
  constexpr Index n = kWidth<Isa, T>;
  with_storage<T>(dtype, [&]<DType kStorage>() {
    for (Index i = 0; i < count; i += n) {
      store_items<Isa, T, kStorage>(p + i * stride, stride, min(n, count - i), load<Vec<Isa, T>>(in + i));
    }
  });
}

/// run(where the first column of a head lies, head, column in the head, count, column after columns.begin) for each
/// head's part of some columns of row (batch, token).
template <class Run>
ATTN_INLINE void for_each_head(const Tensor& t, Index batch, Index token, Range columns, Run run) noexcept {
  Index head = columns.begin / t.shape[3];
  Index dim = columns.begin - head * t.shape[3];
  for (Index column = columns.begin; column < columns.end; ++head, dim = 0) {
    const Index count = min(t.shape[3] - dim, columns.end - column);
    run(at(t, batch, head, token), dim, count, column - columns.begin);
    column += count;
  }
}

/// Row `row` of a tensor as a matrix.
struct RowAt {
  Index batch, token;
  static ATTN_INLINE RowAt of(const Tensor& t, Index row) noexcept {
    if (t.shape[0] == 1) return {0, row};
    const Index batch = row / t.shape[2];
    return {batch, row - batch * t.shape[2]};
  }
};

/// Some columns of a row; writes up to a register more.
template <class Isa, class T>
void load_row(const Tensor& t, Index row, Range columns, T* out) noexcept {
  const RowAt where = RowAt::of(t, row);
  for_each_head(t, where.batch, where.token, columns,
                [&](const std::byte* head, Index dim, Index count, Index column) {
                  load_span<Isa, T>(head + dim * t.stride[3], t.stride[3], t.dtype, count, out + column);
                });
}

template <class Isa, class T>
void store_row(const Tensor& t, Index row, Range columns, const T* in) noexcept {
  const RowAt where = RowAt::of(t, row);
  for_each_head(t, where.batch, where.token, columns,
                [&](std::byte* head, Index dim, Index count, Index column) {
                  store_span<Isa, T>(head + dim * t.stride[3], t.stride[3], t.dtype, count, in + column);
                });
}

/// The rotations of some tokens: cosines and sines in the accumulation type.  Rounded once: both are taken in double.
template <class Isa, class T>
class Turns {
 public:
  /// In `memory` of so many bytes, for so many tokens at once.
  static ATTN_INLINE Index bytes(const Rotation& rotation, Index tokens = 1) noexcept {
    if (!rotation.given()) return 0;
    return 4 * rotation.pairs() * Index{sizeof(double)} + 2 * tokens * row_items(rotation) * Index{sizeof(T)};
  }

  ATTN_INLINE Turns(const Rotation& rotation, std::byte* memory) noexcept
      : rotation_(rotation),
        far_(reinterpret_cast<double*>(memory)),
        near_(far_ + 2 * rotation.pairs()),
        rows_(reinterpret_cast<T*>(near_ + 2 * rotation.pairs())),
        row_items_(row_items(rotation)) {}

  void set_position(Index position, Index token = 0) noexcept {
    const Index near_by = position & (Rotation::kNear - 1);
    const Index far_away = position - near_by;
    if (!has_far_ || far_away != far_position_) set_far(far_away);
    if (rotation_.interleaved) {
      set_near<true>(near_by, cosine(token), sine(token));
    } else {
      set_near<false>(near_by, cosine(token), sine(token));
    }
  }

  /// Rotates the first dims of a head, in place.
  void rotate(T* head, Index token = 0) const noexcept {
    if (rotation_.interleaved) return rotate_neighbours(head, cosine(token), sine(token));
    rotate_halves(head, cosine(token), sine(token));
  }

 private:
  using V = Vec<Isa, T>;
  static constexpr Index n = kWidth<Isa, T>;
  static ATTN_INLINE Index row_items(const Rotation& rotation) noexcept {
    return round_up(rotation.interleaved ? rotation.dims : rotation.pairs(), n);
  }
  ATTN_INLINE T* cosine(Index token) const noexcept { return rows_ + 2 * token * row_items_; }
  ATTN_INLINE T* sine(Index token) const noexcept { return cosine(token) + row_items_; }

  void set_far(Index position) noexcept {
    const Index pairs = rotation_.pairs();
    const auto p = static_cast<double>(position);
    for (Index i = 0; i < pairs; ++i) turn_exactly(p, rotation_.frequency[i], far_[i], far_[pairs + i]);
    far_position_ = position;
    has_far_ = true;
  }

  /// A pair's numbers stand where they are used: at both of its dims if those are neighbours.
  template <bool kInterleaved>
  void set_near(Index position, T* cosine, T* sine) noexcept {
    const Index pairs = rotation_.pairs();
    const double* near = near_;
    if (rotation_.near != nullptr) {
      near = rotation_.near + position * 2 * pairs;
    } else {
      for (Index i = 0; i < pairs; ++i) {
        turn_near(static_cast<double>(position), rotation_.frequency[i], near_[i], near_[pairs + i]);
      }
    }
    const double factor = rotation_.factor, turned = rotation_.inverse ? -factor : factor;
    for (Index i = 0; i < pairs; ++i) {
      const auto c = static_cast<T>(factor * (far_[i] * near[i] - far_[pairs + i] * near[pairs + i]));
      const auto s = static_cast<T>(turned * (far_[pairs + i] * near[i] + far_[i] * near[pairs + i]));
      if constexpr (kInterleaved) {
        cosine[2 * i] = cosine[2 * i + 1] = c;
        sine[2 * i] = -s;
        sine[2 * i + 1] = s;
      } else {
        cosine[i] = c;
        sine[i] = s;
      }
    }
  }

  static ATTN_INLINE V part(const T* p, Index count) noexcept {
    return load_items<Isa, T, kDType<T>>(reinterpret_cast<const std::byte*>(p), sizeof(T), count);
  }
  static ATTN_INLINE void put(T* p, Index count, V v) noexcept {
    store_items<Isa, T, kDType<T>>(reinterpret_cast<std::byte*>(p), sizeof(T), count, v);
  }

  void rotate_halves(T* head, const T* cosine, const T* sine) const noexcept {
    const Index half = rotation_.pairs();
    for (Index i = 0; i < half; i += n) {
      const Index count = min(n, half - i);
      const V x = part(head + i, count), y = part(head + half + i, count);
      const V c = load<V>(cosine + i), s = load<V>(sine + i);
      put(head + i, count, x * c - y * s);
      put(head + half + i, count, y * c + x * s);
    }
  }

  template <int... I>
  static ATTN_INLINE V neighbours(V v, std::integer_sequence<int, I...>) noexcept {
    return __builtin_shufflevector(v, v, (I ^ 1)...);
  }

  void rotate_neighbours(T* head, const T* cosine, const T* sine) const noexcept {
    for (Index i = 0; i < rotation_.dims; i += n) {
      const Index count = min(n, rotation_.dims - i);
      const V x = part(head + i, count);
      const V other = neighbours(x, std::make_integer_sequence<int, n>{});
      put(head + i, count, x * load<V>(cosine + i) + other * load<V>(sine + i));
    }
  }

  const Rotation& rotation_;
  double* far_;   // cosines and sines of position − position % kNear
  double* near_;  // and of the rest
  T* rows_;       // by token: cosines, then sines
  Index row_items_;
  Index far_position_ = 0;
  bool has_far_ = false;
};

/// Rows of a tensor that is rotated as it is read.
template <class Isa, class T>
class RotatedRows {
 public:
  static ATTN_INLINE Index bytes(const Tensor& t, const Rotation& rotation) noexcept {
    if (!rotation.given()) return 0;
    return Turns<Isa, T>::bytes(rotation) + round_up((t.shape[3] + kWidth<Isa, T>)*Index{sizeof(T)}, 64);
  }

  ATTN_INLINE RotatedRows(const Tensor& t, const Rotation& rotation, std::byte* memory) noexcept
      : t_(t),
        rotation_(rotation),
        head_(reinterpret_cast<T*>(memory)),
        turn_(rotation, memory + bytes(t, rotation) - Turns<Isa, T>::bytes(rotation)) {}

  /// Some columns of a row; writes up to a register more.
  void load_row(Index row, Range columns, T* out) noexcept {
    if (!rotation_.given()) return attncore::load_row<Isa, T>(t_, row, columns, out);
    const RowAt where = RowAt::of(t_, row);
    turn_.set_position(rotation_.position(where.batch, where.token));
    for_each_head(t_, where.batch, where.token, columns,
                  [&](const std::byte* head, Index dim, Index count, Index column) {
                    load_span<Isa, T>(head, t_.stride[3], t_.dtype, t_.shape[3], head_);
                    turn_.rotate(head_);
                    __builtin_memcpy(out + column, head_ + dim, static_cast<std::size_t>(count) * sizeof(T));
                  });
  }

 private:
  const Tensor& t_;
  const Rotation& rotation_;
  T* head_;  // one head of one row
  Turns<Isa, T> turn_;
};

}  // namespace attncore
