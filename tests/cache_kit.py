"""What the tests of caches share: what storage does to numbers, and comparisons with attention."""

from __future__ import annotations

from typing import Any

import numpy as np

import attncore
from kit import DTYPE_NAMES, assert_same_bits, compare_results, dtype_of
from reference import Array, plain, reference

QUANTISED = {"int8": 127, "int4": 7, "float8_e4m3fn": 448}  # and what the largest number becomes
STORAGE = [*DTYPE_NAMES, *QUANTISED]
SMALLEST_SCALE = np.float64(2.0**-126)

AnyCache = attncore.KVCache | attncore.PagedKVCache


def scales(x: Array, storage: str) -> Array:
    """The scale of each row of x, float32 in float64."""
    largest = np.abs(x.astype(np.float32)).max(axis=-1, keepdims=True).astype(np.float64)
    rounded = (largest / QUANTISED[storage]).astype(np.float32)
    below = np.nextafter(rounded, np.float32(0)).astype(np.float64)
    scale = np.maximum(rounded.astype(np.float64), SMALLEST_SCALE)
    scale = np.where(scale * QUANTISED[storage] > np.finfo(np.float32).max, below, scale)
    return np.where(largest == 0, 1, scale)


def round_to_f8(y: Array) -> Array:
    """float8_e4m3fn: 3 bits of fraction, the smallest step is 2⁻⁹; ties to even."""
    exponent = np.maximum(np.frexp(y)[1] - 1, -6)
    step = 2.0 ** (exponent - 3)
    return np.rint(y / step) * step


def stored(x: Array, storage: str) -> Array:
    """What `gather` gives back of x, (…, dim)."""
    if storage not in QUANTISED:
        compute = np.float64 if storage == "float64" else np.float32
        return x.astype(compute).astype(dtype_of(storage))
    scale = scales(x, storage)
    quotient = x.astype(np.float32).astype(np.float64) / scale
    numbers = round_to_f8(quotient) if storage == "float8_e4m3fn" else np.rint(quotient) + 0.0
    return (numbers.astype(np.float32) * scale.astype(np.float32)).astype(np.float32)


def query_dtype(storage: str) -> np.dtype[Any]:
    """One that goes with the storage: the same where there is arithmetic for it."""
    return np.dtype(np.float32) if storage in QUANTISED else dtype_of(storage)


def assert_attends(
    ours: tuple[Array, Array],
    query: Array,
    key: Array,
    value: Array,
    *,
    quantised: bool = False,
    **options: Any,
) -> None:
    """(out, lse) of one entry are those of attention on its arrays, (head, token, dim) each: to the
    bit where these are stored as they are."""
    options = {"causal": True, **options}
    out, lse = ours
    if key.dtype == query.dtype and not quantised:
        expected, expected_lse = attncore.attention(query, key, value, return_lse=True, **options)
        assert_same_bits(out, expected)
        assert_same_bits(lse, expected_lse, "lse")
        return
    k, v = (a.astype(np.float64)[None] for a in (key, value))
    exact = reference(query[None], k, v, **options)
    compare_results(out[None], lse[None], exact, plain(query[None], k, v, **options))


def make_cache(
    kind: str, batch: int, kv_heads: int, dim: int, *, page_size: int = 16, **settings: Any
) -> AnyCache:
    """A cache with entries 0 … batch − 1 and room for 2000 tokens in each."""
    if kind == "KVCache":
        return attncore.KVCache(batch, kv_heads, dim, capacity=2000, **settings)
    pages = batch * (2000 // page_size + 1)
    cache = attncore.PagedKVCache(pages, page_size, kv_heads, dim, **settings)
    assert [cache.add() for _ in range(batch)] == list(range(batch))
    return cache


KINDS = ["KVCache", "PagedKVCache"]
