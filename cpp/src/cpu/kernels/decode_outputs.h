// Decoding's other product: the weights of a few rows with values where they lie (decode_scores.h says why).
#pragma once

#include "few_rows.h"

namespace attncore {

/// How C's rows begin, as sums over the keys before, and where they end.
template <class T>
struct StripRows {
  T* const* c;
  const T* const* before;  // none: 0

  template <class V>
  [[nodiscard]] ATTN_INLINE V begin(Index row, Index column) const noexcept {
    return before != nullptr ? load<V>(before[row] + column) : V{};
  }
};

/// kRows × kColumns registers of C from `column` on, a single one of which may have but `last` items: Σ over the keys.  False where a sum
/// is not finite: nothing is stored then.  Tokens are fetched meanwhile.
template <class Isa, class T, class Item, Index kStride, DType kStorage, int kRows, int kColumns,
          class Finish>
ATTN_INLINE bool add_strip(StripRows<T> c, const Item* a, TokenWalk b, Index keys, Index column, Index rows,
                           Index last, Fetching& fetching, Finish finish) noexcept {
  using V = Vec<Isa, T>;
  constexpr Index n = kWidth<Isa, T>, kItem = sizeof(typename Storage<kStorage>::Item);
  using Pair = LoadPair<Isa, T, kStorage>;
  constexpr bool kTwo = kInPairs<T, Item>;  // keys at a time
  constexpr bool kPairs = Pair::kGiven && kColumns % 2 == 0 && !kTwo;
  constexpr Index kFetched = item_offset<kStorage>(kColumns * n, kItem);  // of each token
  const Index offset = item_offset<kStorage>(column, kItem);
  using Lanes = std::make_integer_sequence<int, kWidth<Isa, T>>;
  V sum[kRows][kColumns];
  clear(sum);
  for (int row = 0; c.before != nullptr && row < kRows; ++row) {
    for (int j = 0; j < kColumns; ++j) sum[row][j] = c.template begin<V>(min(row, rows - 1), column + j * n);
    for (int j = 0; kPairs && j < kColumns; j += 2) {
      const V low = sum[row][j], high = sum[row][j + 1];
      sum[row][j] = every_second<false>(low, high, Lanes{});
      sum[row][j + 1] = every_second<true>(low, high, Lanes{});
    }
  }
  const auto add = [&](const Item* weights, const std::byte* in, const std::byte* second) {
    Vec<Isa, Item> items[kColumns];
    for (int j = 0; j < kColumns; j += kPairs || kTwo ? 2 : 1) {
      const Index at = item_offset<kStorage>(j * n, kItem);
      if constexpr (kTwo) {
        if constexpr (kColumns > 1) {
          LoadPairs<Isa, kStorage>::pair_up(in + at, second + at, items[j], items[j + 1]);
        } else {
          Vec<Isa, Item> beyond;
          pair_up<Isa>(load_pairs<Isa, kStorage>(in + at, kItem, last),
                       load_pairs<Isa, kStorage>(second + at, kItem, last), items[j], beyond);
        }
      } else if constexpr (kPairs) {
        Pair::load(in + at, items[j], items[j + 1]);
      } else {
        items[j] = kColumns == 1 && last < n ? load_items<Isa, T, kStorage>(in + at, kItem, last)
                                             : Widen<Isa, T, kStorage>::load(in + at);
      }
    }
    for (int row = 0; row < kRows; ++row) {
      const auto x = broadcast<Vec<Isa, Item>>(weights[row * kStride]);
      for (int j = 0; j < kColumns; ++j) sum[row][j] = multiply_add<Isa>(x, items[j], sum[row][j]);
    }
  };
  constexpr Index kTokens = kNumbers<T, Item>;
  for (const Item* const end = a + depth_of<T, Item>(keys); a < end;) {
    Index terms = min(b.run(), fetching.template run<kFetched>()) / kTokens;
    if (terms == 0) {  // a pair of tokens that do not lie side by side, or are fetched so
      const std::byte *const in = b.next() + offset, *const second = b.next() + offset;
      for (int i = 0; i < kTokens; ++i)
        fetching.template begin<kFetched>(1), fetching.template step<kFetched>();
      add(a++, in, second);
      continue;
    }
    const Index stride = b.stride();
    fetching.template begin<kFetched>(terms * kTokens);
    for (const std::byte* in = b.take(terms * kTokens) + offset; terms > 0; --terms, in += kTokens * stride) {
      for (int i = 0; i < kTokens; ++i) fetching.template step<kFetched>();
      add(a++, in, in + stride);
    }
  }
  constexpr int kSums = kRows * kColumns;
  V zero[4]{};  // or NaN
  each_of<kSums>([&](auto i) {
    const V one = sum[i / kColumns][i % kColumns];
    zero[i % 4] += one - one;
  });
  if (horizontal_sum<Isa, T>((zero[0] + zero[1]) + (zero[2] + zero[3])) != 0) return false;
  each_of<kSums>([&](auto i) {
    constexpr int row = i / kColumns, j = i % kColumns;
    if (row >= rows) return;
    V total = sum[row][j];
    if constexpr (kPairs) {
      const V even = sum[row][j - j % 2], odd = sum[row][j - j % 2 + 1];
      total = interleave<j % 2 != 0, T>(even, odd, Lanes{});
    }
    T* const out = c.c[row] + column + j * n;
    store(out, finish(out, total, row));
  });
  return true;
}

/// A register of columns, without the terms of hidden pairs (gemm_of_visible).
template <class Isa, class T, class Item, Index kStride, DType kStorage, class Finish>
void add_visible(StripRows<T> c, const Item* a, const TokenWalk& b, Index keys, Index column, Index rows,
                 Index last, Finish finish) noexcept {
  using V = Vec<Isa, T>;
  constexpr Index kItem = sizeof(typename Storage<kStorage>::Item);
  const Index offset = item_offset<kStorage>(column, kItem);
  for (Index row = 0; row < rows; ++row) {
    V sum = c.template begin<V>(row, column);
    TokenWalk walk = b;
    for (Index k = 0; k < depth_of<T, Item>(keys); ++k) {
      const std::byte* const in = walk.next() + offset;
      Vec<Isa, Item> items;
      if constexpr (kInPairs<T, Item>) {
        Vec<Isa, Item> beyond;
        pair_up<Isa>(load_pairs<Isa, kStorage>(in, kItem, last),
                     load_pairs<Isa, kStorage>(walk.next() + offset, kItem, last), items, beyond);
      } else {
        items = load_items<Isa, T, kStorage>(in, kItem, last);
      }
      sum = VisibleTerm<Isa, Item>::add(a[row * kStride + k], items, sum);
    }
    T* const out = c.c[row] + column;
    store(out, finish(out, sum, row));
  }
}

/// How many strips so many columns are, of at most `most` registers of n, a power of two.
ATTN_INLINE Index strips_of(Index columns, Index n, int most) noexcept {
  const Index whole = columns / n;
  return whole / most + __builtin_popcountll(static_cast<unsigned long long>(whole % most)) +
         (columns % n > 0 ? 1 : 0);
}

/// C (rows, columns) = finish(C, before + A (rows, keys) · B).  Hidden pairs are marked in A, whose rows past C's are zeros.
template <class Isa, class T, class Item, Index kStride, class Finish>
void add_few_rows(const RowList<T>& c, const T* const* before, const Item* a, const Tokens<Isa, T>& b,
                  DType storage, Index keys, Index columns, Finish finish) noexcept {
  constexpr Index n = kWidth<Isa, T>;
  with_token_storage<T, Item>(storage, [&]<DType kStorage>() {
    with_rows<Isa, T>(c.size, [&]<Index kRows>() {
      constexpr int kColumns = max(1, min(8, kFewSums<Isa> / kRows));
      constexpr Index kItem = sizeof(typename Storage<kStorage>::Item);
      const Index strips = ceil_div(c.size, kRows) * strips_of(columns, n, kColumns);
      Fetching fetching(strips == 1 ? b.pieces_ahead() : b.next_pieces(),
                        item_offset<kStorage>(columns, kItem));
      const auto add = [&]<int kRegisters>(Index column) {
        const Index last = min(n, columns - column - (kRegisters - 1) * n);
        for (Index row = 0; row < c.size; row += kRows) {
          const Index rows = min(kRows, c.size - row);
          const StripRows<T> of_c{c.at + row, before != nullptr ? before + row : nullptr};
          const Item* const of_a = a + row * kStride;
          fetching.pause(row > 0);
          const auto finish_row = [&](const T* p, Vec<Isa, T> sum, Index i) {
            return finish(p, sum, row + i);
          };
          if (add_strip<Isa, T, Item, kStride, kStorage, kRows, kRegisters>(
                  of_c, of_a, b.read, keys, column, rows, last, fetching, finish_row)) {
            continue;
          }
          for (Index at = column; at < column + kRegisters * n; at += n) {
            add_visible<Isa, T, Item, kStride, kStorage>(of_c, of_a, b.read, keys, at, rows,
                                                         min(n, columns - at), finish_row);
          }
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
    });
  });
}

}  // namespace attncore
