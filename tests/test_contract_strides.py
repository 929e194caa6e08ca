"""Contract: any strides.  That nothing is copied: test_contract_memory.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits, inputs
from reference import Array


def swapped(a: Array) -> Array:
    """Dim before token in memory."""
    return np.swapaxes(np.ascontiguousarray(np.swapaxes(a, 2, 3)), 2, 3)


def turned(a: Array) -> Array:
    """The first axis fastest."""
    return np.asfortranarray(a)


def reversed_everywhere(a: Array) -> Array:
    return np.ascontiguousarray(a[::-1, ::-1, ::-1, ::-1])[::-1, ::-1, ::-1, ::-1]


def thinned(a: Array) -> Array:
    """Every third element of each axis of a larger array that holds NaN elsewhere."""
    wide = np.full([3 * s for s in a.shape], np.nan, a.dtype)
    wide[::3, ::3, ::3, ::3] = a
    return wide[::3, ::3, ::3, ::3]


def unaligned(a: Array) -> Array:
    """Elements at odd addresses."""
    memory = np.zeros(a.nbytes + 1, np.uint8)
    view: Array = np.ndarray(a.shape, a.dtype, memory.data, offset=1)
    view[...] = a
    return view


def packed_records(a: Array) -> Array:
    """A field of records: strides that are no multiple of the item."""
    records = np.zeros(a.shape, np.dtype([("tag", np.uint8), ("x", a.dtype), ("end", np.uint8, 2)]))
    records["x"] = a
    field: Array = records["x"]
    assert a.itemsize == 1 or field.strides[-1] % a.itemsize
    return field


def read_only(a: Array) -> Array:
    a = a.copy()
    a.flags.writeable = False
    return a


VIEWS = [swapped, turned, reversed_everywhere, thinned, unaligned, packed_records, read_only]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("queries", [1, 37])
def test_inputs(isa: str, dtype: Any, queries: int, view: Any, rng: Any) -> None:
    """Neither the memory's order nor its alignment shows, not even in the bits."""
    made = inputs(rng, queries, 91, batch=2, heads=4, kv_heads=2, dim=40, value_dim=23, dtype=dtype)
    expected, lse = attncore.attention(*made, causal=True, return_lse=True)
    seen = [view(a) for a in made]
    for before, after in zip(made, seen, strict=True):
        assert_same_bits(after, before, "the view")
    for arrays in (seen, [seen[0], *made[1:]], [made[0], seen[1], made[2]], [*made[:2], seen[2]]):
        out, ours = attncore.attention(*arrays, causal=True, return_lse=True)
        assert_same_bits(out, expected)
        assert_same_bits(ours, lse, "lse")


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_strides(isa: str, dtype: Any, rng: Any) -> None:
    q, k, v = inputs(rng, 9, 30, batch=1, heads=1, dtype=dtype)
    wide = [np.broadcast_to(a, (3, 4, *a.shape[2:])) for a in (q, k, v)]
    assert wide[0].strides[:2] == (0, 0)
    one = attncore.attention(q, k, v)
    out = attncore.attention(*wide)
    assert_same_bits(out, np.ascontiguousarray(np.broadcast_to(one, out.shape)))
    same_token = np.broadcast_to(k[:, :, :1], k.shape)
    same_dim = np.broadcast_to(v[..., :1], v.shape)
    expected = attncore.attention(q, same_token.copy(), same_dim.copy())
    assert_same_bits(attncore.attention(q, same_token, same_dim), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS[:-1])
@pytest.mark.parametrize("queries", [1, 37])
def test_out(isa: str, dtype: Any, queries: int, view: Any, rng: Any) -> None:
    made = inputs(rng, queries, 91, batch=2, heads=4, dim=40, value_dim=23, dtype=dtype)
    expected = attncore.attention(*made)
    out = view(np.full(expected.shape, np.nan, expected.dtype))
    returned = attncore.attention(*made, out=out)
    assert returned is out
    assert_same_bits(out, expected)
    returned, _ = attncore.attention(*made, out=out, return_lse=True)
    assert returned is out


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_leaves_its_surroundings(isa: str, dtype: Any, rng: Any) -> None:
    for queries, value_dim in ((1, 7), (37, 40), (19, 1)):
        made = inputs(rng, queries, 91, heads=4, value_dim=value_dim, dtype=dtype)
        memory = np.full((3, 6, queries + 2, value_dim + 2), 7, dtype)
        out = memory[1:2, 1:5, 1:-1, 1:-1]
        attncore.attention(*made, out=out)
        assert_same_bits(out, attncore.attention(*made))
        out[...] = 7
        assert (memory == 7).all()


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_out_of_fewer_axes(isa: str, rank: int, layout: Any, rng: Any) -> None:
    made = [a[(0,) * (4 - rank)] for a in inputs(rng, 9, 30, heads=3, value_dim=5)]
    if layout == "bshd" and rank == 3:
        made = [a.transpose(1, 0, 2) for a in made]
    expected = attncore.attention(*made, layout=layout)
    out = np.full_like(expected, np.nan)
    assert attncore.attention(*made, layout=layout, out=out) is out
    assert_same_bits(out, expected)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_inputs_that_overlap_each_other(isa: str, layout: Any, rng: Any) -> None:
    """One projection cut in three; and one array three times."""
    made = rng.standard_normal((2, 9, 3, 4, 32)).astype(np.float32)
    q, k, v = (made[:, :, i] for i in range(3))
    if layout == "bhsd":
        q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
    expected = attncore.attention(q.copy(), k.copy(), v.copy(), layout=layout)
    assert_same_bits(attncore.attention(q, k, v, layout=layout), expected)
    expected = attncore.attention(q.copy(), q.copy(), q.copy(), layout=layout)
    assert_same_bits(attncore.attention(q, q, q, layout=layout), expected)


def test_strides_of_options(isa: str, rng: Any) -> None:
    made = inputs(rng, 19, 75, batch=2, heads=6)
    mask = rng.random((2, 6, 19, 75)) < 0.6
    bias = np.float32(rng.standard_normal((2, 6, 19, 75)))
    slopes, sinks = np.float32(rng.random((2, 6))), np.float32(rng.random(6))
    lengths = np.array([40, 75])
    segments = rng.integers(0, 2, (2, 19)), rng.integers(0, 2, (2, 75))

    def options(view: Any, line: Any) -> dict[str, Any]:
        return {
            "mask": view(mask),
            "bias": (view(bias), view(bias[:1])),
            "alibi": line(slopes),
            "sinks": line(sinks),
            "key_lengths": line(lengths),
            "query_offset": line(lengths),
            "query_segments": line(segments[0]),
            "key_segments": line(segments[1]),
        }

    def line(a: Array) -> Array:
        """Backwards, with gaps, at odd addresses."""
        memory = np.zeros(a.size * 2 * a.itemsize + 1, np.uint8)
        wide: Array = np.ndarray((*a.shape[:-1], 2 * a.shape[-1]), a.dtype, memory.data, offset=1)
        wide[..., ::-2] = a
        return wide[..., ::-2]

    expected = attncore.attention(*made, **options(np.copy, np.copy))
    for view in VIEWS:
        if view is not thinned:
            assert_same_bits(attncore.attention(*made, **options(view, line)), expected)
