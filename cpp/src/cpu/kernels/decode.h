// Few rows against keys and values straight from where they lie (decoding): these are read but once, so that memory is what
// takes the time, and packing them would double the work.
//
// A score is a dot product along dim, in the lanes of a register that are summed at the end: other sums than gemm's, so that
// which of the two a sequence takes depends on its own number of rows.
#pragma once

#include "../tile/gemm.h"

namespace attncore {

inline constexpr Index kDirectRows =
    8;  // of a sequence and KV head: up to here, packing costs more than it saves

/// Where the tokens of a key tile stand, their items beside each other.
template <class Isa, class T>
struct Tokens {
  static constexpr Index kKeys = Isa::template kKeyTile<T>;
  const std::byte* at[kKeys];

  /// Where the tokens `keys` lie; those from `end` on are as the one before.
  void find(const KeySource& source, Range keys, Index end) noexcept {
    const Index last = max(0, min(keys.end, end) - 1 - keys.begin);
    source.each_token(min(keys.begin, end - 1), last + 1,
                      [&](Index i, const std::byte* token) { at[i] = token; });
    for (Index i = last + 1; i < keys.size(); ++i) at[i] = at[last];
  }

  /// The same, but their items stand beside each other: in copies, in `room`, if they do not lie so.
  void find(const KeySource& source, Range keys, Index dims, std::byte* room) noexcept {
    find(source, keys, keys.end);
    with_key_storage<T>(source.storage, [&]<DType kStorage>() {
      constexpr Index kItem = sizeof(typename Storage<kStorage>::Item);
      if (source.dim_stride == kItem || kStorage == DType::i4) return;
      for (Index i = 0; i < keys.size(); ++i) {
        std::byte* const copy = room + i * dims * kItem;
        for (Index dim = 0; dim < dims; ++dim) {
          __builtin_memcpy(copy + dim * kItem, at[i] + dim * source.dim_stride, kItem);
        }
        at[i] = copy;
      }
    });
  }
};

/// run.template operator()<kRows>() with kRows a power of two, at most the lanes of a register: the rows past `rows` are
/// copies of the last.
template <class Isa, class T, class Run>
ATTN_INLINE void with_rows(Index rows, Run run) noexcept {
  constexpr Index n = kWidth<Isa, T>;
  if (rows == 1) return run.template operator()<1>();
  if (rows == 2 || n == 2) return run.template operator()<2>();
  if (rows <= 4 || n == 4) return run.template operator()<min(4, n)>();
  run.template operator()<min(8, n)>();
}

/// Rows of one matrix, or of several.
template <class T>
struct RowList {
  T* at[kDirectRows];
  Index size = 0;
  ATTN_INLINE void add(T* row) noexcept { at[size++] = row; }
};

/// kRows rows of a list from `first` on; those past its end are copies of the last.
template <class T, int kRows>
struct FewRows {
  T* row[kRows];
  ATTN_INLINE FewRows(const RowList<T>& a, Index first) noexcept {
    for (Index i = 0; i < kRows; ++i) row[i] = a.at[min(first + i, a.size - 1)];
  }
};

/// One step of sum_lanes: of each group of 2 kHalf lanes of a, then of b, the halves are added.
template <int kHalf, class V, int... I>
ATTN_INLINE V add_halves(V a, V b, std::integer_sequence<int, I...>) noexcept {
  return __builtin_shufflevector(a, b, (I / kHalf * 2 * kHalf + I % kHalf)...) +
         __builtin_shufflevector(a, b, (I / kHalf * 2 * kHalf + kHalf + I % kHalf)...);
}

/// Lane i of the result is the sum of v[i]'s lanes.
template <int kLanes, int kHalf, class V>
ATTN_INLINE V sum_lanes(const V* v) noexcept {
  using Lanes = std::make_integer_sequence<int, kLanes>;
  if constexpr (kHalf == kLanes / 2) {
    return add_halves<kHalf>(v[0], v[1], Lanes{});
  } else {
    constexpr int kEach = kLanes / 2 / kHalf;  // registers in each half
    return add_halves<kHalf>(sum_lanes<kLanes, 2 * kHalf>(v), sum_lanes<kLanes, 2 * kHalf>(v + kEach),
                             Lanes{});
  }
}

/// kRows rows of C over as many keys as fill a register, `keys` of which exist: dot products of A's rows (dim) with theirs.
/// The same bytes of the tokens `ahead` are fetched meanwhile.
template <class Isa, class T, DType kStorage, int kRows, class Finish>
ATTN_INLINE void dot_block(T* const* c, const FewRows<const T, kRows>& a, const std::byte* const* b,
                           const std::byte* const* ahead, Index rows, Range keys, Index depth,
                           Finish finish) noexcept {
  using V = Vec<Isa, T>;
  constexpr Index n = kWidth<Isa, T>, kItem = sizeof(typename Storage<kStorage>::Item);
  constexpr int kKeys = kWidth<Isa, T> / kRows;
  const std::byte *in[kKeys], *next[kKeys];
  for (Index key = 0; key < kKeys; ++key) {
    in[key] = b[min(keys.begin + key, keys.end - 1)];
    next[key] = ahead[min(keys.begin + key, keys.end - 1)];
  }
  V sum[kRows * kKeys]{};
  const auto add = [&](Index k, auto load_a, auto load_b) {
    V items[kKeys];
    for (Index key = 0; key < kKeys; ++key) {
      items[key] = load_b(in[key] + item_offset<kStorage>(k, kItem));
      __builtin_prefetch(next[key] + item_offset<kStorage>(k, kItem), 0, 2);
    }
    for (int row = 0; row < kRows; ++row) {
      const V x = load_a(a.row[row] + k);
      for (int key = 0; key < kKeys; ++key) sum[row * kKeys + key] = x * items[key] + sum[row * kKeys + key];
    }
  };
  Index k = 0;
  for (; k + n <= depth; k += n) {
    add(
        k, [](const T* p) { return load<V>(p); },
        [](const std::byte* p) { return Widen<Isa, T, kStorage>::load(p); });
  }
  if (k < depth) {
    const auto load_rest = [&](const T* p) {
      V v{};
      __builtin_memcpy(&v, p, static_cast<std::size_t>(depth - k) * sizeof(T));
      return v;
    };
    add(k, load_rest, [&](const std::byte* p) { return load_items<Isa, T, kStorage>(p, kItem, depth - k); });
  }
  alignas(Isa::kBytes) T sums[n];
  store(sums, finish(sums, sum_lanes<kWidth<Isa, T>, 1>(sum), 0));
  for (Index row = 0; row < rows; ++row) {
    __builtin_memcpy(c[row] + keys.begin, sums + row * kKeys, kKeys * sizeof(T));
  }
}

/// C (rows, keys) = finish(A (rows, depth) · Bᵀ); C has room for whole registers of keys.
template <class Isa, class T, class Finish>
void dot_few_rows(const RowList<T>& c, const RowList<const T>& a, const Tokens<Isa, T>& b,
                  const Tokens<Isa, T>& ahead, DType storage, Index keys, Index depth,
                  Finish finish) noexcept {
  with_key_storage<T>(storage, [&]<DType kStorage>() {
    with_rows<Isa, T>(a.size, [&]<Index kRows>() {
      constexpr Index kKeys = kWidth<Isa, T> / kRows;
      for (Index row = 0; row < a.size; row += kRows) {
        const FewRows<const T, kRows> of_a(a, row);
        for (Index key = 0; key < keys; key += kKeys) {
          dot_block<Isa, T, kStorage, kRows>(c.at + row, of_a, b.at, ahead.at, min(kRows, a.size - row),
                                             {key, min(key + kKeys, keys)}, depth, finish);
        }
      }
    });
  });
}

/// kRows × kColumns registers of C from `column` on, the last of which has `last` items: Σ over the keys.  False where a sum
/// is not finite: nothing is stored then.
template <class Isa, class T, DType kStorage, int kRows, int kColumns, class Finish>
ATTN_INLINE bool add_strip(T* const* c, const FewRows<const T, kRows>& a, const std::byte* const* b,
                           const std::byte* const* ahead, Index keys, Index column, Index rows, Index last,
                           Finish finish) noexcept {
  using V = Vec<Isa, T>;
  constexpr Index n = kWidth<Isa, T>, kItem = sizeof(typename Storage<kStorage>::Item);
  const Index offset = item_offset<kStorage>(column, kItem);
  V sum[kRows][kColumns]{};
  for (Index k = 0; k < keys; ++k) {
    const std::byte* const in = b[k] + offset;
    V items[kColumns];
    for (int j = 0; j < kColumns; ++j) {
      const std::byte* const p = in + item_offset<kStorage>(j * n, kItem);
      items[j] = j + 1 == kColumns && last < n ? load_items<Isa, T, kStorage>(p, kItem, last)
                                               : Widen<Isa, T, kStorage>::load(p);
      __builtin_prefetch(ahead[k] + (p - b[k]), 0, 2);
    }
    for (int row = 0; row < kRows; ++row) {
      const V x = broadcast<V>(a.row[row][k]);
      for (int j = 0; j < kColumns; ++j) sum[row][j] = x * items[j] + sum[row][j];
    }
  }
  V zero{};  // or NaN
  for (int row = 0; row < kRows; ++row) {
    for (int j = 0; j < kColumns; ++j) zero += sum[row][j] * T{0};
  }
  if (horizontal_sum<Isa, T>(zero) != 0) return false;
  for (Index row = 0; row < rows; ++row) {
    for (int j = 0; j < kColumns; ++j) {
      T* const out = c[row] + column + j * n;
      store(out, finish(out, sum[row][j], row));
    }
  }
  return true;
}

/// A register of columns, without the terms of hidden pairs (gemm_of_visible).
template <class Isa, class T, DType kStorage, class Finish>
void add_visible(T* const* c, const T* const* a, const std::byte* const* b, Index keys, Index column,
                 Index rows, Index last, Finish finish) noexcept {
  using V = Vec<Isa, T>;
  constexpr Index kItem = sizeof(typename Storage<kStorage>::Item);
  for (Index row = 0; row < rows; ++row) {
    V sum{};
    for (Index k = 0; k < keys; ++k) {
      const T weight = a[row][k];
      if (is_hidden_mark(weight)) continue;
      const std::byte* const p = b[k] + item_offset<kStorage>(column, kItem);
      sum = broadcast<V>(weight) * load_items<Isa, T, kStorage>(p, kItem, last) + sum;
    }
    T* const out = c[row] + column;
    store(out, finish(out, sum, row));
  }
}

/// C (rows, columns) = finish(C, A (rows, keys) · B).  Hidden pairs are marked in A.
template <class Isa, class T, class Finish>
void add_few_rows(const RowList<T>& c, const RowList<const T>& a, const Tokens<Isa, T>& b,
                  const Tokens<Isa, T>& ahead, DType storage, Index keys, Index columns,
                  Finish finish) noexcept {
  constexpr Index n = kWidth<Isa, T>;
  with_key_storage<T>(storage, [&]<DType kStorage>() {
    with_rows<Isa, T>(a.size, [&]<Index kRows>() {
      constexpr int kColumns = max(1, min(8, n / kRows));
      for (Index row = 0; row < a.size; row += kRows) {
        const Index rows = min(kRows, a.size - row);
        const FewRows<const T, kRows> of_a(a, row);
        const auto finish_row = [&](const T* p, Vec<Isa, T> sum, Index i) { return finish(p, sum, row + i); };
        const auto add = [&]<int kRegisters>(Index column) {
          const Index last = min(n, columns - column - (kRegisters - 1) * n);
          if (add_strip<Isa, T, kStorage, kRows, kRegisters>(c.at + row, of_a, b.at, ahead.at, keys, column,
                                                             rows, last, finish_row)) {
            return;
          }
          for (Index at = column; at < column + kRegisters * n; at += n) {
            add_visible<Isa, T, kStorage>(c.at + row, a.at + row, b.at, keys, at, rows, min(n, columns - at),
                                          finish_row);
          }
        };
        Index column = 0;
        for (; columns - column > (kColumns - 1) * n; column += kColumns * n) {
          add.template operator()<kColumns>(column);
        }
        for (; column < columns; column += n) add.template operator()<1>(column);
      }
    });
  });
}

}  // namespace attncore
