"""What test files share: dtypes, random inputs, comparison with the reference, interrupted saves,
child processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attncore
from reference import Array, Result, accumulation, plain, reference
from rule import assert_close_by_rule

try:
    import ml_dtypes

    BFLOAT16: np.dtype[Any] | None = np.dtype(ml_dtypes.bfloat16)
except ImportError:
    BFLOAT16 = None

DTYPES = [
    pytest.param(np.dtype(np.float32), id="float32"),
    pytest.param(np.dtype(np.float64), id="float64"),
    pytest.param(np.dtype(np.float16), id="float16"),
    pytest.param(
        BFLOAT16,
        id="bfloat16",
        marks=pytest.mark.skipif(BFLOAT16 is None, reason="bfloat16 needs the package ml_dtypes"),
    ),
]
DTYPE_NAMES = ["float32", "float64", "float16"] + (["bfloat16"] if BFLOAT16 is not None else [])

Inputs = tuple[Array, Array, Array]

LOOSE = {"float64": 1e-12, "float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}


def dtype_of(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        assert BFLOAT16 is not None
        return BFLOAT16
    return np.dtype(name)


def zeros(*shape: int, dtype: Any = np.float32) -> Array:
    return np.zeros(shape, dtype)


def normal(rng: np.random.Generator, *shape: int, dtype: Any = np.float32) -> Array:
    """Standard normal numbers that float32 can hold."""
    return rng.standard_normal(shape).astype(np.float32).astype(dtype)


def inputs(
    rng: np.random.Generator,
    queries: int,
    keys: int,
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int | None = None,
    dim: int = 32,
    value_dim: int | None = None,
    dtype: Any = np.float32,
) -> Inputs:
    """Standard normal query, key and value, (batch, head, token, dim)."""
    kv_heads = heads if kv_heads is None else kv_heads
    shapes = (
        (batch, heads, queries, dim),
        (batch, kv_heads, keys, dim),
        (batch, kv_heads, keys, dim if value_dim is None else value_dim),
    )
    q, k, v = (normal(rng, *shape, dtype=dtype) for shape in shapes)
    return q, k, v


def check(query: Array, key: Array, value: Array, **options: Any) -> tuple[Array, Array]:
    """Run attention on the ISA in force and hold it against the reference; (out, lse)."""
    passed_on = {name: options[name] for name in options if name not in ("out", "num_threads")}
    exact = reference(query, key, value, **passed_on)
    plainly = plain(query, key, value, **passed_on)
    return compare(query, key, value, exact, plainly, **options)


def compare(
    query: Array, key: Array, value: Array, exact: Result, plainly: Result, **options: Any
) -> tuple[Array, Array]:
    out, lse = attncore.attention(query, key, value, return_lse=True, **options)
    assert out.dtype == query.dtype
    compare_results(out, lse, exact, plainly)
    return out, lse


def compare_results(out: Array, lse: Array, exact: Result, plainly: Result) -> None:
    assert lse.dtype == accumulation(out.dtype)
    assert_close_by_rule(out, exact.out, plainly.out, exact.magnitude, "out")
    # An error in a score moves lse by as much: one unit in the last place of the largest product.
    scores = max(1.0, exact.score_magnitude / 16)
    assert_close_by_rule(lse, exact.lse, plainly.lse, scores, "lse")


def near(ours: Array, theirs: Array) -> None:
    """Within what rounding makes of numbers about 1."""
    atol = LOOSE[str(ours.dtype)]
    np.testing.assert_allclose(np.float64(ours), np.float64(theirs), rtol=0, atol=atol)


def assert_same_bits(ours: Array, theirs: Array, what: str = "out") -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    mine, other = (
        np.frombuffer(a.tobytes(), np.uint8).reshape(-1, a.itemsize) for a in (ours, theirs)
    )
    differ = (mine != other).any(axis=1)
    if differ.any():
        at = np.unravel_index(int(np.argmax(differ)), ours.shape)
        first = f"first at {tuple(map(int, at))}: {ours[at]!r}, not {theirs[at]!r}"
        pytest.fail(f"{what}: {differ.sum()} of {differ.size} elements differ, {first}")


def check_interrupted_save(
    save: Callable[[], object], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C when all bytes are written, but do not have the old file's name yet: that file stays."""
    before = path.read_bytes()

    def interrupt(_file: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save()
    assert path.read_bytes() == before


def run_child(code: str, *, timeout: float = 120) -> str:
    """The standard output of Python source in a process of its own: so is a crash or a hang."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
