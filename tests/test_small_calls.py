"""Few keys: outputs that products write themselves, values that are read where they lie; and threads that keep their heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import assert_same_bits, check, inputs
from reference import Array

FLOATS = [np.dtype(np.float32), np.dtype(np.float64)]
KEYS = (1, 7, 16, 33, 128, 129)
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"causal": True},
    "window": {"window": (5, 3), "query_offset": 0},
    "past the keys": {"causal": True, "query_offset": -9},  # the first rows see nothing
    "dropout": {"dropout_p": 0.3, "seed": 5},
    "sinks": {"sinks": np.array([0.5, -1.0], np.float32)},
}


def spread(array: Array) -> Array:
    """The same items, every second one of a larger array: nothing can be taken from where it lies."""
    wide = np.full((*array.shape[:-1], 2 * array.shape[-1]), np.nan, array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


def with_gaps(array: Array) -> Array:
    """The same items, tokens farther apart than they are long."""
    wide = np.full((*array.shape[:-1], array.shape[-1] + 16), np.nan, array.dtype)
    wide[..., : array.shape[-1]] = array
    return wide[..., : array.shape[-1]]


def run(made: Any, *, out: Array | None = None, **options: Any) -> tuple[Array, Array]:
    result, lse = attncore.attention(*made, out=out, return_lse=True, **options)
    return result, lse


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("value_dim", [16, 20, 64, 80])
def test_few_keys(isa: str, dtype: Any, keys: int, value_dim: int, rng: Any) -> None:
    for queries in (9, 16, 40):
        made = inputs(rng, queries, keys, dtype=dtype, dim=64, value_dim=value_dim)
        check(*made)
        check(*made, causal=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("option", OPTIONS)
def test_where_arrays_lie_leaves_the_bits_alone(
    isa: str, dtype: Any, keys: int, option: str, rng: Any
) -> None:
    for value_dim in (16, 64):
        q, k, v = inputs(rng, 21, keys, dtype=dtype, dim=64, value_dim=value_dim)
        expected, expected_lse = run((q, k, v), **OPTIONS[option])
        for place in (spread, with_gaps):
            for made in ((q, k, place(v)), (place(q), place(k), v)):
                for out in (np.full_like(expected, np.nan), place(np.zeros_like(expected))):
                    got, lse = run(made, out=out, **OPTIONS[option])
                    assert got is out
                    assert_same_bits(np.ascontiguousarray(got), expected)
                    assert_same_bits(lse, expected_lse, "lse")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_hidden_values_do_not_matter(isa: str, dtype: Any, poison: float, rng: Any) -> None:
    """Nor how many other rows there are, whichever of the paths they make a row take."""
    q, k, v = inputs(rng, 24, 32, dtype=dtype, dim=64)
    mask = rng.random((24, 32)) < 0.7
    mask[:, 11] = False
    mask[5] = False
    expected, expected_lse = run((q, k, v), mask=mask)
    poisoned = v.copy()
    poisoned[:, :, 11] = poison
    got, lse = run((q, k, poisoned), mask=mask)
    assert_same_bits(got, expected)
    assert_same_bits(lse, expected_lse, "lse")
    assert not got[:, :, 5].any()
    assert np.isneginf(lse[:, :, 5]).all()
    mask[3, 11] = True  # one row sees it
    got, _ = run((q, k, poisoned), mask=mask)
    assert not np.isfinite(got[:, :, 3]).all()
    others = np.arange(24) != 3
    assert_same_bits(got[:, :, others], expected[:, :, others])


@pytest.mark.parametrize("dim", [24, 64, 96, 128])
@pytest.mark.parametrize("heads", [1, 3, 8])
def test_heads_stay_with_threads(isa: str, dim: int, heads: int, rng: Any) -> None:
    """Single rows, whose tasks don't wait for each other: all are run, once, whoever takes them."""
    for keys in (1, 17, 512, 2100):
        made = inputs(rng, 1, keys, batch=2, heads=heads, dim=dim)
        expected, _ = check(*made, num_threads=1)
        for threads in (2, 3, 5, 16):
            for _ in range(4):
                out, _ = run(made, num_threads=threads)
                assert_same_bits(out, expected, f"{keys} keys, {threads} threads")
