"""Contract: mask and bias, broadcasting and -inf."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import BFLOAT16, DTYPES, assert_same_bits, check, inputs

BATCH, HEADS, ROWS, KEYS = 2, 6, 19, 75
BROADCAST = [
    (),
    (1,),
    (KEYS,),
    (ROWS, KEYS),
    (ROWS, 1),
    (1, KEYS),
    (HEADS, ROWS, KEYS),
    (HEADS, 1, 1),
    (1, ROWS, KEYS),
    (BATCH, 1, 1, KEYS),
    (BATCH, HEADS, 1, 1),
    (1, HEADS, ROWS, 1),
    (BATCH, HEADS, ROWS, KEYS),
]


@pytest.mark.parametrize("shape", BROADCAST)
def test_mask_broadcasts(isa: str, shape: tuple[int, ...], rng: Any) -> None:
    made = inputs(rng, ROWS, KEYS, batch=BATCH, heads=HEADS, kv_heads=2)
    mask = np.asarray(rng.random(shape) < 0.6)
    check(*made, mask=mask)
    check(*made, mask=mask, causal=True)


@pytest.mark.parametrize("shape", BROADCAST)
def test_bias_broadcasts(isa: str, shape: tuple[int, ...], rng: Any) -> None:
    made = inputs(rng, ROWS, KEYS, batch=BATCH, heads=HEADS, kv_heads=2)
    bias = np.asarray(rng.standard_normal(shape), np.float32)
    check(*made, bias=bias)
    check(*made, bias=bias, causal=True)


@pytest.mark.parametrize("shape", [(KEYS,), (HEADS, ROWS, KEYS), (1, 1, ROWS, KEYS)])
def test_three_dimensional_inputs_take_masks_of_every_rank(isa: str, shape: Any, rng: Any) -> None:
    q, k, v = (a[0] for a in inputs(rng, ROWS, KEYS, heads=HEADS))
    check(q, k, v, mask=rng.random(shape) < 0.6, bias=np.float32(rng.random(shape)))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_mask_and_bias_keep_their_axes_in_every_layout(isa: str, layout: str, rng: Any) -> None:
    made = inputs(rng, ROWS, KEYS, batch=BATCH, heads=HEADS)
    mask = rng.random((BATCH, HEADS, ROWS, KEYS)) < 0.6
    bias = np.float32(rng.standard_normal((HEADS, ROWS, KEYS)))
    if layout == "bshd":
        q, k, v = (np.ascontiguousarray(a.transpose(0, 2, 1, 3)) for a in made)
        out, lse = check(q, k, v, mask=mask, bias=bias, layout="bshd")
        assert lse.shape == (BATCH, HEADS, ROWS)
        expected = attncore.attention(*made, mask=mask, bias=bias)
        assert_same_bits(np.ascontiguousarray(out.transpose(0, 2, 1, 3)), expected)
    else:
        check(*made, mask=mask, bias=bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own", [False, True])
def test_bias_dtypes(isa: str, dtype: Any, own: bool, rng: Any) -> None:
    made = inputs(rng, ROWS, KEYS, heads=HEADS, dtype=dtype)
    bias = rng.standard_normal((HEADS, ROWS, KEYS)).astype(dtype if own else np.float32)
    check(*made, bias=bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_a_tuple_of_biases_adds_up(isa: str, dtype: Any, count: int, rng: Any) -> None:
    made = inputs(rng, ROWS, KEYS, batch=BATCH, heads=HEADS, dtype=dtype)
    shapes = [BROADCAST[(3 * i + 2) % len(BROADCAST)] for i in range(count)]
    biases = tuple(
        np.asarray(rng.standard_normal(shape)).astype(dtype if i % 2 else np.float32)
        for i, shape in enumerate(shapes)
    )
    check(*made, bias=biases)
    first = attncore.attention(*made, bias=biases)
    assert_same_bits(first, attncore.attention(*made, bias=list(biases)))


def test_no_biases_at_all(isa: str, rng: Any) -> None:
    made = inputs(rng, 5, 9)
    assert_same_bits(attncore.attention(*made, bias=()), attncore.attention(*made))


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_infinity_in_a_bias_is_a_mask(isa: str, dtype: Any, rng: Any) -> None:
    made = inputs(rng, ROWS, KEYS, heads=HEADS, dtype=dtype)
    mask = rng.random((HEADS, ROWS, KEYS)) < 0.5
    mask[0, 3] = False  # a row that sees nothing
    bias = np.where(mask, 0, -np.inf).astype(dtype)
    out, lse = check(*made, bias=bias)
    assert (out[0, 0, 3] == 0).all()
    assert lse[0, 0, 3] == -np.inf
    masked = attncore.attention(*made, mask=mask)
    np.testing.assert_allclose(np.float64(out), np.float64(masked), atol=1e-2)


def test_minus_infinity_in_one_of_several_biases(isa: str, rng: Any) -> None:
    made = inputs(rng, ROWS, KEYS, heads=HEADS)
    large = np.full((ROWS, 1), 1e30, np.float32)
    masked = np.where(rng.random(KEYS) < 0.5, np.float32(0), np.float32(-np.inf))
    out, _ = check(*made, bias=(large, masked))
    assert np.isfinite(out).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("of", ["float32", "own"])
def test_rows_of_the_lowest_finite_bias_stay_uniform(
    isa: str, dtype: Any, causal: bool, of: str, rng: Any
) -> None:
    """finfo.min, the additive mask of some libraries, is not -inf: the row is visible, uniform."""
    made = inputs(rng, 9, 40, dtype=dtype)
    own = np.dtype(dtype if of == "own" else np.float32)
    lowest = -3.3895e38 if own == BFLOAT16 else float(np.finfo(own).min)
    bias = np.zeros((9, 40), own)
    bias[4:] = lowest
    out, lse = check(*made, bias=bias, causal=causal)
    if own == np.float16:
        return  # -65504 leaves room for the scores: the comparison above says it all
    position = 40 - 9 + 6
    values = np.float64(made[2][0, :, : position + 1 if causal else 40])
    atol = {2: 1e-2, 4: 1e-6, 8: 1e-6}[made[0].dtype.itemsize]
    np.testing.assert_allclose(np.float64(out[0, :, 6]), values.mean(axis=1), atol=atol)
    assert np.isfinite(lse).all()


def test_the_lowest_finite_bias_beside_others_hides(isa: str, rng: Any) -> None:
    made = inputs(rng, 9, 40)
    hidden = rng.random((9, 40)) < 0.5
    hidden[:, 0] = False
    bias = np.where(hidden, np.finfo(np.float32).min, 0).astype(np.float32)
    check(*made, bias=bias)
    out = attncore.attention(*made, bias=bias)
    np.testing.assert_allclose(out, attncore.attention(*made, mask=~hidden), atol=1e-6)


def test_tiles_of_a_mask_that_are_all_false(isa: str, rng: Any) -> None:
    """Whole tiles are skipped; which, must not show."""
    made = inputs(rng, 300, 1100, heads=1, dim=16)
    for _ in range(4):
        mask = np.kron(rng.random((6, 11)) < 0.3, np.ones((50, 100), bool))
        mask[rng.integers(300), rng.integers(1100)] = True
        check(*made, mask=mask)
    check(*made, mask=np.zeros((300, 1100), bool))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 4, 6, 110])
@pytest.mark.parametrize("per_head", [False, True], ids=["a line", "a line a head"])
def test_padding_has_the_bits_of_lengths(
    isa: str, dtype: Any, queries: int, per_head: bool, rng: Any
) -> None:
    """Tiles end with the last key that a line of the mask leaves; what is hidden there may hold anything."""
    lengths = np.array([0, 1, 16, 127, 128, 131, 200, 300])
    if queries == 6:  # of fewer keys by their lengths, so many rows are multiplied in another way
        lengths = np.maximum(lengths, 64)
    q, k, v = inputs(rng, queries, 300, batch=len(lengths), heads=3, dim=24, dtype=dtype)
    mask = (np.arange(300) < lengths[:, None])[:, None, None, :]
    for entry, length in enumerate(lengths):
        k[entry, :, length:] = v[entry, :, length:] = np.nan
    given = np.repeat(mask, 3, axis=1) if per_head else mask
    masked = attncore.attention(q, k, v, mask=given, return_lse=True)
    short = attncore.attention(q, k, v, key_lengths=lengths, return_lse=True)
    assert_same_bits(masked[0], short[0])
    assert_same_bits(masked[1], short[1], "lse")
    given[:, :, :, ::3] = False  # holes
    check(q, k, v, mask=given)
