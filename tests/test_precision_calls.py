"""precision= of packed sequences, pages, caches and layers, and what refuses it."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attncore
from kit import assert_same_bits, inputs
from kit_paged import into_pages
from kit_precision import FEW, MEDIUM, ROUNDING, TILES, assert_same, run
from reference import Array


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


@pytest.mark.parametrize("rows", [4, 30])
def test_the_state(isa: str, rows: int, tmp_path: Path, rng: np.random.Generator) -> None:
    """Of each piece's products; it goes on so after a break."""
    q, k, v = inputs(rng, rows, 300, heads=4, kv_heads=2)
    pieces = [(k[:, :, :100], v[:, :, :100]), (k[:, :, 100:], v[:, :, 100:])]

    def result(precision: Any, **options: Any) -> tuple[Array, Array]:
        state = attncore.AttentionState(q, precision=precision, **options)
        for piece in pieces:
            state = pickle.loads(pickle.dumps(state))
            state.update(*piece)
        assert ("precision='medium'" in repr(state)) == (precision == "medium")
        return state.result()

    whole = attncore.AttentionState(q, **MEDIUM)
    whole.update(k, v)
    assert_same_bits(whole.result()[0], run((q, k, v), **MEDIUM)[0])
    medium, highest = result("medium"), result("highest")
    assert_same(result("high"), highest)
    rounds = isa in ROUNDING and 2 * rows > FEW
    assert (medium[0] != highest[0]).any() == rounds
    np.testing.assert_allclose(medium[0], highest[0], rtol=0, atol=2.0**-6)
    np.testing.assert_allclose(medium[1], highest[1], rtol=0, atol=2.0**-6)
    for first, second in (("medium", "highest"), ("highest", "medium")):
        states = [attncore.AttentionState(q, precision=p) for p in (first, second)]  # type: ignore[arg-type]
        for state, piece in zip(states, pieces, strict=True):
            state.update(*piece)
        states[0].merge(states[1])
        assert (states[0].result()[0] != highest[0]).any() == rounds
        np.testing.assert_allclose(states[0].result()[0], highest[0], rtol=0, atol=2.0**-6)
    pytest.importorskip("safetensors")
    state = attncore.AttentionState(q, **MEDIUM)
    state.save(tmp_path / "state")
    state = attncore.AttentionState.load(tmp_path / "state")
    for piece in pieces:
        state.update(*piece)
    assert_same(state.result(), medium)


def test_the_state_of_other_dtypes(isa: str, rng: np.random.Generator) -> None:
    """float64 and bfloat16 take the option and don't change."""
    for dtype in (np.float64, np.float16):
        q, k, v = inputs(rng, 30, 61, dtype=np.dtype(dtype))
        results = []
        for precision in ("highest", "medium"):
            state = attncore.AttentionState(q, precision=precision)
            state.update(k, v)
            results.append(state.result())
        assert_same(*results)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_torchs_signature(isa: str, precision: Any, rng: np.random.Generator) -> None:
    made = inputs(rng, 30, 61)
    ours = attncore.scaled_dot_product_attention(*made, is_causal=True, precision=precision)
    theirs = attncore.attention(*made, causal=True, query_offset=0, precision=precision)
    assert_same_bits(ours, theirs)


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
        lambda: attncore.AttentionState(x, precision=precision),
        lambda: attncore.scaled_dot_product_attention(x, x, x, precision=precision),
        lambda: attncore.explain_varlen(packed, packed, packed, ends, ends, precision=precision),
        lambda: attncore.explain_paged(x, pages, pages, [[0]], [3], precision=precision),
    )
    for call in calls:
        with pytest.raises(error, match=message):
            call()
