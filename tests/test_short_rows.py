"""Many sequences of one query and few keys: some a task, and one row that reads few registers of scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits, check, inputs
from kit_paged import into_pages
from reference import Array

KEYS = (
    1,
    2,
    4,
    5,
    8,
    9,
    15,
    16,
    17,
    31,
    32,
    33,
    64,
)  # some on both sides of a register of scores, and of two
SIZES = [(64, 64), (16, 32), (20, 24), (1, 8), (130, 17), (7, 136)]  # dim, value_dim
OPTIONS: dict[str, dict[str, Any]] = {
    "scale": {"scale": -0.7},
    "causal": {"causal": True},
    "causal, past the keys": {"causal": True, "query_offset": -1},
    "window": {"window": (2, 0)},
    "softcap": {"softcap": 3.0},
    "alibi": {"alibi": np.array([0.5, 0.25, 0.125], np.float32)},
    "sinks": {"sinks": np.array([0.5, -1.0, 2.0], np.float32)},
    "dropout": {"dropout_p": 0.4, "seed": 3},
}


def attend(q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Array]:
    out, lse = attncore.attention(q, k, v, return_lse=True, **options)
    return out, lse


def apart(array: Array) -> Array:
    """The same items, which do not lie beside each other."""
    return np.repeat(array, 2, axis=-1)[..., ::2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", KEYS)
def test_values_and_bits(isa: str, dtype: Any, keys: int, rng: Any) -> None:
    for dim, value_dim in SIZES:
        sizes = {"batch": 3, "heads": 3, "dim": dim, "value_dim": value_dim, "dtype": dtype}
        q, k, v = inputs(rng, 1, keys, **sizes)
        expected, expected_lse = check(q, k, v)
        out = np.zeros((3, 3, 1, 2 * value_dim), dtype)[..., ::2]
        for got, lse in (
            attend(apart(q), apart(k), apart(v), out=out),
            attend(q, np.asfortranarray(k), v[:, :, ::-1][:, :, ::-1], num_threads=1),
            into_pages(rng, k, v, [keys] * 3, 3).attend(q),
        ):
            assert_same_bits(np.ascontiguousarray(got), expected)
            assert_same_bits(lse, expected_lse, "lse")


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("option", OPTIONS)
def test_options(isa: str, dtype: Any, option: str, rng: Any) -> None:
    for keys in KEYS[::2]:
        check(*inputs(rng, 1, keys, batch=2, heads=3, dim=24, dtype=dtype), **OPTIONS[option])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 2, 3])
def test_many_sequences(isa: str, dtype: Any, queries: int, rng: Any) -> None:
    """Of several lengths: each entry has the bits that it has alone, whoever takes it, however many a task."""
    batch, keys = 700, 40
    q, k, v = inputs(rng, queries, keys, batch=batch, kv_heads=2, heads=4, dim=16, dtype=dtype)
    lengths = rng.integers(0, keys + 1, batch)
    for entry, length in enumerate(lengths):
        k[entry, :, length:] = np.nan
        v[entry, :, length:] = np.inf
    expected, expected_lse = attend(q, k, v, key_lengths=lengths, num_threads=1)
    assert not expected[lengths == 0].any()
    for threads in (2, 3, 7):
        got, lse = attend(q, k, v, key_lengths=lengths, num_threads=threads)
        assert_same_bits(got, expected)
        assert_same_bits(lse, expected_lse, "lse")
    for entry in range(0, batch, 50):
        one = slice(entry, entry + 1)
        seen = slice(0, int(lengths[entry]))
        got, lse = check(q[one], k[one, :, seen], v[one, :, seen])
        assert_same_bits(got, expected[one])
        assert_same_bits(lse, expected_lse[one], "lse")


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("keys", [1, 3, 16])
def test_numbers_that_are_none(isa: str, dtype: Any, keys: int, rng: Any) -> None:
    """NaN and Inf reach what NumPy says, in the last registers of a row too, and no other sequence."""
    q, k, v = inputs(rng, 1, keys, batch=5, heads=1, dim=16, value_dim=80, dtype=dtype)
    expected, _ = attend(q, k, v)
    v[1, 0, 0, 70], v[2, 0, -1, 3], k[3, 0, -1, 5] = np.inf, np.nan, np.inf
    q[3, 0, 0, 5] = -1  # its score is −∞
    got, lse = attend(q, k, v)
    assert_same_bits(got[[0, 4]], expected[[0, 4]])
    assert np.isposinf(got[1, 0, 0, 70])
    assert np.isnan(got[2, 0, 0, 3])
    for entry, column in ((1, 70), (2, 3)):
        others = np.arange(80) != column
        assert_same_bits(got[entry, 0, 0, others], expected[entry, 0, 0, others])
    if keys == 1:
        assert np.isneginf(lse[3, 0, 0]) or np.isnan(lse[3, 0, 0])
    else:
        fewer, _ = attend(q[3:4], k[3:4, :, :-1], v[3:4, :, :-1])
        np.testing.assert_allclose(got[3:4], fewer, rtol=1e-5, atol=1e-5)
    spread, spread_lse = attend(apart(q), apart(k), apart(v))
    assert_same_bits(got, spread)
    assert_same_bits(lse, spread_lse, "lse")


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_huge_scores_and_zeros(isa: str, dtype: Any, rng: Any) -> None:
    """Scores far apart; outputs that are zero are +0."""
    q, k, v = inputs(rng, 1, 11, batch=4, heads=3, dim=32, dtype=dtype)
    check(q * 1000, k, v)
    check(q * 0, k, v)
    out, _ = attend(q, k, v * dtype.type(-0.0))
    assert not np.signbit(out[out == 0]).any()
    spread, _ = attend(apart(q), k, apart(v * dtype.type(-0.0)))
    assert_same_bits(out, spread)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("dim", [2048, 4096, 8192])
def test_the_last_row_of_some(isa: str, dtype: Any, dim: int, rng: Any) -> None:
    """A tile of one row, as long dims make it, is summed as the sequence's others are."""
    for queries in (5, 7, 13, 25, 31):
        q, k, v = inputs(rng, queries, 3, heads=1, dim=dim, value_dim=64, dtype=dtype)
        for got, expected in zip(attend(q, apart(k), v), attend(q, k, v), strict=True):
            assert_same_bits(got, expected)


def test_long_padding_of_few_queries(isa: str, rng: Any) -> None:
    """Rows of several tiles without keys, of heads that one task takes together: they are 0, and nothing else is."""
    batch, heads, queries, dim = 24, 4, 300, 64
    q = rng.standard_normal((batch, heads, queries, dim), dtype=np.float32)
    k, v = (
        rng.standard_normal((batch, 512, heads, dim), dtype=np.float32).swapaxes(1, 2) for _ in "kv"
    )
    lengths = np.full(batch, 2)
    lengths[:12], lengths[12] = 0, queries
    for order in (lengths, lengths[::-1].copy()):
        room = np.full((batch + 2, heads, queries, dim), 7, np.float32)
        out = room[1:-1]
        attncore.attention(q, k, v, query_lengths=order, out=out, num_threads=1)
        assert (room[[0, -1]] == 7).all()
        seen = np.arange(queries) < order[:, None]
        assert not out.swapaxes(1, 2)[~seen].any()
        assert out.swapaxes(1, 2)[seen].all()
