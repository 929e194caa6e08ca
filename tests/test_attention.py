"""Every option with every other one, at odd shapes: a covering array of pairs, on each ISA.

The levels are written out below; `allpairspy` picks cases so that any two levels meet in one of
them.  The reference of a case is computed once for all ISAs.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
from allpairspy import AllPairs

import attncore
from kit import DTYPE_NAMES, compare, dtype_of
from reference import Array, Result, plain, reference


class Shape(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    value_dim: int
    rank: int = 4


# 1, primes, more rows than keys, dims that fill no register, head groups of 1, 3 and 8, one query,
# every rank.
SHAPES = [
    Shape(1, 1, 1, 1, 1, 1, 1),
    Shape(2, 3, 1, 17, 67, 40, 24),
    Shape(3, 8, 1, 5, 131, 64, 64),
    Shape(1, 4, 4, 67, 31, 33, 70),
    Shape(2, 6, 2, 13, 97, 129, 16),
    Shape(1, 4, 2, 64, 128, 64, 64, rank=3),
    Shape(1, 1, 1, 37, 53, 7, 5, rank=2),
    Shape(1, 8, 1, 1, 203, 128, 128, rank=3),
    Shape(2, 2, 2, 130, 140, 16, 1),
    Shape(1, 24, 3, 3, 61, 80, 96),
    Shape(3, 1, 1, 2, 7, 5, 3),
    Shape(1, 2, 1, 101, 263, 96, 48),
]

LEVELS: dict[str, list[Any]] = {
    "shape": list(range(len(SHAPES))),
    "dtype": DTYPE_NAMES,
    "causal": [False, True],
    "window": [None, (3, 0), (None, 2), (40, 7), (0, 0), (9, None)],
    "query_offset": [None, 0, -2, 1000, "array"],
    "mask": [None, "keys", "rows_keys", "heads_1_keys", "batch_1_rows_keys", "full", "rows_1"],
    "bias": [None, "full", "own dtype", "keys", "minus infinity", "two", "all shapes"],
    "alibi": [None, "heads", "batch_heads"],
    "softcap": [None, 1.5, 30.0],
    "sinks": [None, "float32", "own dtype"],
    "scale": [None, 0.0, -0.3, 0.4],
    "segments": [False, True],
    "query_lengths": [False, True],
    "key_lengths": [False, True],
    "layout": ["bhsd", "bshd"],
    "memory": ["contiguous", "swapped", "reversed", "every second"],
}
CASES = [dict(zip(LEVELS, row, strict=True)) for row in AllPairs(list(LEVELS.values()))]


def name_of(index: int) -> str:
    """The levels that are not off, for the test's id."""
    case = CASES[index]
    chosen = [f"{k}={v}" for k, v in case.items() if v not in (None, False) and k != "shape"]
    return f"{index}: {SHAPES[case['shape']]} " + " ".join(chosen)


def laid_out(array: Array, memory: str) -> Array:
    """The same values in other memory."""
    if memory == "swapped":
        return np.swapaxes(np.ascontiguousarray(np.swapaxes(array, -1, -2)), -1, -2)
    if memory == "reversed":
        return np.ascontiguousarray(array[..., ::-1, ::-1])[..., ::-1, ::-1]
    if memory == "every second":
        wide = np.full((*array.shape[:-1], 2 * array.shape[-1]), 7, array.dtype)
        wide[..., ::2] = array
        return wide[..., ::2]
    return array


def make_inputs(rng: np.random.Generator, case: dict[str, Any]) -> tuple[Array, Array, Array]:
    b, h, hk, rows, keys, dim, value_dim, rank = SHAPES[case["shape"]]
    shapes = ((b, h, rows, dim), (b, hk, keys, dim), (b, hk, keys, value_dim))
    made = []
    for shape in shapes:
        array = rng.standard_normal(shape).astype(np.float32).astype(dtype_of(case["dtype"]))
        if rank == 2:
            array = array[0, 0]
        elif case["layout"] == "bshd":
            array = np.ascontiguousarray(array.transpose(0, 2, 1, 3))
        if rank == 3:
            array = array[0]
        made.append(laid_out(array, case["memory"]))
    return made[0], made[1], made[2]


def make_mask(rng: np.random.Generator, kind: str | None, shape: Shape) -> Array | None:
    b, h, rows, keys = shape.batch, shape.heads, shape.queries, shape.keys
    if kind is None:
        return None
    sizes: dict[str, tuple[int, ...]] = {
        "keys": (keys,),
        "rows_keys": (rows, keys),
        "heads_1_keys": (h, 1, keys),
        "batch_1_rows_keys": (b, 1, rows, keys),
        "full": (b, h, rows, keys),
        "rows_1": (rows, 1),
    }
    return rng.random(sizes[kind]) < 0.7


def make_bias(rng: np.random.Generator, kind: str | None, case: dict[str, Any]) -> Any:
    b, h, _, rows, keys, *_ = SHAPES[case["shape"]]

    def normal(*size: int, dtype: Any = np.float32) -> Array:
        return rng.standard_normal(size).astype(dtype)

    if kind == "minus infinity":
        bias = normal(h, rows, keys)
        bias[rng.random(bias.shape) < 0.3] = -np.inf
        return bias
    made: dict[str | None, Any] = {
        None: None,
        "full": normal(b, h, rows, keys),
        "own dtype": normal(1, h, rows, keys, dtype=dtype_of(case["dtype"])),
        "keys": normal(keys),
        "two": (normal(h, 1, keys), normal(b, 1, rows, 1, dtype=dtype_of(case["dtype"]))),
        "all shapes": [
            normal(1),
            normal(keys),
            normal(rows, 1),
            normal(h, 1, 1),
            normal(rows, keys),
        ],
    }
    return made[kind]


def make_problem(
    rng: np.random.Generator, case: dict[str, Any]
) -> tuple[tuple[Array, Array, Array], dict[str, Any]]:
    """The arrays and the options of a case."""
    shape = SHAPES[case["shape"]]
    arrays = make_inputs(rng, case)
    batch = shape.batch
    slopes = rng.random((batch, shape.heads)).astype(np.float32)
    dtype = dtype_of(case["dtype"])
    options: dict[str, Any] = {
        name: case[name] for name in ("causal", "window", "softcap", "scale", "layout")
    }
    offset = case["query_offset"]
    options["query_offset"] = rng.integers(-5, 9, batch) if offset == "array" else offset
    options["mask"] = make_mask(rng, case["mask"], shape)
    options["bias"] = make_bias(rng, case["bias"], case)
    options["alibi"] = {None: None, "heads": slopes[0], "batch_heads": slopes}[case["alibi"]]
    sinks = rng.standard_normal(shape.heads)
    options["sinks"] = {None: None, "float32": np.float32(sinks), "own dtype": sinks.astype(dtype)}[
        case["sinks"]
    ]
    if case["segments"]:
        options["query_segments"] = np.sort(rng.integers(0, 3, (batch, shape.queries)), axis=1)
        options["key_segments"] = rng.integers(0, 3, (batch, shape.keys)).astype(np.int32)
    if case["query_lengths"]:
        options["query_lengths"] = rng.integers(0, shape.queries + 1, batch)
    if case["key_lengths"]:
        options["key_lengths"] = rng.integers(0, shape.keys + 1, batch).astype(np.int32)
    return arrays, options


@cache
def make(index: int) -> tuple[tuple[Array, Array, Array], dict[str, Any], Result, Result]:
    arrays, options = make_problem(np.random.default_rng(index), CASES[index])
    return arrays, options, reference(*arrays, **options), plain(*arrays, **options)


@pytest.mark.parametrize("index", [pytest.param(i, id=name_of(i)) for i in range(len(CASES))])
def test_options_by_pairs(isa: str, index: int) -> None:
    arrays, options, exact, plainly = make(index)
    compare(*arrays, exact, plainly, **options)


@pytest.mark.parametrize("name", DTYPE_NAMES)
@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys"),
    [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (2, 2, 0, 0), (0, 2, 0, 0)],
)
@pytest.mark.parametrize("options", [{}, {"causal": True, "window": (1, 1)}, {"softcap": 2.0}])
def test_nothing_to_do(
    isa: str, name: str, batch: int, heads: int, queries: int, keys: int, options: dict[str, Any]
) -> None:
    q, k, v = (np.ones((batch, heads, s, 5), dtype_of(name)) for s in (queries, keys, keys))
    out, lse = attncore.attention(q, k, v, return_lse=True, **options)
    assert out.shape == (batch, heads, queries, 5)
    assert lse.shape == (batch, heads, queries)
    assert out.dtype == q.dtype
    assert (out == 0).all()
    assert (lse == -np.inf).all()


def test_no_keys_but_a_sink(isa: str) -> None:
    q, k = np.ones((1, 2, 3, 5), np.float32), np.ones((1, 2, 0, 5), np.float32)
    sinks = np.array([0.5, -3.0], np.float32)
    out, lse = attncore.attention(q, k, k, sinks=sinks, return_lse=True)
    assert (out == 0).all()
    np.testing.assert_array_equal(lse, np.broadcast_to(sinks[:, None], (1, 2, 3)))
