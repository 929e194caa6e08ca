"""Shapes that cross the borders of tiles, panels and key splits: long keys, many rows, decoding."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from kit import DTYPE_NAMES, Inputs, compare, dtype_of, inputs
from reference import Result, plain, reference

# batch, heads, kv_heads, queries, keys, dim, value_dim
SHAPES: dict[str, tuple[int, ...]] = {
    "prefill": (1, 2, 1, 517, 2053, 64, 64),
    "square": (1, 1, 1, 701, 701, 128, 128),
    "wide": (1, 1, 1, 70, 300, 300, 515),
    "decode": (1, 8, 1, 1, 5003, 64, 64),
    "few rows": (1, 6, 2, 3, 4999, 80, 80),
    "decode of many heads": (2, 32, 8, 1, 1031, 128, 128),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "no option": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (150, 0)},
    "window ahead": {"window": (60, 700)},
    "top left": {"causal": True, "query_offset": 0},
    "negative offset": {"causal": True, "query_offset": -200},
    "softcap": {"softcap": 2.0, "causal": True},
    "mask": {"mask": "random"},
    "mask of blocks": {"mask": "blocks", "causal": True},
    "bias": {"bias": "full"},
    "bias of keys": {"bias": "keys", "window": (900, 900)},
    "alibi": {"alibi": "heads", "causal": True},
    "segments": {"segments": True, "causal": True},
    "segments and window": {"segments": True, "window": (300, 300)},
    "lengths": {"lengths": True},
    "everything": {
        "causal": True,
        "window": (1200, 3),
        "softcap": 5.0,
        "mask": "blocks",
        "bias": "keys",
        "alibi": "heads",
        "sinks": True,
        "segments": True,
        "lengths": True,
        "scale": 0.2,
    },
}


def make_options(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    batch, heads, _, queries, keys, *_ = shape
    options = dict(OPTIONS[name])
    if options.get("mask") == "random":
        options["mask"] = rng.random((batch, 1, queries, keys)) < 0.5
    elif options.get("mask") == "blocks":
        mask = np.ones((queries, keys), bool)
        mask[queries // 3 :, keys // 5 : keys // 2] = False
        mask[: queries // 4 + 1, :] = False
        mask[:, :9] = True
        options["mask"] = mask
    if options.get("bias") == "full":
        options["bias"] = rng.standard_normal((heads, queries, keys)).astype(np.float32)
    elif options.get("bias") == "keys":
        bias = rng.standard_normal((batch, 1, 1, keys)).astype(np.float32)
        bias[..., keys // 2 : keys // 2 + 100] = -np.inf
        options["bias"] = bias
    if "alibi" in options:
        options["alibi"] = np.geomspace(0.5, 0.002, heads).astype(np.float32)
    if options.pop("sinks", False):
        options["sinks"] = rng.standard_normal(heads).astype(np.float32)
    if options.pop("segments", False):
        of_keys = np.broadcast_to(np.arange(keys) // 311, (batch, keys)).astype(np.int64)
        options["key_segments"] = of_keys
        last = of_keys[:, -1:]
        short = np.broadcast_to(last, (batch, max(0, queries - keys)))
        options["query_segments"] = np.concatenate([short, of_keys[:, -queries:]], axis=1)
    if options.pop("lengths", False):
        options["key_lengths"] = np.full(batch, keys - 37)
        options["query_lengths"] = np.full(batch, max(1, queries - 5))
    return options


@cache
def make(shape: str, option: str, dtype: str) -> tuple[Inputs, dict[str, Any], Result, Result]:
    batch, heads, kv_heads, queries, keys, dim, value_dim = SHAPES[shape]
    rng = np.random.default_rng(len(shape) + 100 * len(option))
    made = inputs(
        rng,
        queries,
        keys,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        value_dim=value_dim,
        dtype=dtype_of(dtype),
    )
    options = make_options(rng, option, SHAPES[shape])
    small = [
        replace(r, weights=np.empty(0))  # they would fill the memory
        for r in (reference(*made, **options), plain(*made, **options))
    ]
    return made, options, small[0], small[1]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", ["prefill", "decode", "few rows"])
def test_options(isa: str, shape: str, option: str) -> None:
    made, options, exact, plainly = make(shape, option, "float32")
    compare(*made, exact, plainly, **options)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("option", ["no option", "everything"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(isa: str, shape: str, option: str, dtype: str) -> None:
    made, options, exact, plainly = make(shape, option, dtype)
    compare(*made, exact, plainly, **options)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "size", [2, 15, 16, 17, 31, 33, 63, 65, 127, 129, 255, 257, 511, 513, 1025]
)
def test_borders(isa: str, size: int, dtype: str) -> None:
    """One less and one more than the powers of two, as rows and as keys."""
    rng = np.random.default_rng(size)
    for queries, keys in ((size, 77), (19, size), (1, size)):
        made = inputs(rng, queries, keys, heads=1, dim=24, dtype=dtype)
        exact, plainly = reference(*made, causal=True), plain(*made, causal=True)
        compare(*made, exact, plainly, causal=True)


@pytest.mark.parametrize("dim", [1, 2, 3, 15, 17, 31, 33, 65, 100, 127, 192, 255, 257, 576])
def test_dims(isa: str, dim: int) -> None:
    rng = np.random.default_rng(dim)
    for value_dim in (dim, 21):
        made = inputs(rng, 23, 45, dim=dim, value_dim=value_dim)
        compare(*made, reference(*made), plain(*made))
