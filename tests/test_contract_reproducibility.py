"""Contract: the bits of a sequence's output depend on that sequence, the options and the ISA."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits, inputs
from reference import Array

SHAPES: dict[str, dict[str, Any]] = {
    "prefill": {"queries": 300, "keys": 700, "heads": 4, "kv_heads": 2, "dim": 48},
    "decode": {"queries": 1, "keys": 5000, "heads": 8, "kv_heads": 2, "dim": 64},
    "few rows": {"queries": 3, "keys": 3000, "heads": 3, "kv_heads": 1, "dim": 20},
    "many heads": {"queries": 110, "keys": 200, "heads": 20, "dim": 24},  # one task each, or shared
    # some rows see a key past 4096, where sums are set apart, and some don't
    "ends on both sides of a fold": {"queries": 40, "keys": 4110, "dim": 32},
    "tiny": {"queries": 16, "keys": 16, "heads": 8, "dim": 64},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "no option": {},
    "causal": {"causal": True},
    "window": {"window": (200, 20), "softcap": 2.0},
}


def run(arrays: Any, **options: Any) -> tuple[Array, Array]:
    out, lse = attncore.attention(*arrays, return_lse=True, **options)
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_threads(isa: str, dtype: Any, shape: str, option: str, rng: Any) -> None:
    made = inputs(rng, dtype=dtype, batch=2, **SHAPES[shape])
    one = run(made, num_threads=1, **OPTIONS[option])
    for threads in (2, 3, 7, None):
        other = run(made, num_threads=threads, **OPTIONS[option])
        assert_same_bits(other[0], one[0], f"{threads} threads")
        assert_same_bits(other[1], one[1], f"lse of {threads} threads")


def test_again_and_again(isa: str, rng: Any) -> None:
    made = inputs(rng, **SHAPES["prefill"])
    first, _ = run(made, causal=True, num_threads=2)
    for _ in range(20):
        assert_same_bits(run(made, causal=True, num_threads=2)[0], first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_entry_alone_or_among_others(
    isa: str, dtype: Any, shape: str, option: str, rng: Any
) -> None:
    made = inputs(rng, dtype=dtype, batch=5, **SHAPES[shape])
    together = run(made, **OPTIONS[option])
    for b in (0, 2, 4):
        alone = run([a[b : b + 1] for a in made], **OPTIONS[option])
        assert_same_bits(together[0][b : b + 1], alone[0])
        assert_same_bits(together[1][b : b + 1], alone[1], "lse")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_padding_and_neighbours_of_other_lengths(
    isa: str, dtype: Any, shape: str, option: str, rng: Any
) -> None:
    """A sequence alone, without padding, gives the bits that it gives in a padded batch."""
    q, k, v = inputs(rng, dtype=dtype, batch=4, **SHAPES[shape])
    rows, keys = q.shape[2], k.shape[2]
    query_lengths = [rows, max(1, rows // 2), rows, max(1, rows - 1)]
    key_lengths = [keys, keys // 3 + 1, 5, keys - 1]
    lengths = {"query_lengths": query_lengths, "key_lengths": key_lengths}
    together = run((q, k, v), **lengths, **OPTIONS[option])
    for b, (i, j) in enumerate(zip(query_lengths, key_lengths, strict=True)):
        cut = [a[b : b + 1, :, :n] for a, n in ((q, i), (k, j), (v, j))]
        alone = run(cut, **OPTIONS[option])
        assert_same_bits(together[0][b : b + 1, :, :i], alone[0], f"entry {b}")
        assert_same_bits(together[1][b : b + 1, :, :i], alone[1], f"lse of entry {b}")


def test_length_of_the_padding(isa: str, rng: Any) -> None:
    made = inputs(rng, queries=40, keys=200, heads=2, dim=32)
    expected, _ = run(made, causal=True)
    for extra in (1, 7, 64, 1000, 5000):
        pad = [(0, 0), (0, 0), (0, extra), (0, 0)]
        padded = [np.pad(a, pad, constant_values=np.nan) for a in made]
        out, _ = run(padded, causal=True, query_lengths=[40], key_lengths=[200])
        assert_same_bits(out[:, :, :40], expected, f"padding of {extra}")


def test_options_of_each_batch_entry(isa: str, rng: Any) -> None:
    made = inputs(rng, batch=3, **SHAPES["prefill"])
    mask = rng.random((3, 1, 300, 700)) < 0.8
    bias = np.float32(rng.standard_normal((3, 4, 1, 700)))
    offset = np.array([0, 400, -3])
    slopes = np.float32(rng.random((3, 4)))
    segments = np.sort(rng.integers(0, 4, (3, 300))), np.sort(rng.integers(0, 4, (3, 700)))

    def options(at: slice) -> dict[str, Any]:
        return {
            "causal": True,
            "mask": mask[at],
            "bias": bias[at],
            "query_offset": offset[at],
            "alibi": slopes[at],
            "query_segments": segments[0][at],
            "key_segments": segments[1][at],
        }

    together, _ = run(made, **options(slice(None)))
    for b in range(3):
        at = slice(b, b + 1)
        alone, _ = run([a[at] for a in made], **options(at))
        assert_same_bits(together[at], alone, f"entry {b}")


EMPTY: dict[str, dict[str, Any]] = {
    "no queries": {"query_lengths": [0, 300, 0, 150, 300, 1, 0, 299]},
    "no keys": {"key_lengths": [0, 700, 0, 0, 234, 700, 0, 699]},
    "both": {"query_lengths": [150, 300] * 4, "key_lengths": [700, 0, 0, 700, 5, 600, 0, 700]},
    "beyond": {
        "query_offset": np.array([-900, 0, 900, -900, 400, -100, 5000, 0]),
        "window": (9, 9),
    },
    "segments": {
        "query_segments": np.repeat([0, 1, 2, 3, 3, 9, 0, 1], 300).reshape(8, 300),
        "key_segments": np.repeat([0, 0, 2, 3, 0, 0, 0, 1], 700).reshape(8, 700),
    },
}


@pytest.mark.parametrize("option", EMPTY)
def test_sequences_of_nothing_among_others(isa: str, option: str, rng: Any) -> None:
    """Many times, since threads that reuse each other's memory too early do so seldom."""
    made = inputs(rng, batch=8, **SHAPES["prefill"])
    expected, _ = run(made, num_threads=1, **EMPTY[option])
    for turn in range(40):
        out = attncore.attention(*made, num_threads=2 + turn % 3, **EMPTY[option])
        assert_same_bits(out, expected, f"turn {turn}")


def test_calls_before_leave_no_trace(isa: str, rng: Any) -> None:
    """The workspace is kept between calls; what it held must not show."""
    made = inputs(rng, **SHAPES["prefill"])
    expected, _ = run(made)
    for shape in SHAPES.values():
        other = inputs(rng, dtype=np.float64, **shape)
        for a in other:
            a[...] = np.nan
        run(other)
        assert_same_bits(run(made)[0], expected)
