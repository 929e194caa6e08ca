// Few rows against keys and values straight from where they lie (decoding): these are read but once, so that memory is what
// takes the time, and packing them would double the work.
//
// A score is a dot product along dim, in the lanes of a register that are summed at the end: other sums than gemm's, so that
// which of the two a sequence takes depends on its own number of rows.
#pragma once

#include "few_rows.h"

namespace attncore {

constexpr Index kLine = 64;  // bytes that are fetched at once

/// One step of sum_lanes: of each group of 2 kHalf lanes of a, then of b, the halves are added.
template <int kHalf, class V, int... I>
ATTN_INLINE V add_halves(V a, V b, std::integer_sequence<int, I...>) noexcept {
  return __builtin_shufflevector(a, b, (I / kHalf * 2 * kHalf + I % kHalf)...) +
         __builtin_shufflevector(a, b, (I / kHalf * 2 * kHalf + kHalf + I % kHalf)...);
}

/// Lane i of the result is the sum of v[i]'s lanes, i < kCount, a power of two; halves are added to halves whatever kCount is.
template <int kLanes, int kCount, int kHalf = kLanes / 2, class V>
ATTN_INLINE V sum_lanes(const V* v) noexcept {
  using Lanes = std::make_integer_sequence<int, kLanes>;
  constexpr int kLeft = max(1, kCount / 2);
  V next[kLeft];
  for (int i = 0; i < kLeft; ++i) {
    next[i] = add_halves<kHalf>(v[min(2 * i, kCount - 1)], v[min(2 * i + 1, kCount - 1)], Lanes{});
  }
  if constexpr (kHalf == 1) {
    return next[0];
  } else {
    return sum_lanes<kLanes, kLeft, kHalf / 2>(next);
  }
}

/// Sums that stay in registers, beside what they are made of.
template <class Isa>
inline constexpr int kFewSums = Isa::kRows * Isa::kColumns > 16 ? 16 : 8;

/// One store each: for `{}` g++ 12 calls upon memset.
template <class V, int kRows, int kColumns>
ATTN_INLINE void clear(V (&sum)[kRows][kColumns]) noexcept {
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) sum[i][j] = V{};
  }
}

/// kRows rows of C over kKeys keys from `key` on, before `end`: dot products of A's rows (dim) with theirs.
template <class Isa, class T, DType kStorage, int kRows, int kKeys, class Finish>
ATTN_INLINE void dot_block(T* const* c, const FewRows<const T, kRows>& a, const Tokens<Isa, T>& b, Index rows,
                           Index key, Index end, Index depth, Finish finish) noexcept {
  using V = Vec<Isa, T>;
  constexpr Index n = kWidth<Isa, T>, kItem = sizeof(typename Storage<kStorage>::Item);
  const std::byte *in[kKeys], *next[kKeys];
  for (Index i = 0; i < kKeys; ++i) {
    in[i] = b.at[min(key + i, end - 1)];
    next[i] = b.ahead[min(key + i, end - 1)];
  }
  V sum[kRows][kKeys];
  clear(sum);
  const auto add = [&](Index k, auto load_a, auto load_b) {
    V items[kKeys];
    for (int i = 0; i < kKeys; ++i) {
      __builtin_prefetch(next[i] + item_offset<kStorage>(k, kItem));
      items[i] = load_b(in[i] + item_offset<kStorage>(k, kItem));
    }
    for (int row = 0; row < kRows; ++row) {
      const V x = load_a(a.row[row] + k);
      for (int i = 0; i < kKeys; ++i) sum[row][i] = x * items[i] + sum[row][i];
    }
  };
  Index k = 0;
  using Pair = LoadPair<Isa, T, kStorage>;
  if constexpr (Pair::kGiven) {
    for (; k + 2 * n <= depth; k += 2 * n) {  // A's rows are split alike: split_pairs
      V even[kKeys], odd[kKeys];
      for (int i = 0; i < kKeys; ++i) {
        __builtin_prefetch(next[i] + k * kItem);
        Pair::load(in[i] + k * kItem, even[i], odd[i]);
      }
      for (int row = 0; row < kRows; ++row) {
        const V x = load<V>(a.row[row] + k), y = load<V>(a.row[row] + k + n);
        for (int i = 0; i < kKeys; ++i) sum[row][i] = x * even[i] + sum[row][i];
        for (int i = 0; i < kKeys; ++i) sum[row][i] = y * odd[i] + sum[row][i];
      }
    }
  }
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
  store(sums, finish(sums, sum_lanes<kWidth<Isa, T>, kRows * kKeys>(&sum[0][0]), 0));
  for (Index row = 0; row < rows; ++row) {
    __builtin_memcpy(c[row] + key, sums + row * kKeys, kKeys * sizeof(T));
  }
}

/// Whether dot_few_rows takes rows of A that split_pairs has been over.
template <class Isa, class T>
ATTN_INLINE bool takes_pairs(DType storage) noexcept {
  return with_key_storage<T>(storage, []<DType kStorage>() { return LoadPair<Isa, T, kStorage>::kGiven; });
}

/// Of each two registers of a row, the even elements and the odd ones.
template <class Isa, class T>
ATTN_INLINE void split_pairs(T* row, Index depth) noexcept {
  using V = Vec<Isa, T>;
  constexpr Index n = kWidth<Isa, T>;
  using Lanes = std::make_integer_sequence<int, kWidth<Isa, T>>;
  for (Index k = 0; k + 2 * n <= depth; k += 2 * n) {
    const V a = load<V>(row + k), b = load<V>(row + k + n);
    store(row + k, every_second<false>(a, b, Lanes{}));
    store(row + k + n, every_second<true>(a, b, Lanes{}));
  }
}

/// C (rows, keys) = finish(A (rows, depth) · Bᵀ); C has room for whole registers of keys.
template <class Isa, class T, class Finish>
void dot_few_rows(const RowList<T>& c, const RowList<const T>& a, const Tokens<Isa, T>& b, DType storage,
                  Index keys, Index depth, Finish finish) noexcept {
  with_key_storage<T>(storage, [&]<DType kStorage>() {
    with_rows<Isa, T>(a.size, [&]<Index kRows>() {
      constexpr Index kKeys = max(Index{1}, min(4, min(kFewSums<Isa>, kWidth<Isa, T>) / kRows));
      for (Index row = 0; row < a.size; row += kRows) {
        const FewRows<const T, kRows> of_a(a, row);
        for (Index key = 0; key < keys; key += kKeys) {
          dot_block<Isa, T, kStorage, kRows, kKeys>(c.at + row, of_a, b, min(kRows, a.size - row), key, keys,
                                                    depth, finish);
        }
      }
    });
  });
}

/// kRows × kColumns registers of C from `column` on, a single one of which may have but `last` items: Σ over the keys.  False where a sum
/// is not finite: nothing is stored then.
template <class Isa, class T, DType kStorage, int kRows, int kColumns, class Finish>
ATTN_INLINE bool add_strip(T* const* c, const FewRows<const T, kRows>& a, const Tokens<Isa, T>& b, Index keys,
                           Index column, Index rows, Index last, Finish finish) noexcept {
  using V = Vec<Isa, T>;
  constexpr Index n = kWidth<Isa, T>, kItem = sizeof(typename Storage<kStorage>::Item);
  using Pair = LoadPair<Isa, T, kStorage>;
  constexpr bool kPairs = Pair::kGiven && kColumns % 2 == 0;
  const Index offset = item_offset<kStorage>(column, kItem);
  V sum[kRows][kColumns];
  clear(sum);
  for (Index k = 0; k < keys; ++k) {
    const std::byte *const in = b.at[k] + offset, *const next = b.ahead[k] + offset;
    V items[kColumns];
    for (int j = 0; j < kColumns; j += kPairs ? 2 : 1) {
      const Index at = item_offset<kStorage>(j * n, kItem);
      if (at % kLine == 0) __builtin_prefetch(next + at);
      if constexpr (kPairs) {
        Pair::load(in + at, items[j], items[j + 1]);
      } else {
        items[j] = kColumns == 1 && last < n ? load_items<Isa, T, kStorage>(in + at, kItem, last)
                                             : Widen<Isa, T, kStorage>::load(in + at);
      }
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
  using Lanes = std::make_integer_sequence<int, kWidth<Isa, T>>;
  for (Index row = 0; row < rows; ++row) {
    for (int j = 0; j < kColumns; ++j) {
      V total = sum[row][j];
      if constexpr (kPairs) {
        const V even = sum[row][j - j % 2], odd = sum[row][j - j % 2 + 1];
        total =
            j % 2 == 0 ? interleave<false, T>(even, odd, Lanes{}) : interleave<true, T>(even, odd, Lanes{});
      }
      T* const out = c[row] + column + j * n;
      store(out, finish(out, total, row));
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
void add_few_rows(const RowList<T>& c, const RowList<const T>& a, const Tokens<Isa, T>& b, DType storage,
                  Index keys, Index columns, Finish finish) noexcept {
  constexpr Index n = kWidth<Isa, T>;
  with_key_storage<T>(storage, [&]<DType kStorage>() {
    with_rows<Isa, T>(a.size, [&]<Index kRows>() {
      constexpr int kColumns = max(1, min(8, kFewSums<Isa> / kRows));
      for (Index row = 0; row < a.size; row += kRows) {
        const Index rows = min(kRows, a.size - row);
        const FewRows<const T, kRows> of_a(a, row);
        const auto finish_row = [&](const T* p, Vec<Isa, T> sum, Index i) { return finish(p, sum, row + i); };
        const auto add = [&]<int kRegisters>(Index column) {
          const Index last = min(n, columns - column - (kRegisters - 1) * n);
          if (add_strip<Isa, T, kStorage, kRows, kRegisters>(c.at + row, of_a, b, keys, column, rows, last,
                                                             finish_row)) {
            return;
          }
          for (Index at = column; at < column + kRegisters * n; at += n) {
            add_visible<Isa, T, kStorage>(c.at + row, a.at + row, b.at, keys, at, rows, min(n, columns - at),
                                          finish_row);
          }
        };
        Index column = 0;
        const auto add_strips = [&]<int kRegisters>() {
          if constexpr (kRegisters <= kColumns) {
            for (; columns - column >= kRegisters * n; column += kRegisters * n) {
              add.template operator()<kRegisters>(column);
            }
          }
        };
        add_strips.template operator()<8>();
        add_strips.template operator()<4>();
        add_strips.template operator()<2>();
        for (; column < columns; column += n) add.template operator()<1>(column);
      }
    });
  });
}

}  // namespace attncore
