"""Bad input of caches: the message names the argument, what came, what is accepted; nothing changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from cache_kit import KINDS, make_cache
from kit import assert_same_bits, zeros

N, HK, D, DV, T = 2, 2, 8, 6, 5  # entries, heads, dims, tokens; both entries have 7 tokens


Row = tuple[dict[str, Any], type[Exception], str]
KEY, VALUE = zeros(N, HK, T, D), zeros(N, HK, T, DV)
APPEND: dict[str, Row] = {
    "list as key": ({"key": [[1.0]]}, TypeError, r"key: must be a NumPy array, is list"),
    "None as value": ({"value": None}, TypeError, r"value: must be a NumPy array, is NoneType"),
    "integer key": (
        {"key": zeros(N, HK, T, D, dtype=int)},
        TypeError,
        r"key: dtype is int64.*float32",
    ),
    "bool value": (
        {"value": zeros(N, HK, T, DV, dtype=bool)},
        TypeError,
        r"value: dtype is bool.*float32",
    ),
    "complex key": ({"key": zeros(N, HK, T, D, dtype=complex)}, TypeError, r"key:.*complex128"),
    "big-endian key": ({"key": zeros(N, HK, T, D, dtype=">f4")}, TypeError, r"key:.*>f4"),
    "masked key": ({"key": np.ma.masked_array(KEY)}, TypeError, r"key: is a masked array"),
    "2-D key": ({"key": zeros(T, D)}, ValueError, r"key: has 2 dimensions, must have 3 or 4"),
    "5-D value": ({"value": zeros(1, N, HK, T, DV)}, ValueError, r"value: has 5 dimensions"),
    "key of one entry": (
        {"key": KEY[0]},
        ValueError,
        r"key: shape is \(1, 2, 5, 8\), must be \(2, 2, 5, 8\)",
    ),
    "key of other heads": ({"key": zeros(N, 3, T, D)}, ValueError, r"key:.*\(2, 3, 5, 8\).*\(2, 2"),
    "key of another dim": ({"key": zeros(N, HK, T, 9)}, ValueError, r"key:.*5, 9\).*5, 8\)"),
    "value of key's dim": ({"value": zeros(N, HK, T, D)}, ValueError, r"value:.*5, 8\).*5, 6\)"),
    "value of other tokens": (
        {"value": zeros(N, HK, 4, DV)},
        ValueError,
        r"value:.*4, 6\).*5, 6\)",
    ),
    "key in bshd": ({"layout": "bshd"}, ValueError, r"key: shape is \(2, 5, 2, 8\)"),
    "layout": ({"layout": "sbhd"}, ValueError, r"layout: is 'sbhd', must be 'bhsd' or 'bshd'"),
    "layout of None": ({"layout": None}, TypeError, r"layout:.*NoneType"),
    "lengths past the tokens": (
        {"lengths": [5, 6]},
        ValueError,
        r"lengths: entry 1 is 6, must be 0 … 5",
    ),
    "negative lengths": ({"lengths": [-1, 2]}, ValueError, r"lengths: entry 0 is -1"),
    "too many lengths": ({"lengths": [1, 2, 3]}, ValueError, r"lengths: shape is \(3.*\(2"),
    "one length": ({"lengths": 3}, ValueError, r"lengths: shape is \(1.*\(2"),
    "float lengths": ({"lengths": [1.0, 2.0]}, TypeError, r"lengths: dtype is float.*integer"),
    "2-D lengths": ({"lengths": [[1, 2]]}, ValueError, r"lengths: has 2 dimensions"),
    "positions without rotary": (
        {"positions": np.arange(T)},
        ValueError,
        r"positions: is given, but the cache has no rotary",
    ),
    "float entries": ({"entries": [0.0, 1.0]}, TypeError, r"entries: dtype is float.*integer"),
    "entries of text": ({"entries": "ab"}, TypeError, r"entries: .*"),
    "entries twice": ({"entries": [1, 1]}, ValueError, r"entries: has 1 more than once"),
    "an entry that is not there": ({"entries": [0, 2]}, ValueError, r"entries: has 2, which"),
    "a negative entry": ({"entries": [0, -1]}, ValueError, r"entries: has -1, which"),
    "a huge entry": ({"entries": [0, 2**62]}, ValueError, r"entries: has 4611686018427387904"),
    "2-D entries": ({"entries": [[0, 1]]}, ValueError, r"entries: has 2 dimensions"),
    "fewer entries": ({"entries": [1]}, ValueError, r"key: shape is \(2.*must be \(1"),
    "no option": ({"mask": None}, TypeError, r"mask"),
}
QUERY = zeros(N, 4, T, D)
ATTEND: dict[str, Row] = {
    "list as query": ({"query": [[1.0]]}, TypeError, r"query: must be a NumPy array"),
    "None as query": ({"query": None}, TypeError, r"query: must be a NumPy array"),
    "integer query": ({"query": zeros(N, 4, T, D, dtype=int)}, TypeError, r"query:.*int64"),
    "float64 query": (
        {"query": zeros(N, 4, T, D, dtype=float)},
        TypeError,
        r"query: dtype is float64, a cache of float32 accepts float32, float16 and bfloat16",
    ),
    "query of one entry": (
        {"query": QUERY[0], "out": None},
        ValueError,
        r"query:.*\(1, 4.*must be 2",
    ),
    "query of another dim": ({"query": zeros(N, 4, T, 9)}, ValueError, r"query:.*9\).*must be 8"),
    "query of odd heads": ({"query": zeros(N, 3, T, D)}, ValueError, r"query: has 3 heads.*of 2"),
    "query without heads": ({"query": zeros(N, 0, T, D)}, ValueError, r"query: has 0 heads"),
    "entries": ({"entries": [0, 5]}, ValueError, r"entries: has 5, which"),
    "fewer entries": ({"entries": 0}, ValueError, r"query:.*must be 1, the number of entries"),
    "key_lengths": ({"key_lengths": [1, 2]}, TypeError, r"keyword argument 'key_lengths'"),
    "query_offset": ({"query_offset": 0}, TypeError, r"keyword argument 'query_offset'"),
    "segments": ({"key_segments": None}, TypeError, r"keyword argument 'key_segments'"),
    "dropout": ({"dropout_p": 0.5}, TypeError, r"keyword argument 'dropout_p'"),
    "mask of another length": (
        {"mask": np.ones((T, 9), bool)},
        ValueError,
        r"mask:.*5, 9\).*5, 7\)",
    ),
    "bias of another length": ({"bias": zeros(T, 8)}, ValueError, r"bias:.*5, 8\).*5, 7\)"),
    "window": ({"window": (-1, None)}, ValueError, r"window: has the bound -1"),
    "causal of text": ({"causal": "yes"}, TypeError, r"causal: must be a bool, is str"),
    "softcap": ({"softcap": 0.0}, ValueError, r"softcap: is 0"),
    "scale": ({"scale": float("nan")}, ValueError, r"scale: is nan"),
    "query_lengths": ({"query_lengths": [6, 1]}, ValueError, r"query_lengths:.*6"),
    "parents to come": (
        {"tree_parents": np.arange(T)},
        ValueError,
        r"tree_parents: of query 0 is 0, must be -1",
    ),
    "parents of floats": ({"tree_parents": zeros(T)}, TypeError, r"tree_parents:.*float32"),
    "too many parents": ({"tree_parents": [-1] * 6}, ValueError, r"tree_parents:.*6"),
    "a tree and a window": (
        {"tree_parents": [-1] * T, "window": (3, 0)},
        ValueError,
        r"tree_parents: comes with a window",
    ),
    "out of another shape": ({"out": zeros(N, 4, T, D)}, ValueError, r"out:.*5, 8\).*5, 6\)"),
    "num_threads": ({"num_threads": 0}, ValueError, r"num_threads: is 0"),
}
TRUNCATE: dict[str, Row] = {
    "too long": ({"lengths": 8}, ValueError, r"lengths: is 8 for entry 0, must be 0 … 7"),
    "negative": ({"lengths": [3, -1]}, ValueError, r"lengths: is -1 for entry 1"),
    "of floats": ({"lengths": 1.5}, TypeError, r"lengths: dtype is float"),
    "None": ({"lengths": None}, ValueError, r"lengths: is not given"),
    "of three": ({"lengths": [1, 2, 3]}, ValueError, r"lengths:.*\(3.*\(2"),
    "entries": ({"lengths": 1, "entries": [7]}, ValueError, r"entries: has 7"),
    "entries twice": ({"lengths": 1, "entries": [0, 0]}, ValueError, r"entries: has 0 more than"),
}
CALLS = {
    "append": ({"key": KEY, "value": VALUE}, APPEND),
    "attend": ({"query": QUERY}, ATTEND),
    "truncate": ({}, TRUNCATE),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("call", "case"), [(c, name) for c in CALLS for name in CALLS[c][1]])
def test_calls(kind: str, call: str, case: str, rng: np.random.Generator) -> None:
    good, rows = CALLS[call]
    change, exception, message = rows[case]
    cache = make_cache(kind, N, HK, D, value_dim=DV)
    cache.append(rng.standard_normal((N, HK, 7, D)), rng.standard_normal((N, HK, 7, DV)))
    before = [array for entry in range(N) for array in cache.gather(entry)]
    out = np.full((N, 4, T, DV), 7, np.float32)
    arguments = {**good, **({"out": out} if call == "attend" else {}), **change}
    with pytest.raises(exception, match=message) as caught:
        getattr(cache, call)(**arguments)
    assert type(caught.value) is exception
    assert (out == 7).all(), "out= was touched before everything was checked"
    after = [array for entry in range(N) for array in cache.gather(entry)]
    for now, then in zip(after, before, strict=True):
        assert_same_bits(now, then)
    if isinstance(cache, attncore.PagedKVCache):
        assert cache.reference_counts().sum() == 2


MAKE: dict[str, Row] = {
    "no kv_heads": ({"kv_heads": 0}, ValueError, r"kv_heads: is 0, must be at least 1"),
    "kv_heads of a float": ({"kv_heads": 2.0}, TypeError, r"kv_heads: must be an int, is float"),
    "huge kv_heads": ({"kv_heads": 2**40}, ValueError, r"kv_heads: is 1099511627776, must be 1 …"),
    "no dim": ({"dim": 0}, ValueError, r"dim: is 0"),
    "dim of a bool": ({"dim": True}, TypeError, r"dim: must be an int, is bool"),
    "negative value_dim": ({"value_dim": -1}, ValueError, r"value_dim: is -1"),
    "an integer dtype": ({"dtype": np.int32}, TypeError, r"dtype: is int32, accepted is float32, "),
    "another byte order": (
        {"dtype": np.dtype(">f4")},
        TypeError,
        r"dtype: is >f4, accepted is float32",
    ),
    "a name": ({"dtype": "float8"}, TypeError, r"dtype: is float8, accepted is .*float8_e4m3fn"),
    "no dtype": ({"dtype": None}, TypeError, r"dtype: is .*accepted is float32"),
    "odd int4": ({"dim": 7, "dtype": "int4"}, ValueError, r"dim: is 7, must be even for int4"),
    "odd values in int4": (
        {"value_dim": 7, "dtype": "int4"},
        ValueError,
        r"value_dim: is 7, must be even for int4",
    ),
    "negative window": ({"window": -1}, ValueError, r"window: is -1, must be at least 0"),
    "a pair as window": ({"window": (3, 0)}, TypeError, r"window: must be an int, is tuple"),
    "rotary of a number": ({"rotary": 1e4}, TypeError, r"rotary: must be a Rotary, a bool or None"),
    "rotary of too many dims": (
        {"rotary": attncore.Rotary(dims=10)},
        ValueError,
        r"dims: is 10, must be even and at most 8",
    ),
    "rotary of odd dims": ({"rotary": attncore.Rotary(dims=3)}, ValueError, r"dims: is 3"),
    "rotary of an odd dim": ({"rotary": True, "dim": 7}, ValueError, r"dims: is 7"),
    "base of 0": ({"rotary": attncore.Rotary(base=0.0)}, ValueError, r"base: is 0"),
}
ROOM: dict[str, dict[str, Row]] = {
    "KVCache": {
        "no batch": ({"batch": 0}, ValueError, r"batch: is 0, must be at least 1"),
        "negative batch": ({"batch": -1}, ValueError, r"batch: is -1"),
        "no capacity": ({"capacity": 0}, ValueError, r"capacity: is 0"),
        "capacity of a float": (
            {"capacity": 1e3},
            TypeError,
            r"capacity: must be an int, is float",
        ),
        "too much": ({"capacity": 2**45}, MemoryError, r"capacity: \(2, 2, 35184372088832, 8\)"),
        "beyond": ({"capacity": 2**62}, ValueError, r"capacity: is 4611686018427387904"),
        "an option": ({"page_size": 3}, TypeError, r"page_size"),
    },
    "PagedKVCache": {
        "no pages": ({"pages": 0}, ValueError, r"pages: is 0, must be at least 1"),
        "too many pages": ({"pages": 2**31}, ValueError, r"pages: is 2147483648, must be 1 …"),
        "no page_size": ({"page_size": 0}, ValueError, r"page_size: is 0"),
        "page_size of text": ({"page_size": "16"}, TypeError, r"page_size: must be an int, is str"),
        "too much": (
            {"pages": 2**30, "page_size": 2**20},
            MemoryError,
            r"pages: .*more than there is address space",
        ),
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", MAKE)
def test_settings(kind: str, case: str) -> None:
    change, exception, message = MAKE[case]
    with pytest.raises(exception, match=message):
        _make(kind, change)


@pytest.mark.parametrize("kind", KINDS)
def test_another_float8(kind: str) -> None:
    """By name it is short for float8_e4m3fn; as a dtype it is the one with infinities."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert _make(kind, {"dtype": "float8_e4m3"}).dtype == "float8_e4m3fn"
    assert _make(kind, {"dtype": ml_dtypes.float8_e4m3fn}).dtype == "float8_e4m3fn"
    with pytest.raises(TypeError, match=r"dtype: is float8_e4m3, accepted is .*float8_e4m3fn"):
        _make(kind, {"dtype": ml_dtypes.float8_e4m3})


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind in ROOM for case in ROOM[kind]])
def test_room(kind: str, case: str) -> None:
    change, exception, message = ROOM[kind][case]
    with pytest.raises(exception, match=message):
        _make(kind, change)


def _make(kind: str, change: dict[str, Any]) -> Any:
    room = {"batch": 2, "capacity": 9} if kind == "KVCache" else {"pages": 5, "page_size": 4}
    return getattr(attncore, kind)(**{**room, "kv_heads": 2, "dim": 8, **change})


@pytest.mark.parametrize("kind", KINDS)
def test_entries_that_are_not_there(kind: str) -> None:
    cache = make_cache(kind, 2, 1, 4)
    wrong: list[tuple[Any, type[Exception], str]] = [
        (2, ValueError, r"entry: is 2, which the cache does not have"),
        (-1, ValueError, r"entry: is -1"),
        ("x", TypeError, r"entry: must be an int, is str"),
    ]
    for entry, exception, message in wrong:
        calls = [cache.gather]
        if isinstance(cache, attncore.PagedKVCache):
            calls += [cache.fork, cache.free, cache.block_table]  # type: ignore[list-item]
        for call in calls:
            with pytest.raises(exception, match=message):
                call(entry)


def test_capacity(rng: np.random.Generator) -> None:
    cache = attncore.KVCache(3, 1, 4, capacity=10)
    tokens = rng.standard_normal((3, 1, 8, 4))
    cache.append(tokens, tokens, lengths=[8, 2, 0])
    with pytest.raises(MemoryError, match=r"append: entry 0 has 8 of 10 tokens, 3 more do not fit"):
        cache.append(tokens, tokens, lengths=[3, 8, 8])
    assert cache.lengths.tolist() == [8, 2, 0]
    cache.append(tokens, tokens, lengths=[2, 8, 8])
    assert cache.lengths.tolist() == [10, 10, 8]


def test_there_are_enough_rows() -> None:
    assert (
        len(APPEND) + len(ATTEND) + len(TRUNCATE) + len(MAKE) + sum(map(len, ROOM.values())) >= 80
    )
