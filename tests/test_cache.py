"""KVCache and PagedKVCache against attention on plain arrays: what both must do alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from cache_kit import KINDS, QUANTISED, STORAGE, assert_attends, make_cache, query_dtype, stored
from kit import DTYPE_NAMES, assert_same_bits, dtype_of, normal
from reference import Array

DIMS = [(1, 1), (7, 5), (64, 64), (96, 32), (130, 17)]


def attend_one(cache: Any, query: Array, entry: int, **options: Any) -> tuple[Array, Array]:
    return cache.attend(query, entries=entry, return_lse=True, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", STORAGE)
def test_tokens_come_back(kind: str, storage: str, rng: np.random.Generator) -> None:
    """Ragged appends of random sizes; every entry holds what it was given, in its order."""
    dim, value_dim = (10, 6) if storage == "int4" else (9, 7)
    cache = make_cache(kind, 3, 2, dim, value_dim=value_dim, dtype=storage, page_size=5)
    keys: list[list[Array]] = [[], [], []]
    values: list[list[Array]] = [[], [], []]
    for tokens in (1, 4, 0, 13, 1, 29):
        key, value = normal(rng, 3, 2, tokens, dim), normal(rng, 3, 2, tokens, value_dim)
        counts = rng.integers(0, tokens + 1, 3)
        cache.append(key, value, lengths=counts)
        for entry, count in enumerate(counts):
            keys[entry].append(key[entry, :, :count])
            values[entry].append(value[entry, :, :count])
    assert cache.lengths.tolist() == [sum(k.shape[1] for k in one) for one in keys]
    for entry in range(3):
        key, value = cache.gather(entry)
        assert_same_bits(key, stored(np.concatenate(keys[entry], 1), storage), "key")
        assert_same_bits(value, stored(np.concatenate(values[entry], 1), storage), "value")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize(("tokens", "queries"), [(1, 1), (300, 1), (517, 5), (70, 70), (40, 97)])
def test_attend(
    isa: str, kind: str, storage: str, tokens: int, queries: int, rng: np.random.Generator
) -> None:
    """Entries of different lengths at once; each is as attention on its own arrays."""
    heads, kv_heads, dim, value_dim = 6, 2, 24, 40
    cache = make_cache(kind, 4, kv_heads, dim, value_dim=value_dim, dtype=storage)
    key, value = normal(rng, 4, kv_heads, tokens, dim), normal(rng, 4, kv_heads, tokens, value_dim)
    lengths = [tokens, tokens // 2, 0, max(tokens - 1, 0)]
    cache.append(key, value, lengths=lengths)
    query = normal(rng, 4, heads, queries, dim, dtype=query_dtype(storage))
    out, lse = cache.attend(query, return_lse=True)
    assert out.shape == (4, heads, queries, value_dim)
    for entry, length in enumerate(lengths):
        k, v = (stored(a[entry, :, :length], storage) for a in (key, value))
        one = (out[entry], lse[entry])
        assert_attends(one, query[entry], k, v, quantised=storage in QUANTISED)


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize(
    ("kind", "page_size"), [("KVCache", 16), *(("PagedKVCache", n) for n in (1, 3, 16, 128))]
)
def test_dims_and_page_sizes(
    isa: str, kind: str, dims: tuple[int, int], page_size: int, rng: np.random.Generator
) -> None:
    (dim, value_dim), tokens = dims, 211
    cache = make_cache(kind, 2, 3, dim, value_dim=value_dim, page_size=page_size)
    key, value = normal(rng, 2, 3, tokens, dim), normal(rng, 2, 3, tokens, value_dim)
    for first, end in ((0, 100), (100, 101), (101, 211)):
        cache.append(key[:, :, first:end], value[:, :, first:end])
    query = normal(rng, 2, 3, 2, dim)
    out, lse = cache.attend(query, return_lse=True)
    for entry in range(2):
        assert_attends((out[entry], lse[entry]), query[entry], key[entry], value[entry])


OPTIONS: dict[str, dict[str, Any]] = {
    "not causal": {"causal": False},
    "window": {"window": (20, 0)},
    "wide window": {"causal": False, "window": (7, 3)},
    "scale and softcap": {"scale": 0.3, "softcap": 2.5},
    "threads": {"num_threads": 3},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", OPTIONS)
def test_options(isa: str, kind: str, case: str, rng: np.random.Generator) -> None:
    cache = make_cache(kind, 3, 2, 16)
    key, value = normal(rng, 3, 2, 90, 16), normal(rng, 3, 2, 90, 16)
    lengths = [90, 33, 60]
    cache.append(key, value, lengths=lengths)
    query = normal(rng, 3, 4, 9, 16)
    out, lse = cache.attend(query, return_lse=True, **OPTIONS[case])
    for e, n in enumerate(lengths):
        one = (out[e], lse[e])
        assert_attends(one, query[e], key[e, :, :n], value[e, :, :n], **OPTIONS[case])


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_as_options(isa: str, kind: str, rng: np.random.Generator) -> None:
    """Masks and biases end with the longest entry of the call; slopes, tables and sinks go by head."""
    cache = make_cache(kind, 3, 2, 16)
    key, value = normal(rng, 3, 2, 90, 16), normal(rng, 3, 2, 90, 16)
    lengths = [30, 77, 50]
    cache.append(key, value, lengths=lengths)
    query, longest = normal(rng, 3, 4, 6, 16), 77
    mask = rng.random((3, 1, 6, longest)) < 0.7
    bias = normal(rng, 4, 1, longest)
    options: dict[str, Any] = {
        "alibi": [0.1, 0.2, 0.3, 0.4],
        "sinks": [0.0, 1.0, -1.0, 2.0],
        "relative_bias": attncore.RelativeBias(normal(rng, 4, 8), False, 64),
    }
    out, lse = cache.attend(query, mask=mask, bias=bias, return_lse=True, **options)
    for e, n in enumerate(lengths):
        one: dict[str, Any] = {"mask": mask[e, :, :, :n], "bias": bias[:, :, :n], **options}
        assert_attends((out[e], lse[e]), query[e], key[e, :, :n], value[e, :, :n], **one)


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_queries(isa: str, kind: str, rng: np.random.Generator) -> None:
    cache = make_cache(kind, 3, 1, 8)
    key, value = normal(rng, 3, 1, 50, 8), normal(rng, 3, 1, 50, 8)
    cache.append(key, value, lengths=[50, 20, 4])
    query, counts = normal(rng, 3, 4, 6, 8), [6, 1, 0]
    out, lse = cache.attend(query, query_lengths=counts, return_lse=True)
    for e, (n, queries) in enumerate(zip((50, 20, 4), counts, strict=True)):
        own = query[e, :, :queries]
        one = (out[e, :, :queries], lse[e, :, :queries])
        if queries:
            assert_attends(one, own, key[e, :, :n], value[e, :, :n])
        assert not out[e, :, queries:].any()
        assert (lse[e, :, queries:] == -np.inf).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entries", [[2], [1, 2], [3, 0], [1, 1, 3], [3, 2, 1, 0], []])
def test_entries(isa: str, kind: str, entries: list[int], rng: np.random.Generator) -> None:
    """Any of them, in any order, also twice; the others are not there."""
    cache = make_cache(kind, 4, 2, 16)
    key, value = normal(rng, 4, 2, 40, 16), normal(rng, 4, 2, 40, 16)
    lengths = [40, 1, 30, 17]
    cache.append(key[::-1], value[::-1], entries=[3, 2, 1, 0], lengths=lengths[::-1])
    query = normal(rng, len(entries), 4, 3, 16)
    out, lse = cache.attend(query, entries=entries, return_lse=True)
    assert out.shape == query.shape
    for i, e in enumerate(entries):
        n = lengths[e]
        assert_attends((out[i], lse[i]), query[i], key[e, :, :n], value[e, :, :n])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entries", [None, [2, 0]])
def test_empty_entries(kind: str, entries: list[int] | None, rng: np.random.Generator) -> None:
    """No tokens at all: nothing is visible."""
    cache = make_cache(kind, 3, 2, 8)
    batch = 3 if entries is None else 2
    out, lse = cache.attend(normal(rng, batch, 2, 4, 8), entries=entries, return_lse=True)
    assert not out.any()
    assert (lse == -np.inf).all()
    cache.append(np.zeros((batch, 2, 0, 8)), np.zeros((batch, 2, 0, 8)), entries=entries)
    assert cache.lengths.tolist() == [0, 0, 0]
    assert cache.gather(1)[0].shape == (2, 0, 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("given", DTYPE_NAMES)
def test_any_float_is_converted(
    kind: str, storage: str, given: str, rng: np.random.Generator
) -> None:
    cache = make_cache(kind, 1, 2, 34, dtype=storage)
    key = normal(rng, 1, 2, 9, 34, dtype=dtype_of(given))
    value = rng.standard_normal((1, 2, 9, 34)) * 1e3
    cache.append(key, value)
    got_key, got_value = cache.gather(0)
    assert_same_bits(got_key, stored(key[0], storage), "key")
    assert_same_bits(got_value, stored(value[0], storage), "value")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_layouts_and_strides(kind: str, storage: str, rng: np.random.Generator) -> None:
    """bshd, transposed, negative, zero and odd strides, read-only: the same tokens."""
    if storage not in STORAGE:
        pytest.skip("bfloat16 needs the package ml_dtypes")
    key = normal(rng, 2, 3, 21, 10, dtype=query_dtype(storage))
    value = normal(rng, 2, 3, 21, 10, dtype=query_dtype(storage))
    odd = np.zeros((2, 3, 21, 31), key.dtype)[..., 1:21:2]
    odd[...] = key
    raw = np.zeros(key.nbytes + 1, np.uint8)[1:].view(key.dtype).reshape(key.shape)
    raw[...] = key
    backwards = np.ascontiguousarray(key[:, ::-1, ::-1, ::-1])[:, ::-1, ::-1, ::-1]
    backwards.flags.writeable = False
    expected = make_cache(kind, 2, 3, 10, dtype=storage)
    expected.append(key, value)
    by_token = np.ascontiguousarray(key.transpose(0, 2, 1, 3))
    for given in (odd, raw, backwards, np.asfortranarray(key)):
        cache = make_cache(kind, 2, 3, 10, dtype=storage)
        cache.append(given, value)
        assert_same_bits(cache.gather(1)[0], expected.gather(1)[0])
    cache = make_cache(kind, 2, 3, 10, dtype=storage)
    cache.append(by_token, value.transpose(0, 2, 1, 3), layout="bshd")
    for entry in range(2):
        for ours, theirs in zip(cache.gather(entry), expected.gather(entry), strict=True):
            assert_same_bits(ours, theirs)
    cache.append(np.broadcast_to(key[:, :1, :1], key.shape), value, lengths=[2, 0])
    assert_same_bits(cache.gather(0)[0][2, -1], stored(key[0, 0, :1], storage)[0])
    query = normal(rng, 2, 6, 4, 10, dtype=query_dtype(storage))
    out = cache.attend(query.transpose(0, 2, 1, 3), layout="bshd")
    assert_same_bits(out.transpose(0, 2, 1, 3), cache.attend(query))


@pytest.mark.parametrize("kind", KINDS)
def test_one_entry_without_an_axis(kind: str, rng: np.random.Generator) -> None:
    cache, whole = make_cache(kind, 2, 2, 8), make_cache(kind, 2, 2, 8)
    key, value = normal(rng, 2, 2, 5, 8), normal(rng, 2, 2, 5, 8)
    whole.append(key, value, lengths=[5, 3])
    cache.append(key[0], value[0], entries=0)
    cache.append(key[1], value[1], entries=[1], lengths=3)
    query = normal(rng, 2, 4, 2, 8)
    for entry in range(2):
        out, lse = attend_one(cache, query[entry], entry)
        theirs, their_lse = whole.attend(query, return_lse=True)
        assert_same_bits(out, theirs[entry])
        assert_same_bits(lse, their_lse[entry])


@pytest.mark.parametrize("kind", KINDS)
def test_out(kind: str, rng: np.random.Generator) -> None:
    cache = make_cache(kind, 2, 2, 8)
    cache.append(normal(rng, 2, 2, 5, 8), normal(rng, 2, 2, 5, 8))
    query, out = normal(rng, 2, 4, 2, 8), np.zeros((2, 2, 4, 8), np.float32)
    given = out.transpose(0, 2, 1, 3)
    assert cache.attend(query, out=given) is given
    assert_same_bits(np.ascontiguousarray(given), cache.attend(query))


def test_float32_queries_of_float64() -> None:
    cache = attncore.KVCache(1, 1, 4, capacity=10, dtype="float64")
    with pytest.raises(
        TypeError, match=r"query: dtype is float32, a cache of float64 accepts float64"
    ):
        cache.attend(np.zeros((1, 1, 1, 4), np.float32))


def test_a_paged_cache_begins_without_entries() -> None:
    cache, key = attncore.PagedKVCache(2, 4, 1, 4), np.zeros((1, 1, 3, 4), np.float32)
    for call in (lambda: cache.append(key, key), lambda: cache.attend(key)):
        with pytest.raises(
            ValueError,
            match=r"entries: there are none: a paged cache begins without, add\(\) makes one",
        ):
            call()
    assert cache.attend(key[:0]).shape == (0, 1, 3, 4)
