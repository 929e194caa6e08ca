"""Contract: position, visible, causal and window, lengths, segments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits, check, inputs
from reference import Array


def seen(queries: int, keys: int, **options: Any) -> Array:
    """Which keys each query sees: values are a unit matrix, scores 0, so out shows the weights."""
    q, k = np.zeros((1, 1, queries, 4), np.float32), np.zeros((1, 1, keys, 4), np.float32)
    value = np.eye(keys, dtype=np.float32)[None, None]
    out = attncore.attention(q, k, value, **options)
    return np.asarray(out[0, 0] > 0)


def test_default_offset_is_bottom_right(isa: str) -> None:
    np.testing.assert_array_equal(seen(3, 5, causal=True), np.tri(3, 5, 2, dtype=bool))
    np.testing.assert_array_equal(seen(5, 3, causal=True), np.tri(5, 3, -2, dtype=bool))


@pytest.mark.parametrize("offset", [0, 1, 4, 40, -1, -3, -40, 2**40, -(2**40)])
def test_offset(isa: str, offset: int) -> None:
    expected = np.arange(5) <= np.arange(4)[:, None] + offset
    np.testing.assert_array_equal(seen(4, 5, causal=True, query_offset=offset), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "offset",
    [
        np.array([0, 30, -4]),
        np.array([7, 7, 7], np.int32),
        [1, 2, 3],
        np.int64(3),
        np.array([1000, -1000, 5]),
    ],
)
def test_offset_of_each_batch_entry(isa: str, dtype: Any, offset: Any, rng: Any) -> None:
    made = inputs(rng, 19, 45, batch=3, dtype=dtype)
    check(*made, causal=True, query_offset=offset)
    check(*made, window=(4, 2), query_offset=offset)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("left", [None, 0, 1, 6, 2**40])
@pytest.mark.parametrize("right", [None, 0, 2, 2**40])
@pytest.mark.parametrize("offset", [None, 0, -3, 5])
def test_window(isa: str, left: int | None, right: int | None, causal: bool, offset: Any) -> None:
    position = np.arange(9)[:, None] + (3 if offset is None else offset)
    key = np.arange(12)
    expected = np.ones((9, 12), bool)
    if left is not None:
        expected &= key >= position - left
    if right is not None:
        expected &= key <= position + right
    if causal:
        expected &= key <= position
    got = seen(9, 12, causal=causal, window=(left, right), query_offset=offset)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("offset", [None, 5, 2**60, -(2**60)])
@pytest.mark.parametrize("window", [(2**63 - 2, None), (None, 2**63 - 2), (2**63 - 2, 2**63 - 2)])
def test_a_window_of_huge_bounds_hides_nothing(isa: str, window: Any, offset: Any) -> None:
    """Also where a position and a bound are more than an int64 together."""
    assert seen(4, 5, window=window, query_offset=offset).all()


def test_window_of_no_bounds_is_no_window(isa: str, rng: Any) -> None:
    made = inputs(rng, 9, 30)
    plain = attncore.attention(*made)
    assert_same_bits(attncore.attention(*made, window=(None, None)), plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["keys", "queries", "both"])
def test_lengths(isa: str, dtype: Any, causal: bool, kind: str, rng: Any) -> None:
    """Tokens past the lengths do not exist, and the default offset is key length - query length."""
    made = inputs(rng, 21, 70, batch=4, dtype=dtype)
    options: dict[str, Any] = {"causal": causal}
    if kind != "keys":
        options["query_lengths"] = np.array([21, 0, 13, 1])
    if kind != "queries":
        options["key_lengths"] = np.array([70, 33, 0, 5])
    out, lse = check(*made, **options)
    if kind != "keys":
        assert (out[2, :, 13:] == 0).all()
        assert (lse[2, :, 13:] == -np.inf).all()
    if kind != "queries":
        assert (out[2] == 0).all()


def test_lengths_equal_cut_arrays(isa: str, rng: Any) -> None:
    q, k, v = inputs(rng, 21, 70, batch=2)
    queries, keys = (17, 20), (41, 9)
    options: dict[str, Any] = {"causal": True, "window": (30, None)}
    out = attncore.attention(q, k, v, query_lengths=queries, key_lengths=keys, **options)
    for b, (rows, count) in enumerate(zip(queries, keys, strict=True)):
        cut = (q[b : b + 1, :, :rows], k[b : b + 1, :, :count], v[b : b + 1, :, :count])
        assert_same_bits(out[b : b + 1, :, :rows], attncore.attention(*cut, **options))


@pytest.mark.parametrize("lengths", [7, np.int32(7), [7], np.array([7], np.int32), np.array(7)])
def test_lengths_without_a_batch_axis(isa: str, lengths: Any, rng: Any) -> None:
    q, k, v = (a[0] for a in inputs(rng, 5, 12))
    expected = attncore.attention(q, k[:, :7], v[:, :7])
    assert_same_bits(attncore.attention(q, k, v, key_lengths=lengths), expected)
    expected = attncore.attention(q[0], k[0, :7], v[0, :7])
    assert_same_bits(attncore.attention(q[0], k[0], v[0], key_lengths=lengths), expected)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("causal", [False, True])
def test_segments_are_documents(isa: str, dtype: Any, causal: bool, rng: Any) -> None:
    """A packed row of documents gives what each document gives alone."""
    lengths = (5, 33, 1, 20)
    ids = np.repeat([3, -1, 10**6, 0], lengths).astype(dtype)[None]
    made = inputs(rng, 59, 59, heads=4, kv_heads=2)
    out, _ = check(*made, causal=causal, query_segments=ids, key_segments=ids)
    start = 0
    for length in lengths:
        at = slice(start, start + length)
        q, k, v = (a[:, :, at] for a in made)
        check(q, k, v, causal=causal)
        alone = attncore.attention(q, k, v, causal=causal)
        np.testing.assert_allclose(out[:, :, at], alone, atol=2e-6)
        start += length


@pytest.mark.parametrize("dtype", DTYPES)
def test_segments_in_any_order(isa: str, dtype: Any, rng: Any) -> None:
    made = inputs(rng, 31, 140, batch=3, dtype=dtype)
    query_segments = rng.integers(-2, 3, (3, 31))
    key_segments = rng.integers(-2, 3, (3, 140))
    key_segments[1] = 9  # nobody's
    out, lse = check(*made, query_segments=query_segments, key_segments=key_segments)
    assert (out[1] == 0).all()
    assert (lse[1] == -np.inf).all()


def test_segments_wider_than_32_bits(isa: str) -> None:
    ours = np.array([[1, 2**32 + 1]])
    theirs = np.array([[1, 2**32 + 1, 2**33 + 1]])
    got = seen(2, 3, query_segments=ours, key_segments=theirs)
    np.testing.assert_array_equal(got, [[True, False, False], [False, True, False]])


def test_every_condition_must_allow(isa: str) -> None:
    mask = np.ones((6, 8), bool)
    mask[:, 3] = False
    bias = np.zeros(8, np.float32)
    bias[4] = -np.inf
    options: dict[str, Any] = {
        "causal": True,
        "window": (4, 9),
        "mask": mask,
        "bias": bias,
        "key_lengths": [7],
        "query_lengths": [5],
        "query_segments": np.array([[0, 0, 0, 1, 1, 1]]),
        "key_segments": np.array([[0, 0, 1, 1, 1, 1, 1, 1]]),
    }
    row, key = np.arange(6)[:, None], np.arange(8)
    position = row + 2  # 7 keys - 5 queries
    expected = (key <= position) & (key >= position - 4) & (key < 7) & (row < 5)
    expected &= (key != 3) & (key != 4) & ((row >= 3) == (key >= 2))
    np.testing.assert_array_equal(seen(6, 8, **options), expected)
