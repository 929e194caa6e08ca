"""Pages of other dtypes than queries: how they are stored, and what they hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kit import compare_results, dtype_of, inputs
from kit_paged import Paged, into_pages
from reference import Array, plain, reference

ml_dtypes = pytest.importorskip("ml_dtypes")
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)

STORED = ["float32", "float16", "bfloat16", "int8", "float8_e4m3fn", "int4"]
QUANTISED = STORED[3:]
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "int4": 7.0}


def packed(numbers: Array) -> Array:
    """int4 in −8 … 7: two in a byte, the first in its low half."""
    halves = numbers.astype(np.uint8) & 15
    both: Array = halves[..., ::2] | halves[..., 1::2] << 4
    return both


def unpacked(both: Array) -> Array:
    """As float32."""
    halves = np.stack([both & 15, both >> 4], axis=-1).astype(np.int8)
    return (
        np.where(halves > 7, halves - 16, halves).reshape(*both.shape[:-1], -1).astype(np.float32)
    )


def store(floats: Array, name: str) -> Array:
    if name == "int4":
        return packed(np.rint(floats))
    dtype = FLOAT8 if name == "float8_e4m3fn" else np.dtype(np.int8) if name == "int8" else None
    return floats.astype(dtype_of(name) if dtype is None else dtype)


def restore(stored: Array) -> Array:
    return unpacked(stored) if stored.dtype == np.uint8 else stored.astype(np.float32)


def scale_for(name: str, of: Array) -> Array:
    scale: Array = (np.abs(of).max(axis=-1) / LARGEST[name]).astype(np.float32)
    return np.where(scale == 0, np.float32(1), scale)


def stored_pages(paged: Paged, names: tuple[str, str]) -> tuple[Paged, dict[str, Array]]:
    """The same pages in other dtypes: what these hold once gathered, and their scales."""
    pools: dict[str, Array] = {}
    changed: dict[str, Any] = {}
    safe = np.clip(paged.block_table, 0, len(paged.key_pages) - 1)
    for what, name in zip(("key", "value"), names, strict=True):
        pool = getattr(paged, f"{what}_pages")
        scaled = pool
        if name in QUANTISED:
            scale = scale_for(name, pool)
            pools[f"{what}_scale"] = scale
            scaled = pool / scale[..., None]
        stored = store(scaled, name)
        exact = restore(stored).astype(np.float64)
        if name in QUANTISED:
            exact *= pools[f"{what}_scale"][..., None]
        gathered = exact[safe]
        gathered = gathered.reshape(len(safe), -1, *gathered.shape[3:]).swapaxes(1, 2)
        changed |= {f"{what}_pages": stored, what: gathered}
    return replace(paged, **changed), pools


def check(query: Array, paged: Paged, scales: dict[str, Array], **options: Any) -> None:
    """Against exact attention to what is stored."""
    out, lse = paged.attend(query, **options, **scales)
    assert out.dtype == query.dtype
    options["key_lengths"] = paged.key_lengths
    exact = reference(query, paged.key, paged.value, **options)
    kind = np.float32 if query.dtype != np.float64 else np.float64
    plainly = plain(query, paged.key.astype(kind), paged.value.astype(kind), **options)
    compare_results(out, lse, exact, plainly)


def make(
    rng: np.random.Generator, names: tuple[str, str], queries: int = 3, **sizes: Any
) -> tuple[Array, Paged, dict[str, Array]]:
    lengths = sizes.pop("lengths", [150, 33])
    query_dtype = sizes.pop("dtype", np.float32)
    page_size = sizes.pop("page_size", 16)
    q, k, v = inputs(rng, queries, max(lengths), batch=len(lengths), **sizes)
    paged = into_pages(rng, k, v, lengths, page_size, poison=0, garbage=10**9)
    return q.astype(query_dtype), *stored_pages(paged, names)
