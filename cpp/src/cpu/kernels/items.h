// What products multiply, items, and where they lie.
#pragma once

#include "../tile/gemm.h"

namespace attncore {

/// Item: T itself, Bf16Pair or a Part of one.
template <class T, class Item>
inline constexpr bool kInPairs = !std::is_same_v<T, Item>;

/// Numbers of an Item that is no part, and what they are stored as.
template <class T, class Item>
inline constexpr Index kNumbers = kInPairs<T, Item> ? 2 : 1;
template <class T, class Item>
inline constexpr DType kStoredAs = kInPairs<T, Item> ? DType::bf16
                                   : sizeof(T) == 8  ? DType::f64
                                                     : DType::f32;

/// Whether `dims` numbers of each token are items where they lie.
template <class T, class Item>
ATTN_INLINE bool lies_in_items(const KeySource& source, Index dims) noexcept {
  constexpr Index kItem = sizeof(Item), n = kNumbers<T, Item>;
  const Index steps = source.token_stride | (source.pages == nullptr ? 0 : source.page_stride);
  const bool aligned =
      (reinterpret_cast<std::uintptr_t>(source.data) | static_cast<std::uintptr_t>(steps)) % kItem == 0;
  return source.storage == kStoredAs<T, Item> && source.dim_stride * n == kItem && dims % n == 0 && aligned;
}

/// Rows in the order of a product as packing takes them.
template <class T, class Item>
ATTN_INLINE KeySource source_of(Matrix<const Item> m) noexcept {
  constexpr Index kItem = sizeof(Item);
  return {reinterpret_cast<const std::byte*>(m.data), m.stride * kItem, kItem / kNumbers<T, Item>,
          kStoredAs<T, Item>};
}

}  // namespace attncore
