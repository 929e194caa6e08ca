"""Contract: scale, softcap, ALiBi, sinks, their order; nothing visible; huge scores; lse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits, check, inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0, 0.0, -0.5, 1, 3.0, 1e-30, np.float32(0.25)])
def test_scale(isa: str, dtype: Any, scale: Any, rng: Any) -> None:
    made = inputs(rng, 21, 90, dtype=dtype)
    check(*made, scale=scale)
    check(*made, scale=scale, softcap=2.0)


def test_default_scale(isa: str, rng: Any) -> None:
    made = inputs(rng, 5, 9, dim=48)
    explicit = attncore.attention(*made, scale=48**-0.5)
    assert_same_bits(attncore.attention(*made), explicit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.01, 1, 20.0, 50.0, 1e4])
def test_softcap(isa: str, dtype: Any, softcap: float, rng: Any) -> None:
    made = inputs(rng, 21, 90, dtype=dtype)
    for scale in (0.2, 5.0):
        check(*made, softcap=softcap, scale=scale)


def test_as_many_biases_as_there_may_be(isa: str, rng: Any) -> None:
    made = inputs(rng, 9, 40)
    check(*made, bias=tuple(np.float32(rng.standard_normal((8, 9, 40)))))


def test_softcap_bounds_huge_scores(isa: str, rng: Any) -> None:
    q, k, v = inputs(rng, 9, 40)
    for size in (1e4, 1e12, 1e18):
        check(q * np.float32(size), k, v, softcap=30.0)


def test_softcap_comes_after_scale_and_before_bias_and_masks(isa: str, rng: Any) -> None:
    made = inputs(rng, 13, 50, heads=2)
    bias = np.float32(rng.standard_normal((13, 50)) * 20)
    slopes = np.array([2.0, 0.5], np.float32)
    out, _ = check(*made, softcap=1.0, bias=bias, alibi=slopes, scale=4.0, causal=True)
    assert np.abs(out).max() > 1  # a bias under the cap would have flattened the rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("offset", [None, 0, -7, "each"])
def test_alibi(isa: str, dtype: Any, own: bool, offset: Any, rng: Any) -> None:
    """Minus slope times distance, on both sides of the position."""
    made = inputs(rng, 21, 90, batch=2, heads=6, kv_heads=2, dtype=dtype)
    slopes = rng.random((2, 6)).astype(dtype if own else np.float32)
    offset = np.array([3, 50]) if offset == "each" else offset
    check(*made, alibi=slopes, query_offset=offset)
    check(*made, alibi=slopes[0], query_offset=offset, causal=True)
    check(*made, alibi=-slopes[1] / slopes.dtype.type(50), key_lengths=[40, 90])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("sink", [0.0, 4.0, -5.0, 40.0, -200.0])
def test_sinks(isa: str, dtype: Any, own: bool, sink: float, rng: Any) -> None:
    """A key with a zero value, neither scaled nor capped."""
    made = inputs(rng, 21, 90, heads=6, kv_heads=2, dtype=dtype)
    sinks = (sink + rng.standard_normal(6)).astype(dtype if own else np.float32)
    check(*made, sinks=sinks)
    check(*made, sinks=sinks, scale=0.01, softcap=0.5, causal=True)


def test_a_sink_of_minus_infinity_is_none(isa: str, rng: Any) -> None:
    made = inputs(rng, 9, 40)
    sinks = np.full(2, -np.inf, np.float32)
    out, lse = check(*made, sinks=sinks)
    assert np.isfinite(out).all()
    out, lse = attncore.attention(*made, sinks=sinks, key_lengths=[0], return_lse=True)
    assert (out == 0).all()
    assert (lse == -np.inf).all()


NOTHING: dict[str, dict[str, Any]] = {
    "mask": {"mask": np.zeros((1, 1), bool)},
    "bias": {"bias": np.full(300, -np.inf, np.float32)},
    "causal": {"causal": True, "query_offset": -1000},
    "window": {"window": (1, 1), "query_offset": 1000},
    "key_lengths": {"key_lengths": [0]},
    "query_lengths": {"query_lengths": [0]},
    "segments": {
        "query_segments": np.zeros((1, 37), int),
        "key_segments": np.ones((1, 300), int),
    },
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 37])
@pytest.mark.parametrize("kind", NOTHING)
def test_nothing_visible(isa: str, dtype: Any, queries: int, kind: str, rng: Any) -> None:
    made = inputs(rng, queries, 300, heads=4, kv_heads=2, dtype=dtype)
    options = dict(NOTHING[kind])
    if kind == "segments":
        options["query_segments"] = options["query_segments"][:, :queries]
    out, lse = attncore.attention(*made, return_lse=True, **options)
    assert (out == 0).all()
    assert (lse == -np.inf).all()
    sinks = np.array([1.5, -2.0, 0.0, 100.0], np.float32)
    out, lse = attncore.attention(*made, return_lse=True, sinks=sinks, **options)
    assert (out == 0).all()
    np.testing.assert_array_equal(lse, np.broadcast_to(sinks[:, None], (1, 4, queries)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing_among_others(isa: str, dtype: Any, rng: Any) -> None:
    made = inputs(rng, 40, 300, dtype=dtype)
    mask = rng.random((40, 300)) < 0.5
    mask[::3] = False
    out, lse = check(*made, mask=mask)
    assert (out[:, :, ::3] == 0).all()
    assert (lse[:, :, ::3] == -np.inf).all()
    late = np.zeros((40, 300), bool)
    late[:, 299] = True  # the first keys' tiles hold nothing
    check(*made, mask=late)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e6, 1e10])
def test_huge_scores(isa: str, dtype: Any, size: float, rng: Any) -> None:
    """Not worse than a plain evaluation, whatever the exponent is computed in."""
    q, k, v = inputs(rng, 33, 300, dim=64, dtype=dtype)
    check(q, k, v, scale=size / 8)
    check(q, k, v, scale=-size / 8, causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_common_score(isa: str, dtype: Any, rng: Any) -> None:
    """A constant of 1e4 over all scores must cost only what its rounding costs."""
    made = inputs(rng, 33, 300, dim=64, dtype=dtype)
    for constant in (1e4, -1e4, 3e7):
        check(*made, bias=np.full((1, 1), constant, np.float32))


def test_half_scores_beyond_the_range_of_half(isa: str, rng: Any) -> None:
    q, k, v = inputs(rng, 9, 70, dim=128, dtype=np.float16)
    check(q * np.float16(100), k * np.float16(100), v, scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [(40, 60), (1, 99), (0, 100), (33, 33, 34)])
def test_lse_of_disjoint_keys_merges(isa: str, dtype: Any, parts: Any, rng: Any) -> None:
    """(out, lse) of disjoint key sets give the whole; one part only gets the sink."""
    q, k, v = inputs(rng, 11, 100, heads=4, kv_heads=2, dtype=dtype)
    sinks = np.array([0.5, 1.0, -1.0, 2.0], np.float32)
    whole, lse = attncore.attention(q, k, v, sinks=sinks, scale=0.4, return_lse=True)
    ends = np.cumsum(parts)
    pieces = [
        attncore.attention(
            q,
            k[:, :, end - size : end],
            v[:, :, end - size : end],
            sinks=sinks if i == 0 else None,
            scale=0.4,
            return_lse=True,
        )
        for i, (end, size) in enumerate(zip(ends, parts, strict=True))
    ]
    logs = np.stack([np.float64(piece[1]) for piece in pieces])
    total = np.logaddexp.reduce(logs)
    merged = sum(
        np.exp(one - total)[..., None] * np.float64(o)
        for one, (o, _) in zip(logs, pieces, strict=True)
    )
    atol = {"float64": 1e-13, "float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}[str(q.dtype)]
    np.testing.assert_allclose(
        np.float64(lse), total, atol=1e-5 if q.dtype != np.float64 else 1e-13
    )
    np.testing.assert_allclose(np.float64(whole), merged, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lse_shape_and_dtype(isa: str, dtype: Any, rng: Any) -> None:
    q, k, v = inputs(rng, 5, 9, heads=3, batch=1, dtype=dtype)
    wide = np.float64 if q.dtype == np.float64 else np.float32
    for arrays, shape in (
        ((q, k, v), (1, 3, 5)),
        ((q[0], k[0], v[0]), (3, 5)),
        ((q[0, 0], k[0, 0], v[0, 0]), (5,)),
    ):
        out, lse = attncore.attention(*arrays, return_lse=True)
        assert out.shape == arrays[0].shape
        assert lse.shape == shape
        assert lse.dtype == wide
    swapped = [np.ascontiguousarray(a[0].transpose(1, 0, 2)) for a in (q, k, v)]
    out, lse = attncore.attention(*swapped, layout="bshd", return_lse=True)
    assert out.shape == (5, 3, 32)
    assert lse.shape == (3, 5)
