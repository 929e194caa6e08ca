"""precision= of packed sequences, pages, caches and layers, and what refuses it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import attncore
from kit import assert_same_bits, inputs
from kit_paged import into_pages
from kit_precision import MEDIUM, ROUNDING, TILES, assert_same, run


def test_packed_sequences(isa: str, rng: np.random.Generator) -> None:
    """Few rows, many, none: each has the bits that it has alone."""
    ends = np.cumsum([0, 3, 40, 0, 9])
    q, k, v = (rng.standard_normal((int(ends[-1]), n, 24)).astype(np.float32) for n in (6, 2, 2))
    out, lse = attncore.attention_varlen(q, k, v, ends, ends, return_lse=True, **MEDIUM)
    for first, end in itertools.pairwise(ends):
        alone = tuple(a[first:end].swapaxes(0, 1) for a in (q, k, v))
        expected = run(alone, **MEDIUM)
        assert_same((out[first:end].swapaxes(0, 1), lse[:, first:end]), expected)


@pytest.mark.parametrize("rows", [2, 33])
def test_pages(isa: str, rows: int, rng: np.random.Generator) -> None:
    q, k, v = inputs(rng, rows, 300, batch=3, heads=6, kv_heads=2, value_dim=17)
    paged = into_pages(rng, k, v, [300, 41, 0], 16)
    assert_same(paged.attend(q, **MEDIUM), paged.attend_gathered(q, **MEDIUM))


def test_pages_that_are_shared(isa: str, rng: np.random.Generator) -> None:
    """Sequences of few rows and of many read a prefix together."""
    q, k, v = inputs(rng, 12, 1300, batch=3, dim=24, value_dim=72)
    k[:], v[:] = k[:1], v[:1]
    table = np.tile(np.arange(82), (3, 1))
    pools = [np.zeros((82 * 16, *a.shape[1::2]), np.float32) for a in (k, v)]
    for pool, array in zip(pools, (k, v), strict=True):
        pool[:1300] = array[0].swapaxes(0, 1)
    keys, values = (pool.reshape(82, 16, *pool.shape[1:]) for pool in pools)
    lengths: dict[str, Any] = {"query_lengths": [12, 3, 12], "causal": True}
    for view in (keys, np.repeat(keys, 2, axis=3)[..., ::2]):
        ours = attncore.attention_paged(
            q, view, values, table, [1300] * 3, return_lse=True, **MEDIUM, **lengths
        )
        assert_same(ours, run((q, k, v), **MEDIUM, **lengths))


@pytest.mark.parametrize("rows", [1, 20])
def test_caches(isa: str, rows: int, rng: np.random.Generator) -> None:
    q, k, v = inputs(rng, rows, 90, heads=4)
    cache = attncore.KVCache(1, 4, 32, capacity=100)
    cache.append(k, v)
    ours = cache.attend(q, return_lse=True, **MEDIUM)
    assert_same(ours, run((q, k, v), causal=True, **MEDIUM))


def test_the_layer(isa: str, rng: np.random.Generator) -> None:
    layer = attncore.MultiHeadAttention(32, 2, seed=1, add_bias_kv=True)
    x = rng.standard_normal((2, 40, 32)).astype(np.float32)
    medium, highest = layer(x, precision="medium"), layer(x)
    high = layer(x, precision="high")
    assert (high != highest).any() == (isa in TILES)
    np.testing.assert_allclose(high, highest, rtol=0, atol=2.0**-13 * np.abs(highest).max())
    assert (medium != highest).any() == (isa in ROUNDING)
    np.testing.assert_allclose(medium, highest, rtol=0, atol=2.0**-6 * np.abs(highest).max())


def test_gradients_and_weights_are_exact(isa: str, rng: np.random.Generator) -> None:
    made = inputs(rng, 30, 61)
    out, lse = run(made)
    d, expected = (
        attncore.attention_backward(out, *made, out, lse, **option) for option in (MEDIUM, {})
    )
    for name in ("query", "key", "value"):
        assert_same_bits(getattr(d, name), getattr(expected, name), name)
    weights = attncore.attention_weights(made[0], made[1], **MEDIUM)
    assert_same_bits(weights, attncore.attention_weights(made[0], made[1]), "weights")


def test_explain_says_what_is_taken(isa: str, rng: np.random.Generator) -> None:
    made = inputs(rng, 30, 61)
    kernels = {
        p: attncore.explain(*made, precision=p).kernel for p in ("highest", "high", "medium")
    }
    assert kernels["highest"] == attncore.explain(*made).kernel
    assert (kernels["high"] != kernels["highest"]) == (isa in TILES)
    assert ("bf16" in kernels["medium"]) == (isa in ROUNDING)
    assert (kernels["medium"] != kernels["highest"]) == (isa in ROUNDING)


@pytest.mark.parametrize(
    ("precision", "error", "message"),
    [
        ("low", ValueError, "precision: is 'low', must be 'highest', 'high' or 'medium'"),
        ("", ValueError, "precision: is '', must be"),
        ("Medium", ValueError, "precision: is 'Medium'"),
        (None, TypeError, "precision: must be 'highest', 'high' or 'medium', is NoneType"),
        (1, TypeError, "precision: must be .*, is int"),
        (b"medium", TypeError, "precision: must be .*, is bytes"),
    ],
)
def test_errors(precision: Any, error: type[Exception], message: str) -> None:
    x = np.zeros((1, 2, 3, 4), np.float32)
    packed, ends = np.zeros((3, 2, 4), np.float32), [0, 3]
    pages, cache = np.zeros((1, 3, 2, 4), np.float32), attncore.KVCache(1, 2, 4, capacity=4)
    cache.append(x, x)
    calls = (
        lambda: attncore.attention(x, x, x, precision=precision),
        lambda: attncore.attention_varlen(packed, packed, packed, ends, ends, precision=precision),
        lambda: attncore.attention_paged(x, pages, pages, [[0]], [3], precision=precision),
        lambda: attncore.explain(x, x, x, precision=precision),
        lambda: attncore.attention_weights(x, x, precision=precision),
        lambda: cache.attend(x, precision=precision),
    )
    for call in calls:
        with pytest.raises(error, match=message):
            call()
