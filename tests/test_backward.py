"""Gradients of every option with every other one, at odd shapes, and of shapes that cross tiles' borders.

The covering array is test_attention.py's with dropout, relative bias and d_lse; out is held against the reference too.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from allpairspy import AllPairs

import attncore
import test_attention as forward
from kit import DTYPE_NAMES, dtype_of, inputs
from kit_backward import (
    Expected,
    check_backward,
    compare_backward,
    d_outputs,
    differentiate,
    expect,
)
from kit_backward import gradients as gradients_of
from reference import Array

LEVELS: dict[str, list[Any]] = {
    **forward.LEVELS,
    "relative_bias": [None, "both ways", "the past", "own dtype"],
    "dropout_p": [0.0, 0.1, 0.6],
    "d_lse": [False, True],
}
CASES = [dict(zip(LEVELS, row, strict=True)) for row in AllPairs(list(LEVELS.values()))]


def name_of(index: int) -> str:
    case = CASES[index]
    chosen = [f"{k}={v}" for k, v in case.items() if v not in (None, False, 0.0) and k != "shape"]
    return f"{index}: {forward.SHAPES[case['shape']]} " + " ".join(chosen)


def make_relative_bias(rng: np.random.Generator, kind: str | None, case: dict[str, Any]) -> Any:
    if kind is None:
        return None
    buckets, distance = (5, 11) if kind == "the past" else (8, 20)
    table = rng.standard_normal((forward.SHAPES[case["shape"]].heads, buckets))
    dtype = dtype_of(case["dtype"]) if kind == "own dtype" else np.float32
    return attncore.RelativeBias(table.astype(dtype), kind != "the past", distance)


@cache
def make(index: int) -> tuple[Any, Array, dict[str, Any], Expected]:
    case = CASES[index]
    rng = np.random.default_rng(index)
    arrays, options = forward.make_problem(rng, case)
    options["relative_bias"] = make_relative_bias(rng, case["relative_bias"], case)
    options["dropout_p"], options["seed"] = case["dropout_p"], 2**33 + index
    d_out, d_lse = d_outputs(rng, arrays[0], arrays[2], case["layout"])
    options["d_lse"] = d_lse if case["d_lse"] else None
    d_out = forward.laid_out(d_out, case["memory"])
    return arrays, d_out, options, expect(d_out, arrays, **options)


@pytest.mark.parametrize("index", [pytest.param(i, id=name_of(i)) for i in range(len(CASES))])
def test_options_by_pairs(isa: str, index: int) -> None:
    arrays, d_out, options, expected = make(index)
    compare_backward(expected, d_out, arrays, **options)


# batch, heads, kv_heads, queries, keys, dim, value_dim
SHAPES: dict[str, tuple[int, ...]] = {
    "prefill": (1, 2, 1, 200, 700, 64, 64),
    "square": (1, 1, 1, 389, 389, 128, 128),
    "wide": (1, 1, 1, 70, 150, 300, 515),
    "decode": (1, 8, 1, 1, 2503, 64, 64),
    "few rows": (1, 6, 2, 3, 2499, 80, 80),
    "many rows": (1, 2, 2, 1300, 70, 24, 40),
    "many heads": (2, 24, 3, 33, 131, 32, 32),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "no option": {},
    "causal": {"causal": True},
    "window": {"window": (150, 30)},
    "dropout": {"dropout_p": 0.3, "seed": 4},
    "everything": {"causal": True, "window": (900, 3), "softcap": 5.0, "dropout_p": 0.1, "seed": 5},
}


@cache
def make_large(shape: str, option: str, dtype: str) -> tuple[Any, Array, dict[str, Any], Expected]:
    batch, heads, kv_heads, queries, keys, dim, value_dim = SHAPES[shape]
    rng = np.random.default_rng(len(shape) + len(option))
    sizes = {"batch": batch, "heads": heads, "kv_heads": kv_heads}
    arrays = inputs(
        rng, queries, keys, dim=dim, value_dim=value_dim, dtype=dtype_of(dtype), **sizes
    )
    options = dict(OPTIONS[option])
    d_out, d_lse = d_outputs(rng, arrays[0], arrays[2])
    if option == "everything":
        table = np.float32(rng.standard_normal((heads, 32)))
        options["relative_bias"] = attncore.RelativeBias(table)
        options["alibi"] = np.geomspace(0.5, 0.002, heads).astype(np.float32)
        options["bias"] = (
            np.float32(rng.standard_normal((batch, 1, 1, keys))),
            np.float32(rng.standard_normal((heads, queries, keys))),
        )
        options["sinks"] = np.float32(rng.standard_normal(heads))
        options["key_lengths"] = np.full(batch, keys - 37)
        options["d_lse"] = d_lse
    return arrays, d_out, options, expect(d_out, arrays, **options)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_large(isa: str, shape: str, option: str) -> None:
    arrays, d_out, options, expected = make_large(shape, option, "float32")
    compare_backward(expected, d_out, arrays, **options)


@pytest.mark.parametrize("dtype", [name for name in DTYPE_NAMES if name != "float32"])
@pytest.mark.parametrize("option", ["no option", "everything"])
@pytest.mark.parametrize("shape", ["prefill", "few rows", "many heads"])
def test_large_in_other_dtypes(isa: str, shape: str, option: str, dtype: str) -> None:
    arrays, d_out, options, expected = make_large(shape, option, dtype)
    compare_backward(expected, d_out, arrays, **options)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("size", [2, 15, 16, 17, 31, 33, 63, 65, 127, 129, 255, 257, 513])
def test_borders(isa: str, size: int, dtype: str) -> None:
    """One less and one more than the powers of two, as rows and as keys."""
    rng = np.random.default_rng(size)
    for queries, keys in ((size, 77), (19, size), (1, size)):
        made = inputs(rng, queries, keys, heads=1, dim=24, dtype=dtype)
        check_backward(d_outputs(rng, made[0], made[2])[0], made, causal=True)


@pytest.mark.parametrize("dim", [1, 2, 3, 15, 17, 31, 33, 65, 127, 192, 257])
def test_dims(isa: str, dim: int) -> None:
    rng = np.random.default_rng(dim)
    for value_dim in (dim, 21):
        made = inputs(rng, 23, 45, dim=dim, value_dim=value_dim)
        check_backward(d_outputs(rng, made[0], made[2])[0], made)


@pytest.mark.parametrize("name", DTYPE_NAMES)
@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys"),
    [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (2, 2, 0, 0), (0, 2, 0, 0)],
)
@pytest.mark.parametrize("options", [{}, {"causal": True, "window": (1, 1)}, {"dropout_p": 0.5}])
def test_nothing_to_do(
    isa: str, name: str, batch: int, heads: int, queries: int, keys: int, options: dict[str, Any]
) -> None:
    """What has elements gets zeros."""
    made = [np.ones((batch, heads, s, 5), dtype_of(name)) for s in (queries, keys, keys)]
    table = np.ones((heads, 8), np.float32)
    given: dict[str, Any] = {
        "bias": np.ones((heads, 1, keys), np.float32),
        "alibi": np.ones(heads, np.float32),
        "relative_bias": attncore.RelativeBias(table, True, 16),
        **options,
    }
    d_lse = np.ones((batch, heads, queries), np.float64 if name == "float64" else np.float32)
    for one in gradients_of(made[0], made, d_lse=d_lse, **given).values():
        assert (one == 0).all()


def test_no_keys_but_a_sink(isa: str) -> None:
    """lse is the sink's logit: its gradient is d_lse."""
    q, k = np.ones((2, 2, 3, 5), np.float32), np.ones((2, 2, 0, 5), np.float32)
    sinks = np.array([0.5, -3.0], np.float32)
    d_lse = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    made, *_ = differentiate(q, (q, k, k), d_lse=d_lse, sinks=sinks)
    assert (made.query == 0).all()
    np.testing.assert_array_equal(made.sinks, d_lse.sum(axis=(0, 2)))
