"""Rotary embeddings with frequencies and a factor of their own, in rope, layers and caches."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attncore
from cache_kit import KINDS, STORAGE, make_cache, query_dtype
from kit import DTYPES, assert_same_bits, normal
from reference import accumulation
from rule import assert_close_by_rule
from test_rope import exact_angles, rotate

FREQUENCIES = [1.0, -0.3, 0.017, 0.0, 1e-9]
STRETCHED = attncore.Rotary(frequencies=FREQUENCIES, factor=1.25)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [10, 17])
@pytest.mark.parametrize("tokens", [1, 40])
def test_frequencies_and_factor(
    isa: str, dtype: Any, interleaved: bool, dim: int, tokens: int, rng: np.random.Generator
) -> None:
    rotary = attncore.Rotary(interleaved=interleaved, frequencies=FREQUENCIES, factor=1.25)
    x = rng.standard_normal((2, 3, tokens, dim)).astype(np.float32).astype(dtype)
    positions = rng.integers(-3000, 3000, tokens)
    for inverse in (False, True):
        got = attncore.rope(x, positions, rotary=rotary, inverse=inverse)
        at = -positions if inverse else positions
        angles = exact_angles(at, FREQUENCIES)
        exact = rotate(x, angles, interleaved, np.float64, 1.25)
        plainly = rotate(x, angles, interleaved, accumulation(x.dtype), 1.25).astype(dtype)
        assert_close_by_rule(got, exact, plainly, float(np.abs(exact).max()))
    assert_same_bits(got[..., 10:], x[..., 10:])


@pytest.mark.parametrize("frequency", [1.5, 1e3 / 3, 1e14 + 0.3, -1e50 / 3])
def test_high_frequencies(frequency: float) -> None:
    """The angle is exact, whatever its size: alone, and beside the others of a longer call."""
    positions = np.array([3, 5, 7, 15, 16, 47, 1023, -13])
    rotary = attncore.Rotary(frequencies=[frequency])
    x = np.broadcast_to([[1.0, 0.0]], (64, 2)).copy()
    exact = rotate(x[:8], exact_angles(positions, [frequency]), False, np.float64)
    alone = np.concatenate([attncore.rope(x[:1], [p], rotary=rotary) for p in positions])
    np.testing.assert_allclose(alone, exact, rtol=0, atol=1e-15)
    assert_same_bits(attncore.rope(x, np.resize(positions, 64), rotary=rotary)[:8], alone)


def test_powers_of_a_base_are_the_default(rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 50, 12))
    powers = 500.0 ** (-2.0 * np.arange(4) / 8)
    for rotary in (attncore.Rotary(500.0, 8), attncore.Rotary(1.0, frequencies=powers)):
        assert_same_bits(
            attncore.rope(x, rotary=rotary), attncore.rope(x, base=500.0, dims=8), "turned"
        )


def test_a_factor_belongs_to_the_gradient(rng: np.random.Generator) -> None:
    """⟨d, rope(x)⟩ is linear in x: its gradient is rope(d, inverse=True)."""
    x, d = rng.standard_normal((2, 3, 7, 12))
    forward = (d * attncore.rope(x, rotary=STRETCHED)).sum()
    back = (attncore.rope(d, rotary=STRETCHED, inverse=True) * x).sum()
    np.testing.assert_allclose(forward, back, rtol=1e-13)


def test_layer(rng: np.random.Generator) -> None:
    """Frequencies and factor in the forward, and through its gradient by differences."""
    layer = attncore.MultiHeadAttention(20, 2, rotary=STRETCHED, dtype=np.float64, seed=1)
    x, d_y = rng.standard_normal((2, 2, 6, 20))
    weight, bias, out_weight = (
        layer.parameters()[name] for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight")
    )
    q, k, v = (
        attncore.linear(x, weight[i : i + 20], bias[i : i + 20]).reshape(2, 6, 2, 10).swapaxes(1, 2)
        for i in (0, 20, 40)
    )
    q, k = attncore.rope(q, rotary=STRETCHED), attncore.rope(k, rotary=STRETCHED)
    heads = attncore.attention(q, k, v).swapaxes(1, 2).reshape(2, 6, 20)
    expected = attncore.linear(heads, out_weight)
    np.testing.assert_allclose(layer(x), expected, rtol=0, atol=1e-12)
    d_x, step = layer.backward(d_y), rng.standard_normal(x.shape)
    change = ((layer(x + 1e-6 * step) - layer(x - 1e-6 * step)) * d_y).sum() / 2e-6
    np.testing.assert_allclose((d_x * step).sum(), change, rtol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_cache_and_its_file(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    pytest.importorskip("safetensors")
    cache = make_cache(kind, 1, 2, 12, rotary=STRETCHED)
    key = normal(rng, 1, 2, 9, 12)
    cache.append(key, key)
    assert_same_bits(cache.gather(0)[0], attncore.rope(key[0], rotary=STRETCHED))
    cache.save(tmp_path / "cache")
    same = make_cache(kind, 1, 2, 12, rotary=pickle.loads(pickle.dumps(STRETCHED)))
    same.load(tmp_path / "cache")
    assert_same_bits(same.gather(0)[0], cache.gather(0)[0])
    for other in (attncore.Rotary(frequencies=FREQUENCIES), attncore.Rotary(factor=1.25)):
        with pytest.raises(ValueError, match="rotary="):
            make_cache(kind, 1, 2, 12, rotary=other).load(tmp_path / "cache")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frequencies": []}, r"frequencies: shape is \(0,\)"),
        ({"frequencies": [[1.0]]}, r"frequencies: shape is \(1, 1\)"),
        ({"frequencies": [1.0] * 7}, r"frequencies: has 7, must have at most 6"),
        ({"frequencies": [1.0] * 7, "dims": 14}, r"dims: is 14, must be even and at most 12"),
        ({"frequencies": [1.0] * 3, "dims": 8}, r"frequencies: has 3, must have 4, one for each"),
        ({"frequencies": [1.0, np.nan]}, r"frequencies: has nan, must be within"),
        ({"frequencies": [1.0, -1e101]}, r"frequencies: has -1e\+101, must be within"),
        ({"factor": 0.0}, r"factor: is 0, must be 1e-30 … 1e\+30"),
        ({"factor": 1e39}, r"factor: is 1e\+39"),
        ({"factor": np.inf}, r"factor: is inf"),
        ({"base": 0}, r"base: is 0, must be finite"),
        ({"dims": 0}, r"dims: is 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    x = np.ones((1, 12), np.float32)
    for use in (
        lambda rotary: attncore.rope(x, rotary=rotary),
        lambda rotary: attncore.KVCache(1, 1, 12, capacity=1, rotary=rotary),
        lambda rotary: attncore.MultiHeadAttention(24, 2, rotary=rotary),
    ):
        with pytest.raises(ValueError, match=message):
            use(attncore.Rotary(**settings))


@pytest.mark.parametrize(
    "frequencies", ["abc", ["1.5"], [True], [1 + 2j], [1.0, None], [[1.0], [2.0, 3.0]], [10**400]]
)
def test_frequencies_that_are_no_numbers(frequencies: Any) -> None:
    with pytest.raises(TypeError, match=r"frequencies: (dtype is|must be)"):
        attncore.Rotary(frequencies=frequencies)


def test_bad_rotary() -> None:
    x: Any = np.ones((1, 12), np.float32)
    with pytest.raises(TypeError, match="rotary: must be a Rotary or None, is float"):
        attncore.rope(x, rotary=1e4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rotary: comes without base, dims and interleaved"):
        attncore.rope(x, rotary=STRETCHED, base=500.0)
    with pytest.raises(TypeError, match="factor: must be a number"):
        attncore.rope(x, rotary=attncore.Rotary(factor=None))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dims: is 7, all of a head's, must be even"):
        attncore.rope(x[:, :7])


# ---- queries that a cache rotates -----------------------------------------------------------------------------------

LENGTHS, NEW = [23, 0, 9, 40], [3, 1, 3, 2]


def ragged(kind: str, rng: np.random.Generator, **settings: Any) -> Any:
    cache = make_cache(kind, 4, 2, 12, rotary=STRETCHED, page_size=8, **settings)
    tokens = normal(rng, 4, 2, 40, 12)
    cache.append(tokens, *(() if settings.get("value_in_key") else (tokens,)), lengths=LENGTHS)
    return cache


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_rotated_queries(
    isa: str, kind: str, storage: str, layout: Any, rng: np.random.Generator
) -> None:
    """Ragged new tokens of chosen entries: the last one stands at the entry's last."""
    cache = ragged(kind, rng, dtype=storage)
    entries = [3, 1, 0]
    query = normal(rng, 3, 4, 3, 12, dtype=query_dtype(storage))
    first = np.array([LENGTHS[e] - NEW[e] for e in entries])
    by_hand = attncore.rope(query, first[:, None] + np.arange(3), rotary=STRETCHED)
    if layout == "bshd":
        query, by_hand = query.swapaxes(1, 2), by_hand.swapaxes(1, 2)
    new = [NEW[e] for e in entries]
    options: dict[str, Any] = {"entries": entries, "query_lengths": new, "layout": layout}
    got = cache.attend(query, rotate_query=True, **options)
    assert_same_bits(got, cache.attend(by_hand, **options))
    alone = cache.attend(query[0], entries=3, query_lengths=2, layout=layout, rotate_query=True)
    assert_same_bits(alone, got[0])


@pytest.mark.parametrize("kind", KINDS)
def test_rotated_queries_of_a_tree(kind: str, rng: np.random.Generator) -> None:
    """A token of a tree stands as deep as it is."""
    cache = ragged(kind, rng)
    parents = np.array([[-1, 0, 0, 1, 3], [-1, -1, 1, 2, 0]])
    depth = np.array([[0, 1, 1, 2, 3], [0, 0, 1, 2, 1]])
    query = normal(rng, 2, 4, 5, 12)
    positions = np.array([23, 40])[:, None] - 5 + depth
    options: dict[str, Any] = {"entries": [0, 3], "tree_parents": parents}
    by_hand = attncore.rope(query, positions, rotary=STRETCHED)
    got = cache.attend(query, rotate_query=True, **options)
    assert_same_bits(got, cache.attend(by_hand, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_rotated_queries_of_latent_keys(kind: str, rng: np.random.Generator) -> None:
    """Only the dims past the values are rotated."""
    rotary = attncore.Rotary(base=100.0, interleaved=True)
    settings: dict[str, Any] = {"value_dim": 8, "value_in_key": True, "rotary": rotary}
    cache = make_cache(kind, 2, 1, 12, **settings)
    cache.append(normal(rng, 2, 1, 30, 12), lengths=[30, 4])
    query = normal(rng, 2, 16, 2, 12)
    by_hand = query.copy()
    positions = np.array([[28, 29], [2, 3]])
    by_hand[..., 8:] = attncore.rope(query[..., 8:], positions, rotary=rotary)
    assert_same_bits(cache.attend(query, rotate_query=True), cache.attend(by_hand))


@pytest.mark.parametrize("kind", KINDS)
def test_rotate_query_refused(kind: str, rng: np.random.Generator) -> None:
    cache, query = make_cache(kind, 1, 2, 12), normal(rng, 1, 4, 1, 12)
    cache.append(query[:, :2], query[:, :2])
    with pytest.raises(ValueError, match="rotate_query: is given, but the cache has no rotary"):
        cache.attend(query, rotate_query=True)
    with pytest.raises(TypeError, match="rotate_query: must be a bool, is int"):
        cache.attend(query, rotate_query=1)  # type: ignore[call-overload]
    rotating = make_cache(kind, 1, 2, 12, rotary=True)
    rotating.append(query[:, :2], query[:, :2])
    for memory in (query, query[:, ::-1]):
        with pytest.raises(ValueError, match="out: overlaps query"):
            rotating.attend(query, rotate_query=True, out=memory)
    with pytest.raises(ValueError, match="query_lengths"):
        rotating.attend(query, rotate_query=True, query_lengths=2)


def test_like_the_whole_sequence_at_once(isa: str, rng: np.random.Generator) -> None:
    """Generation step by step gives what causal attention gives on rotated arrays."""
    q, k, v = normal(rng, 3, 1, 2, 20, 12)
    cache = attncore.KVCache(1, 2, 12, capacity=20, rotary=STRETCHED)
    steps = []
    for span in (slice(0, 7), slice(7, 8), slice(8, 20)):
        cache.append(k[:, :, span], v[:, :, span])
        steps.append(cache.attend(q[:, :, span], rotate_query=True))
    whole = attncore.attention(
        attncore.rope(q, rotary=STRETCHED), attncore.rope(k, rotary=STRETCHED), v, causal=True
    )
    np.testing.assert_allclose(np.concatenate(steps, 2), whole, rtol=0, atol=1e-6)
