"""What caches do to numbers: quantised storage and its bounds, rotation by position."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import attncore
from cache_kit import (
    KINDS,
    QUANTISED,
    STORAGE,
    assert_attends,
    make_cache,
    query_dtype,
    scales,
    stored,
)
from kit import DTYPE_NAMES, assert_same_bits, dtype_of, normal
from reference import Array

FLOATS32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
ROWS = arrays.arrays(np.float32, (3, 8), elements=FLOATS32)


def through(x: Array, storage: str) -> Array:
    """Rows (row, dim) stored as keys and read back."""
    cache = attncore.KVCache(1, 1, x.shape[1], capacity=max(1, len(x)), dtype=storage)
    cache.append(x[None, None], np.zeros((1, 1, *x.shape), np.float32))
    return cache.gather(0)[0][0]


@pytest.mark.parametrize("storage", QUANTISED)
@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(x=ROWS)
def test_the_bound(storage: str, x: Array) -> None:
    """The documented error, exactly: numbers of any size, subnormal ones too."""
    numbers = _numbers(x, storage)
    scale = scales(x, storage)
    error = np.abs(x.astype(np.float64) - numbers * scale)
    if storage == "float8_e4m3fn":
        assert (error <= np.maximum(np.abs(x.astype(np.float64)) / 16, scale / 1024)).all()
    else:
        assert (error <= scale / 2).all()
        assert (np.abs(numbers) <= QUANTISED[storage]).all()
    assert np.isfinite(through(x, storage)).all()
    assert_same_bits(through(x, storage), stored(x, storage))


def _numbers(x: Array, storage: str) -> Array:
    """What is stored beside the scale, as float64, from the state that `save` writes."""
    cache = attncore.KVCache(1, 1, x.shape[1], capacity=len(x), dtype=storage)
    cache.append(x[None, None], np.zeros((1, 1, *x.shape), np.float32))
    state: dict[str, Array] = cache._core.state()
    bits = state["key"][0]
    np.testing.assert_array_equal(state["key_scale"][0][:, None], scales(x, storage))
    if storage == "int8":
        return bits.astype(np.float64)
    if storage == "int4":
        halves = np.stack([bits & 15, bits >> 4], -1).reshape(x.shape).astype(np.int8)
        return np.where(halves > 7, halves - 16, halves).astype(np.float64)
    exponent, fraction = (bits >> 3 & 15).astype(int), (bits & 7).astype(float)
    size = np.where(
        exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7)
    )
    return np.where(bits & 128, -size, size)


def test_every_float8_number_stays() -> None:
    """Those of ml_dtypes' float8_e4m3fn, 448 among them, come back to the bit."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    x = np.where(np.isfinite(every), every, 448).astype(np.float32)[None]
    assert_same_bits(through(x, "float8_e4m3fn"), x)


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_every_integer_stays_and_ties_go_to_even(storage: str) -> None:
    most = QUANTISED[storage]
    whole = np.arange(-most, most + 1, dtype=np.float32)
    x = np.append(whole, 0)[None]
    np.testing.assert_array_equal(through(x, storage), x)
    halves = np.append(whole[:-1] + np.float32(0.5), [most, 0]).astype(np.float32)[None]
    expected = np.append(np.rint(whole[:-1] + 0.5), [most, 0])[None]
    np.testing.assert_array_equal(through(halves, storage), expected)


@pytest.mark.parametrize("storage", QUANTISED)
def test_rows_of_zeros(storage: str) -> None:
    x = np.zeros((2, 4), np.float32)
    x[1, 0] = 1e-45
    assert_same_bits(through(x, storage), np.zeros((2, 4), np.float32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", QUANTISED)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
@pytest.mark.parametrize("argument", ["key", "value"])
def test_what_cannot_be_stored(
    kind: str, storage: str, bad: float, argument: str, rng: np.random.Generator
) -> None:
    """Entry 1's last token is bad: nothing is appended to entry 0 either, and no page is taken."""
    cache = make_cache(kind, 2, 2, 8, dtype=storage)
    first = rng.standard_normal((2, 2, 2, 5, 8))
    cache.append(*first)
    before = [cache.gather(entry) for entry in range(2)]
    pages = getattr(cache, "free_pages", None)
    tokens: dict[str, Any] = {
        "key": rng.standard_normal((2, 2, 90, 8)),
        "value": rng.standard_normal((2, 2, 90, 8)),
    }
    tokens[argument][1, 1, 89, 3] = bad
    with pytest.raises(ValueError, match=rf"{argument}: .*entry 1 \(head 1, token 89\), {storage}"):
        cache.append(**tokens)
    assert cache.lengths.tolist() == [5, 5]
    assert getattr(cache, "free_pages", None) == pages
    for entry in range(2):
        for now, then in zip(cache.gather(entry), before[entry], strict=True):
            assert_same_bits(now, then)
    cache.append(**tokens, lengths=[90, 89])  # what is not appended may be bad
    assert cache.lengths.tolist() == [95, 94]


@pytest.mark.parametrize("name", DTYPE_NAMES)
def test_floats_store_what_is_not_finite(name: str) -> None:
    x = np.array([[np.nan, np.inf, -np.inf, 1.0]])
    got = through(x, name).astype(np.float64)
    np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("asks", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("queries", [1, 50])
def test_queries_of_another_dtype(
    isa: str, kind: str, storage: str, asks: str, queries: int, rng: np.random.Generator
) -> None:
    if not {storage, asks} <= {*DTYPE_NAMES}:
        pytest.skip("bfloat16 needs the package ml_dtypes")
    cache = make_cache(kind, 1, 2, 32, dtype=storage)
    key, value = normal(rng, 1, 2, 300, 32), normal(rng, 1, 2, 300, 32)
    cache.append(key, value)
    query = normal(rng, 1, 8, queries, 32, dtype=dtype_of(asks))
    out, lse = cache.attend(query, return_lse=True)
    assert_attends((out[0], lse[0]), query[0], *(stored(a[0], storage) for a in (key, value)))


@pytest.mark.parametrize("asks", ["float16", "bfloat16"])
@pytest.mark.parametrize("storage", QUANTISED)
def test_short_queries_of_quantised_keys(
    isa: str, storage: str, asks: str, rng: np.random.Generator
) -> None:
    if asks not in DTYPE_NAMES:
        pytest.skip("bfloat16 needs the package ml_dtypes")
    cache = make_cache("PagedKVCache", 1, 2, 32, dtype=storage)
    key, value = normal(rng, 1, 2, 100, 32), normal(rng, 1, 2, 100, 32)
    cache.append(key, value)
    query = normal(rng, 1, 4, 2, 32, dtype=dtype_of(asks))
    out, lse = cache.attend(query, return_lse=True)
    k, v = (stored(a[0], storage) for a in (key, value))
    assert_attends((out[0], lse[0]), query[0], k, v, quantised=True)


ROTARIES = [
    attncore.Rotary(),
    attncore.Rotary(base=100.0, dims=6),
    attncore.Rotary(interleaved=True),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("rotary", ROTARIES)
def test_rotary(
    isa: str, kind: str, storage: str, rotary: attncore.Rotary, rng: np.random.Generator
) -> None:
    """Keys are rotated by where they stand in their entry, then stored; values are not."""
    cache = make_cache(kind, 2, 2, 16, dtype=storage, rotary=rotary)
    wide = np.float64 if storage == "float64" else np.float32
    keys: list[list[Array]] = [[], []]
    for tokens, counts in ((5, [5, 2]), (1, [1, 1]), (150, [70, 150])):
        key = normal(rng, 2, 2, tokens, 16, dtype=query_dtype(storage))
        cache.append(key, key, lengths=counts)
        for entry in range(2):
            keys[entry].append(key[entry, :, : counts[entry]])
    for entry in range(2):
        key = np.concatenate(keys[entry], 1)
        turned = attncore.rope(key.astype(wide), **_rope(rotary))
        assert_same_bits(cache.gather(entry)[0], stored(turned, storage), "key")
        assert_same_bits(cache.gather(entry)[1], stored(key, storage), "value")


def _rope(rotary: attncore.Rotary) -> dict[str, Any]:
    return {"base": rotary.base, "dims": rotary.dims, "interleaved": rotary.interleaved}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True])
def test_positions(isa: str, kind: str, shared: bool, rng: np.random.Generator) -> None:
    cache = make_cache(kind, 2, 2, 16, rotary=True)
    key = normal(rng, 2, 2, 70, 16)
    positions = rng.integers(-1000, 100000, 70 if shared else (2, 70))
    cache.append(key, key, positions=positions)
    for entry in range(2):
        own = positions if shared else positions[entry]
        assert_same_bits(cache.gather(entry)[0], attncore.rope(key[entry], own))


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_rotary(isa: str, kind: str, rng: np.random.Generator) -> None:
    """Token by token, with rotated queries, is attention of the whole, rotated at once."""
    cache = make_cache(kind, 1, 1, 32, rotary=True)
    query, key, value = (normal(rng, 1, heads, 40, 32) for heads in (4, 1, 1))
    whole = attncore.attention(attncore.rope(query), attncore.rope(key), value, causal=True)
    for token in range(40):
        step = slice(token, token + 1)
        cache.append(key[:, :, step], value[:, :, step])
        out = cache.attend(attncore.rope(query[:, :, step], [token]))
        np.testing.assert_allclose(out, whole[:, :, step], rtol=0, atol=1e-5)
