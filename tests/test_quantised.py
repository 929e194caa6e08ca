"""Keys and values that are stored otherwise than queries: other floats, int8, float8_e4m3fn, int4."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPE_NAMES, assert_same_bits, compare_results, dtype_of, inputs
from kit_paged import Paged, into_pages
from kit_precision import TILES
from reference import Array, plain, reference
from test_paged import OPTIONS, options_for

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


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("key", STORED)
@pytest.mark.parametrize("value", STORED)
def test_every_pair(isa: str, key: str, value: str, dtype: str, rng: Any) -> None:
    for queries in (1, 3, 7, 12):
        sizes: dict[str, Any] = {"heads": 4, "kv_heads": 2, "dim": 40, "value_dim": 24}
        check(*make(rng, (key, value), queries, dtype=dtype_of(dtype), **sizes))


@pytest.mark.parametrize("stored", QUANTISED)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(isa: str, stored: str, name: str, rng: Any) -> None:
    for queries in (2, 10):
        query, paged, scales = make(rng, (stored, stored), queries, heads=4, kv_heads=2)
        check(query, paged, scales, **options_for(rng, name, query, paged))


@pytest.mark.parametrize("stored", QUANTISED)
@pytest.mark.parametrize("queries", [1, 40, 130])
def test_long_entries(isa: str, stored: str, queries: int, rng: Any) -> None:
    query, paged, scales = make(
        rng, (stored, stored), queries, lengths=[3000, 2049], heads=1, dim=16, page_size=17
    )
    check(query, paged, scales, causal=True)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dim", [2, 4, 6, 30, 34, 64, 80, 96, 130, 576])
def test_dims(isa: str, stored: str, dim: int, rng: Any) -> None:
    for queries in (1, 7, 9, 17):
        sizes: dict[str, Any] = {"lengths": [45], "heads": 1, "dim": dim, "value_dim": dim}
        check(*make(rng, (stored, stored), queries, **sizes))


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("dim", [1, 3, 15, 17, 65])
def test_odd_dims(isa: str, stored: str, dim: int, rng: Any) -> None:
    for queries in (1, 7, 9, 17):
        sizes: dict[str, Any] = {"lengths": [45], "heads": 1, "dim": dim, "value_dim": dim}
        check(*make(rng, (stored, stored), queries, **sizes))


def compare_with_wider(
    got: tuple[Array, Array], query: Array, key: Array, value: Array, stored: str, **options: Any
) -> None:
    """Attention to the same numbers in float32 has the bits, and then the rounding, of the result.  But where few rows
    read bfloat16 keys, two at a time, sums have another order, and so they have in pairs and tiles of bfloat16."""
    assert got[0].dtype == query.dtype
    few = query.shape[1] // key.shape[1] * query.shape[2] <= 16
    isa = attncore.isa()
    in_pairs = isa in ("avx512_bf16", *TILES) and query.itemsize == 2
    in_parts = not few and (isa == "amx_f32" or (isa == "amx" and stored == query.dtype.name))
    if ("bfloat16" in stored and (few or in_pairs)) or in_parts:
        arrays = query, key, value
        compare_results(*got, reference(*arrays, **options), plain(*arrays, **options))
        return
    wide: Any = [a.astype(np.float32) for a in (query, key, value)]
    expected = attncore.attention(*wide, return_lse=True, **options)
    assert_same_bits(got[0], expected[0].astype(query.dtype))
    assert_same_bits(got[1], expected[1], "lse")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("queries", [1, 3, 12, 100])
def test_without_scales_it_is_attention_to_the_wider_numbers(
    isa: str, queries: int, stored: str, dtype: str, rng: Any
) -> None:
    q, k, v = inputs(rng, queries, 300, batch=2, heads=4, kv_heads=2, dim=34, value_dim=48)
    q = q.astype(dtype_of(dtype))
    k, v = (store(2 * a, stored) for a in (k, v))
    got = into_pages_of_bytes(rng, k, v, [300, 107], 16).attend(q, causal=True)
    options = {"causal": True, "key_lengths": [300, 107]}
    compare_with_wider(got, q, restore(k), restore(v), stored, **options)


def into_pages_of_bytes(
    rng: np.random.Generator, key: Array, value: Array, lengths: Any, page_size: int
) -> Paged:
    """into_pages for any dtype; numbers are moved, not converted."""
    k, v = (a.view(np.uint8).astype(np.float32) for a in (key, value))
    paged = into_pages(rng, k, v, lengths, page_size, poison=127, garbage=10**9)
    pools = [p.astype(np.uint8) for p in (paged.key_pages, paged.value_pages)]
    key_pages, value_pages = (p.view(a.dtype) for p, a in zip(pools, (key, value), strict=True))
    return replace(paged, key_pages=key_pages, value_pages=value_pages)


@pytest.mark.parametrize("query", DTYPE_NAMES)
@pytest.mark.parametrize("key", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", ["float32", "float16", "bfloat16"])
def test_floats_of_attention_itself(isa: str, query: str, key: str, value: str, rng: Any) -> None:
    """key and value in another float dtype than query's; query's is that of the result."""
    for queries in (1, 3, 12, 100):
        q, k, v = inputs(rng, queries, 200, batch=2, heads=4, kv_heads=2, dim=40, value_dim=24)
        given: Any = (q.astype(dtype_of(query)), k.astype(dtype_of(key)), v.astype(dtype_of(value)))
        if query == "float64":
            with pytest.raises(TypeError, match=r"key: dtype is.*accepted is float64"):
                attncore.attention(*given)
            continue
        got = attncore.attention(*given, causal=True, return_lse=True)
        wide_k, wide_v = (a.astype(np.float32) for a in given[1:])
        compare_with_wider(got, given[0], wide_k, wide_v, key, causal=True)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_strides_of_other_floats(isa: str, name: str, rng: Any) -> None:
    for queries in (1, 20):
        q, k, v = inputs(rng, queries, 70, heads=2, dim=24)
        k, v = k.astype(dtype_of(name)), v.astype(dtype_of(name))
        expected = attncore.attention(q, k, v)
        apart, columns = (
            [np.repeat(a, 2, axis=3)[..., ::2] for a in (k, v)],
            [np.asfortranarray(a) for a in (k, v)],
        )
        for arrays in (apart, columns):
            assert_same_bits(attncore.attention(q, arrays[0], arrays[1]), expected)


@pytest.mark.parametrize("stored", QUANTISED)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_strides_of_pages_and_scales(isa: str, stored: str, layout: str, rng: Any) -> None:
    for queries in (2, 12):
        query, paged, scales = make(rng, (stored, stored), queries, heads=4, kv_heads=2)
        expected = paged.attend(query, **scales)
        backwards = [np.ascontiguousarray(s[:, ::-1])[:, ::-1] for s in scales.values()]
        apart = [np.repeat(s, 3, axis=2)[:, :, ::3] for s in scales.values()]
        moved = paged.view(lambda pool: np.ascontiguousarray(pool[:, ::-1])[:, ::-1])
        for form in (list(scales.values()), backwards, apart):
            given = dict(zip(scales, form, strict=True))
            if layout == "bhsd":
                given = {name: scale.swapaxes(1, 2) for name, scale in given.items()}
            for ours, theirs in zip(
                moved.in_layout(layout).attend(query, **given), expected, strict=True
            ):
                assert_same_bits(ours, theirs)


@pytest.mark.parametrize("queries", [1, 3, 12, 40])
@pytest.mark.parametrize("stored", QUANTISED)
def test_poison_in_what_is_hidden(isa: str, stored: str, queries: int, rng: Any) -> None:
    """Scales and float8's NaN past the lengths, and of keys that a mask hides."""
    query, paged, scales = make(rng, (stored, stored), queries, lengths=[150, 33])
    mask = rng.random((2, 1, queries, paged.key.shape[2])) < 0.6
    mask[..., 7] = False
    mask[..., 20] = np.arange(queries) % 2 == 1
    clean = paged.attend(query, mask=mask, **scales)
    for poison in (np.nan, np.inf, -np.inf):
        for what in ("scale", "pages"):
            if what == "pages" and stored != "float8_e4m3fn":
                continue
            dirty, of_dirty = poisoned(paged, scales, poison, what)
            out, lse = dirty.attend(query, mask=mask, **of_dirty)
            for ours, theirs in ((out, clean[0]), (lse, clean[1])):
                assert_same_bits(ours[:, :, ::2], theirs[:, :, ::2])


def poisoned(
    paged: Paged, scales: dict[str, Array], poison: float, what: str
) -> tuple[Paged, dict[str, Array]]:
    """Keys 7 and 20 of each entry, and all slots that no entry uses."""
    used = np.zeros(paged.key_pages.shape[:2], bool)
    for entry, length in enumerate(paged.key_lengths):
        token = np.array([t for t in range(length) if t not in (7, 20)])
        used[paged.block_table[entry, token // 16], token % 16] = True
    if what == "scale":
        shape = (slice(None), slice(None), None)
        return paged, {n: np.where(used[shape], s, np.float32(poison)) for n, s in scales.items()}
    nan = np.uint8(127).view(FLOAT8)
    return paged.view(lambda pool: np.where(used[..., None, None], pool, nan)), scales


@pytest.mark.parametrize("queries", [1, 12])
def test_scales_of_any_sign_and_size(isa: str, queries: int, rng: Any) -> None:
    """0, −1, 1e-30, 1e30: a factor is a factor."""
    q, k, v = inputs(rng, queries, 64, heads=2, dim=16)
    k, v = (store(8 * a, "int8") for a in (k, v))
    paged = into_pages_of_bytes(rng, k, v, [64], 16)
    for factors in ([0.0, -1.0, 1e-30, 1.0], [1e30, 1e29, 1e-38, 0.0]):
        scale = rng.choice(np.array(factors, np.float32), paged.key_pages.shape[:3])
        order = paged.block_table[0, :4]
        of = scale[order].reshape(64, 2).T[None, ..., None].astype(np.float64)
        small = np.full_like(scale, 0.125)
        exact_arrays = q, restore(k).astype(np.float64) * 0.125, restore(v) * of
        out, lse = paged.attend(q, key_scale=small, value_scale=scale)
        exact = reference(*exact_arrays)
        compare_results(out, lse, exact, exact)
