"""attention_weights: the probabilities of chosen rows, and the largest of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits, inputs, near
from reference import accumulation, reference

WEIGHTS: dict[str, dict[str, Any]] = {
    "no option": {},
    "causal": {"causal": True},
    "many": {
        "window": (20, 3),
        "softcap": 2.0,
        "alibi": np.array([0.1, 0.2, 0.3, 0.4], np.float32),
        "sinks": np.array([0.5, -1, 2, 0], np.float32),
        "key_lengths": [60, 33],
        "mask": np.arange(70) % 5 != 0,
        "bias": np.linspace(-1, 1, 70, dtype=np.float32),
    },
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", WEIGHTS)
@pytest.mark.parametrize("rows", [None, [0], [3, -1, 3], np.array([10, 2], np.int32), (), range(4)])
def test_weights(isa: str, dtype: Any, option: str, rows: Any, rng: Any) -> None:
    q, k, v = inputs(rng, 21, 70, batch=2, heads=4, kv_heads=2, dtype=dtype)
    weights = attncore.attention_weights(q, k, rows=rows, **WEIGHTS[option])
    expected = reference(q, k, v, **WEIGHTS[option]).weights
    if rows is not None:
        expected = expected[:, :, np.asarray(list(rows), np.int64)]
    assert weights.dtype == accumulation(q.dtype)
    assert weights.shape == expected.shape
    near(weights, expected)
    assert ((weights == 0) == (expected == 0)).all()


@pytest.mark.parametrize(
    "options", [{"causal": True}, {"causal": True, "window": (150, 0)}, {"window": (9, 20)}]
)
@pytest.mark.parametrize("rows", [[0, 150, 151, 299], [299, 5, 140]])
def test_weights_of_rows_far_apart(
    isa: str, options: dict[str, Any], rows: list[int], rng: Any
) -> None:
    q, k, v = inputs(rng, 300, 300, heads=3)
    weights = attncore.attention_weights(q, k, rows=rows, **options)
    near(weights, reference(q, k, v, **options).weights[:, :, rows])
    assert_same_bits(weights, attncore.attention_weights(q, k, **options)[:, :, rows])


def test_weights_of_fewer_axes(isa: str, rng: Any) -> None:
    q, k, _ = inputs(rng, 5, 9, heads=3)
    whole = attncore.attention_weights(q, k, rows=[1, 4])
    assert_same_bits(attncore.attention_weights(q[0], k[0], rows=[1, 4]), whole[0])
    assert_same_bits(attncore.attention_weights(q[0, 0], k[0, 0], rows=[1, 4]), whole[0, 0])
    swapped = [a.transpose(0, 2, 1, 3) for a in (q, k)]
    assert_same_bits(attncore.attention_weights(*swapped, rows=[1, 4], layout="bshd"), whole)
    tokens = [a[0].swapaxes(0, 1) for a in (q, k)]
    last = attncore.attention_weights(*tokens, rows=[-4, -1], layout="bshd")
    assert_same_bits(last, whole[0])
    indices, top = attncore.attention_weights(q[0, 0], k[0, 0], top_k=2)
    assert indices.shape == top.shape == (5, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", WEIGHTS)
@pytest.mark.parametrize("count", [1, 3, 70])
def test_top_k(isa: str, dtype: Any, option: str, count: int, rng: Any) -> None:
    q, k, _ = inputs(rng, 21, 70, batch=2, heads=4, kv_heads=2, dtype=dtype)
    rows = [0, 7, -1]
    full = attncore.attention_weights(q, k, rows=rows, **WEIGHTS[option])
    indices, top = attncore.attention_weights(q, k, rows=rows, top_k=count, **WEIGHTS[option])
    assert indices.dtype == np.int64
    assert indices.shape == top.shape == (2, 4, 3, count)
    order = np.argsort(-full, axis=-1, kind="stable")[..., :count]
    ranked = np.take_along_axis(full, order, axis=-1)
    near(top, ranked)
    assert (np.diff(top, axis=-1) <= 0).all()
    found = indices >= 0
    assert (found == (ranked > 0)).all()
    assert (top[~found] == 0).all()
    near(np.take_along_axis(full, np.where(found, indices, 0), axis=-1)[found], top[found])


def test_top_k_of_equal_probabilities(isa: str) -> None:
    q, k = np.zeros((1, 1, 2, 4), np.float32), np.zeros((1, 1, 50, 4), np.float32)
    indices, top = attncore.attention_weights(q, k, top_k=4, causal=True, query_offset=1)
    np.testing.assert_array_equal(indices[0, 0], [[0, 1, -1, -1], [0, 1, 2, -1]])
    np.testing.assert_allclose(top[0, 0], [[0.5, 0.5, 0, 0], [1 / 3, 1 / 3, 1 / 3, 0]], rtol=1e-6)


def test_top_k_of_long_rows(isa: str, rng: Any) -> None:
    q, k, v = inputs(rng, 3, 6000, heads=2, dim=16)
    indices, top = attncore.attention_weights(q, k, top_k=20, scale=1.0)
    weights = reference(q, k, v, scale=1.0).weights
    np.testing.assert_allclose(top, -np.sort(-weights, axis=-1)[..., :20], rtol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(weights, indices, axis=-1), top, rtol=1e-4)
