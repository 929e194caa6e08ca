"""Dropout: Philox against its authors' vectors, and that everything uses exactly the documented mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits, check, inputs
from kit_backward import assert_same_gradients, check_backward, d_outputs, gradients
from philox import keep_mask, kept_factor, philox4x32
from reference import Array

# counter, key, words: of the known-answer tests of Random123 (Salmon et al. 2011)
VECTORS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 0x299F31D0A4093822, 2**63, 2**64 - 1]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_known_answers_of_philox(counter: Any, key: Any, words: Any) -> None:
    assert tuple(int(word) for word in philox4x32(counter, key)) == words


def test_known_answers_of_the_library(isa: str) -> None:
    """The zero block: its eight values of 16 bits belong to the keys 0, 16, … 112 of the first query."""
    _, _, words = VECTORS[0]
    values = [word >> shift & 0xFFFF for word in words for shift in (0, 16)]
    for number, value in enumerate(values):
        for threshold, kept in ((value, True), (value + 1, False)):
            mask = attncore.dropout_mask(0, threshold / 65536, (1, 1, 1, 128))
            assert mask[0, 0, 0, 16 * number] == kept, f"value {number}, {value:#x}"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_mask_is_philox(isa: str, seed: int) -> None:
    for p, shape in ((0.1, (2, 3, 37, 300)), (0.5, (1, 1, 3, 5)), (0.97, (3, 1, 1, 1031))):
        mask = attncore.dropout_mask(seed, p, shape)
        assert mask.dtype == np.dtype(bool)
        assert mask.shape == shape
        np.testing.assert_array_equal(mask, keep_mask(seed, p, shape))


def test_chosen_rows(isa: str, rng: Any) -> None:
    rows = [7, 0, 7, 100_000, 2**31 - 1]
    shape = (2, 3, 2**31, 200)
    for given in (rows, np.array(rows), tuple(rows), np.array(rows, np.int32)):
        mask = attncore.dropout_mask(2**40, 0.3, shape, rows=given)
        np.testing.assert_array_equal(mask, keep_mask(2**40, 0.3, shape, rows))
    whole = attncore.dropout_mask(5, 0.3, (2, 3, 40, 200))
    part = attncore.dropout_mask(5, 0.3, (2, 3, 40, 200), rows=[3, -2])
    np.testing.assert_array_equal(part, whole[:, :, [3, 38]])


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (1, 1, 1, 1)])
def test_masks_of_little(isa: str, shape: Any) -> None:
    np.testing.assert_array_equal(attncore.dropout_mask(3, 0.5, shape), keep_mask(3, 0.5, shape))


def test_a_part_of_a_longer_mask(isa: str) -> None:
    """What is kept does not depend on how many there are."""
    whole = attncore.dropout_mask(9, 0.4, (3, 4, 50, 700))
    np.testing.assert_array_equal(
        attncore.dropout_mask(9, 0.4, (2, 3, 9, 131)), whole[:2, :3, :9, :131]
    )


@pytest.mark.parametrize("p", [0.0, 2.0**-16, 0.1, 0.25, 0.5, 0.9, 1 - 2.0**-16])
def test_statistics(isa: str, p: float) -> None:
    """The share that is kept, over all, by head and by column, within five standard deviations (and eight, of few)."""
    mask = attncore.dropout_mask(2024, p, (2, 8, 128, 512))
    expected, variance = 1 - p, p * (1 - p)
    for axes in ((0, 1, 2, 3), (0, 2, 3), (0, 1, 2), (1, 2, 3)):
        share = mask.mean(axis=axes)
        count = mask.size / share.size
        assert (np.abs(share - expected) <= 5 * np.sqrt(variance / count) + 8 / count).all()


def test_independence() -> None:
    """Neighbours in any direction, and seeds, agree by chance only."""
    mask = attncore.dropout_mask(1, 0.5, (4, 4, 128, 512))
    pairs = [(mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])]
    pairs += [(mask[:, :, 1:], mask[:, :, :-1]), (mask[..., 1:], mask[..., :-1])]
    pairs += [(mask[..., 16:], mask[..., :-16]), (mask[..., 128:], mask[..., :-128])]
    pairs += [(mask, attncore.dropout_mask(s, 0.5, mask.shape)) for s in (0, 2, 2**32 + 1)]
    for a, b in pairs:
        assert abs((a == b).mean() - 0.5) < 5 * 0.5 / np.sqrt(a.size)


def weights_of_forward(mask_shape: Any, dtype: Any, **options: Any) -> Array:
    """softmax of equal scores after dropout, read from out by values that are unit vectors."""
    batch, heads, queries, keys = mask_shape
    q = np.zeros((batch, heads, queries, 8), dtype)
    k = np.zeros((batch, heads, keys, 8), dtype)
    v = np.broadcast_to(np.eye(keys, dtype=np.float32).astype(dtype), (batch, heads, keys, keys))
    return attncore.attention(q, k, v, **options)


def weights_of_backward(mask_shape: Any, dtype: Any, **options: Any) -> Array:
    """The same from the gradient of value, by d_out that are unit vectors."""
    batch, heads, queries, keys = mask_shape
    q = np.zeros((batch, heads, queries, 8), dtype)
    k, v = np.zeros((batch, heads, keys, 8), dtype), np.zeros((batch, heads, keys, queries), dtype)
    unit = np.eye(queries, dtype=np.float32).astype(dtype)
    d_out = np.broadcast_to(unit, (batch, heads, queries, queries))
    return gradients(d_out, (q, k, v), **options)["value"].swapaxes(2, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", [weights_of_forward, weights_of_backward])
@pytest.mark.parametrize(
    "shape", [(2, 3, 37, 200), (1, 2, 130, 141), (1, 4, 1, 333), (3, 1, 17, 16)]
)
def test_exactly_this_mask(isa: str, dtype: Any, way: Any, shape: Any) -> None:
    """Dropped weights are 0, the others the uniform weight times the factor; on any number of threads."""
    seed, p = 2**33 + 5, 0.3
    expected = keep_mask(seed, p, shape)
    for threads in (1, 2, 3):
        weights = way(shape, dtype, dropout_p=p, seed=seed, num_threads=threads)
        np.testing.assert_array_equal(weights != 0, expected)
        kept = weights[expected].astype(np.float64)
        np.testing.assert_allclose(kept, kept_factor(p) / shape[3], rtol=1e-2)


def test_the_mask_of_few_rows_and_split_keys(isa: str) -> None:
    """Decoding: more than 1024 keys are split."""
    for shape in ((1, 2, 1, 2300), (2, 4, 3, 1100)):
        for way in (weights_of_forward, weights_of_backward):
            weights = way(shape, np.float32, dropout_p=0.5, seed=3)
            np.testing.assert_array_equal(weights != 0, keep_mask(3, 0.5, shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_dropout_has_the_same_bits(isa: str, dtype: Any, rng: Any) -> None:
    for queries in (1, 37):
        made = inputs(rng, queries, 1300, heads=4, kv_heads=2, dtype=dtype)
        d_out, d_lse = d_outputs(rng, made[0], made[2])
        out, lse = attncore.attention(*made, return_lse=True)
        same, its_lse = attncore.attention(*made, return_lse=True, dropout_p=0.0, seed=9)
        assert_same_bits(same, out)
        assert_same_bits(its_lse, lse)
        expected = gradients(d_out, made, d_lse=d_lse)
        assert_same_gradients(gradients(d_out, made, d_lse=d_lse, dropout_p=0, seed=4), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lse_knows_no_dropout(isa: str, dtype: Any, rng: Any) -> None:
    for queries in (1, 37):
        made = inputs(rng, queries, 1300, heads=4, kv_heads=2, dtype=dtype)
        _, lse = attncore.attention(*made, return_lse=True)
        _, dropped = attncore.attention(*made, return_lse=True, dropout_p=0.7, seed=9)
        assert_same_bits(dropped, lse)


COMBINED: dict[str, dict[str, Any]] = {
    "alone": {},
    "causal": {"causal": True},
    "window": {"window": (30, 5)},
    "lengths": {"key_lengths": [90, 41], "query_lengths": [20, 37], "causal": True},
    "offset": {"query_offset": np.array([-3, 60]), "causal": True},
    "softcap and sinks": {"softcap": 2.0, "sinks": np.array([0.1, 2, -1, 0, 1, 0.5], np.float32)},
    "alibi": {"alibi": np.array([0.1, 0.2, -0.1, 0, 1, 0.5], np.float32)},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.8])
@pytest.mark.parametrize("name", COMBINED)
def test_with_other_options(isa: str, dtype: Any, name: str, p: float, rng: Any) -> None:
    made = inputs(rng, 37, 90, batch=2, heads=6, kv_heads=2, dtype=dtype)
    d_out, d_lse = d_outputs(rng, made[0], made[2])
    options = {**COMBINED[name], "dropout_p": p, "seed": 2**50 + 1}
    check_backward(d_out, made, d_lse=d_lse, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 5])
def test_split_keys(isa: str, dtype: Any, queries: int, rng: Any) -> None:
    made = inputs(rng, queries, 2600, batch=2, heads=6, kv_heads=2, dtype=dtype)
    d_out, _ = d_outputs(rng, made[0], made[2])
    options: dict[str, Any] = {"dropout_p": 0.4, "seed": 1, "key_lengths": [2600, 1500]}
    check_backward(d_out, made, **options)


@pytest.mark.parametrize("p", [2.0**-16, 2.0**-17, 2.0**-18, 0.99, 1 - 2.0**-16, 1 - 2.0**-30])
def test_extreme_probabilities(isa: str, p: float, rng: Any) -> None:
    made = inputs(rng, 37, 300)
    d_out, _ = d_outputs(rng, made[0], made[2])
    check_backward(d_out, made, dropout_p=p, seed=1)


def test_rows_that_lose_all_their_keys(isa: str, rng: Any) -> None:
    """out 0 and no NaN, but lse is that of the row."""
    made = inputs(rng, 200, 2, heads=1)
    d_out, d_lse = d_outputs(rng, made[0], made[2])
    empty = ~keep_mask(8, 0.9, (1, 1, 200, 2)).any(axis=-1)
    assert empty.sum() > 100
    out, lse = check(*made, dropout_p=0.9, seed=8)
    assert (out[empty] == 0).all()
    assert np.isfinite(lse).all()
    check_backward(d_out, made, d_lse=d_lse, dropout_p=0.9, seed=8)


def test_expectation(isa: str, rng: Any) -> None:
    """Over seeds out is, on average, out without dropout."""
    made = inputs(rng, 16, 200, heads=2, dim=16)
    outs = np.stack([attncore.attention(*made, dropout_p=0.3, seed=s) for s in range(400)])
    mean, spread = outs.mean(axis=0), outs.std(axis=0) / np.sqrt(len(outs))
    assert (np.abs(mean - attncore.attention(*made)) < 6 * spread + 1e-6).all()
    assert spread.max() > 1e-3


@pytest.mark.parametrize("kind", [int, np.int64, np.uint64, np.int32])
def test_seeds_of_any_integer_type(isa: str, kind: Any, rng: Any) -> None:
    made = inputs(rng, 5, 30)
    expected = attncore.attention(*made, dropout_p=0.5, seed=77)
    assert_same_bits(attncore.attention(*made, dropout_p=0.5, seed=kind(77)), expected)
    np.testing.assert_array_equal(
        attncore.dropout_mask(kind(77), 0.5, (1, 1, 3, 9)), keep_mask(77, 0.5, (1, 1, 3, 9))
    )


def test_ranks_and_layouts_share_the_mask(isa: str, rng: Any) -> None:
    """Fewer axes mean batch entry 0 and head 0."""
    made = inputs(rng, 9, 30, batch=2, heads=3)
    options: dict[str, Any] = {"dropout_p": 0.4, "seed": 6}
    whole = attncore.attention(*made, **options)
    swapped = [a.transpose(0, 2, 1, 3) for a in made]
    assert_same_bits(
        attncore.attention(*swapped, layout="bshd", **options), whole.transpose(0, 2, 1, 3)
    )
    assert_same_bits(attncore.attention(*(a[0] for a in made), **options), whole[0])
    assert_same_bits(attncore.attention(*(a[0, 0] for a in made), **options), whole[0, 0])
    assert_same_bits(attncore.attention(*(a[:1] for a in made), **options), whole[:1])
    assert not np.array_equal(whole[0], attncore.attention(*(a[1] for a in made), **options))
