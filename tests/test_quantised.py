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
from kit_quantised import FLOAT8, QUANTISED, STORED, check, make, restore, store
from reference import Array, plain, reference
from test_paged import OPTIONS, options_for


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


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("rows", [1, 4, 20])
def test_a_weight_of_0_times_a_negative_scale(isa: str, rows: int, dtype: str, rng: Any) -> None:
    """It is no mark of a hidden key: its infinite value is seen, as in float arithmetic."""
    if dtype == "float64":
        return
    kind = dtype_of(dtype)
    key, value = np.zeros((1, 16, 1, 16), kind), np.ones((1, 16, 1, 16), kind)
    key[0, 0, 0, 0] = 200  # exp(-200) is 0
    value[0, 3] = np.inf
    query = np.zeros((1, rows, 1, 16), kind)
    query[..., 0] = 1
    for scale in (1, -1):
        scales = np.full((1, 16, 1), scale, np.float32)
        out = attncore.attention_paged(
            query, key, value, [[0]], [16], scale=1.0, value_scale=scales
        )
        assert np.isnan(out.astype(np.float32)).all()


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
    read bfloat16 keys, two at a time, sums have another order, and so they have in pairs and tiles of bfloat16, whose
    bits bfloat16 queries get with quantised numbers too."""
    assert got[0].dtype == query.dtype
    few = query.shape[1] // key.shape[1] * query.shape[2] <= 16
    isa = attncore.isa()
    in_pairs = isa in ("avx512_bf16", *TILES) and query.itemsize == 2
    in_parts = not few and (isa == "amx_f32" or (isa == "amx" and stored == query.dtype.name))
    if ("bfloat16" in stored and (few or in_pairs)) or in_parts:
        arrays = query, key, value
        compare_results(*got, reference(*arrays, **options), plain(*arrays, **options))
        return
    exact_in_pairs = in_pairs and query.dtype.name == "bfloat16" and stored in QUANTISED
    kind = query.dtype if exact_in_pairs else np.float32
    wide: Any = [a.astype(kind) for a in (query, key, value)]
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", QUANTISED)
@pytest.mark.parametrize("queries", [1, 3, 8, 40])
def test_every_number(isa: str, queries: int, stored: str, dtype: str, rng: Any) -> None:
    """Of a single key: its value is the result, and lse what a query picks of it."""
    every = np.arange(256, dtype=np.uint8).view(store(np.zeros(2), stored).dtype)
    numbers = restore(every)
    few = np.where(np.isnan(numbers), 0, numbers)
    batch = -(-numbers.size // queries)
    picked = np.arange(batch * queries).reshape(batch, 1, queries) % numbers.size
    query = (picked[..., None] == np.arange(numbers.size)).astype(dtype_of(dtype))
    key, value = (np.broadcast_to(a, (batch, 1, 1, a.size)) for a in (store(few, stored), every))
    paged = into_pages_of_bytes(rng, key, value, [1] * batch, 16)
    out, lse = paged.attend(query, scale=1.0)
    np.testing.assert_allclose(lse, few[picked], rtol=4e-7, atol=4e-7)
    np.testing.assert_array_equal(
        out.astype(np.float32), np.broadcast_to(numbers, (batch, 1, queries, numbers.size))
    )


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
