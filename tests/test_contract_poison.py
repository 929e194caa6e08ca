"""Contract: what a key or value holds never reaches a row that does not see it, nor its bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, Inputs, assert_same_bits, inputs
from reference import Array, reference

POISONS = [np.nan, np.inf, -np.inf]


def run(q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Array]:
    out, lse = attncore.attention(q, k, v, return_lse=True, **options)
    return out, lse


def poisoned(k: Array, v: Array, keys: Any, poison: float, what: str = "both") -> Inputs:
    k, v = k.copy(), v.copy()
    if what in ("both", "key"):
        k[:, :, keys] = poison
    if what in ("both", "value"):
        v[:, :, keys] = poison
    return k, v, k


SHAPES = {
    "prefill": {"queries": 70, "keys": 300, "heads": 4, "kv_heads": 2, "dim": 40},
    "decode": {"queries": 1, "keys": 300, "heads": 8, "kv_heads": 1, "dim": 64},
    "long decode": {"queries": 2, "keys": 2300, "heads": 4, "kv_heads": 2, "dim": 16},
    "tiny": {"queries": 3, "keys": 7, "heads": 1, "dim": 5},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_padding(isa: str, dtype: Any, shape: str, poison: float, rng: Any) -> None:
    q, k, v = inputs(rng, batch=2, dtype=dtype, **SHAPES[shape])
    rows, keys = q.shape[2], k.shape[2]
    options: dict[str, Any] = {
        "key_lengths": [keys - 2, keys // 2],
        "query_lengths": [rows, max(1, rows - 2)],
        "causal": True,
    }
    clean = run(q, k, v, **options)
    q2, k2, v2 = q.copy(), k.copy(), v.copy()
    for b in range(2):
        k2[b, :, options["key_lengths"][b] :] = poison
        v2[b, :, options["key_lengths"][b] :] = poison
        q2[b, :, options["query_lengths"][b] :] = poison
    dirty = run(q2, k2, v2, **options)
    assert_same_bits(dirty[0], clean[0])
    assert_same_bits(dirty[1], clean[1], "lse")
    assert np.isfinite(dirty[0].astype(np.float64)).all()


HIDING: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window": (40, 5)},
    "mask": {"mask": "random"},
    "bias": {"bias": "random"},
    "segments": {"segments": True},
    "causal and alibi": {"causal": True, "alibi": True, "softcap": 3.0},
}


def make_options(rng: np.random.Generator, hiding: str, q: Array, k: Array) -> dict[str, Any]:
    options = dict(HIDING[hiding])
    mask = rng.random((q.shape[1], q.shape[2], k.shape[2])) < 0.5
    if "mask" in options:
        options["mask"] = mask
    if "bias" in options:
        options["bias"] = np.array([-np.inf, 0.5], np.float32)[mask.astype(int)]
    if options.pop("alibi", False):
        options["alibi"] = rng.random((q.shape[1],)).astype(np.float32)
    if options.pop("segments", False):
        options["query_segments"] = rng.integers(0, 3, (q.shape[0], q.shape[2]))
        options["key_segments"] = rng.integers(0, 3, (q.shape[0], k.shape[2]))
    return options


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", ["key", "value", "both"])
@pytest.mark.parametrize("hiding", HIDING)
@pytest.mark.parametrize("shape", ["prefill", "decode", "tiny"])
def test_rows_that_do_not_see_it_keep_their_bits(
    isa: str, dtype: Any, shape: str, hiding: str, what: str, rng: Any
) -> None:
    q, k, v = inputs(rng, dtype=dtype, **SHAPES[shape])
    options = make_options(rng, hiding, q, k)
    keys = rng.choice(k.shape[2], 3, replace=False)
    weights = reference(q, k, v, **options).weights[..., keys]
    sees = (weights > 0).any(axis=-1)
    clean_out, clean_lse = run(q, k, v, **options)
    for poison in (np.nan, np.inf):
        k2, v2, _ = poisoned(k, v, keys, poison, what)
        out, lse = run(q, k2, v2, **options)
        assert_same_bits(out[~sees], clean_out[~sees], f"{poison} in {what}")
        if what == "value":
            assert_same_bits(lse, clean_lse, "lse")
            seen = out[sees].astype(np.float64)
            assert (np.isnan(seen) | (np.isinf(poison) & np.isinf(seen))).all()
        else:
            assert_same_bits(lse[~sees], clean_lse[~sees], "lse")
            if np.isnan(poison):
                assert np.isnan(out[sees].astype(np.float64)).all()
                assert np.isnan(lse[sees]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_that_no_row_sees(isa: str, dtype: Any, rng: Any) -> None:
    q, k, v = inputs(rng, batch=2, dtype=dtype, **SHAPES["prefill"])
    mask = rng.random(300) < 0.5
    for options in ({"mask": mask}, {"bias": np.where(mask, 0, -np.inf).astype(np.float32)}):
        clean = run(q, k, v, **options)
        for poison in POISONS:
            k2, v2, _ = poisoned(k, v, ~mask, poison)
            dirty = run(q, k2, v2, **options)
            assert_same_bits(dirty[0], clean[0])
            assert_same_bits(dirty[1], clean[1], "lse")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["prefill", "decode", "long decode"])
def test_one_value_that_all_rows_see(isa: str, dtype: Any, shape: str, rng: Any) -> None:
    """It stays in its own dim."""
    q, k, v = inputs(rng, dtype=dtype, **SHAPES[shape])
    clean, clean_lse = run(q, k, v)
    for poison in POISONS:
        dirty = v.copy()
        dirty[:, :, 5, 3] = poison
        out, lse = run(q, k, dirty)
        others = np.arange(v.shape[3]) != 3
        assert_same_bits(out[..., others], clean[..., others])
        assert_same_bits(lse, clean_lse, "lse")
        np.testing.assert_array_equal(out[..., 3].astype(np.float64), poison)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_of_both_signs_make_nan(isa: str, dtype: Any, rng: Any) -> None:
    q, k, v = inputs(rng, dtype=dtype, **SHAPES["prefill"])
    v[:, :, 5, 3], v[:, :, 290, 3] = np.inf, -np.inf
    out, _ = run(q, k, v)
    assert np.isnan(out[..., 3].astype(np.float64)).all()
    out, _ = run(q, k, v, causal=True, query_offset=100)  # the second one is out of sight
    assert (out[..., 3].astype(np.float64) == np.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("poison", POISONS)
def test_a_query_stays_in_its_row(
    isa: str, dtype: Any, shape: str, poison: float, rng: Any
) -> None:
    q, k, v = inputs(rng, dtype=dtype, **SHAPES[shape])
    clean, clean_lse = run(q, k, v, causal=True)
    dirty = q.copy()
    dirty[:, -1, -1] = poison
    out, lse = run(dirty, k, v, causal=True)
    others = np.ones(q.shape[:3], bool)
    others[:, -1, -1] = False
    assert_same_bits(out[others], clean[others])
    assert_same_bits(lse[others], clean_lse[others], "lse")
    assert np.isnan(out[:, -1, -1].astype(np.float64)).all()
    assert np.isnan(lse[:, -1, -1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_key_of_nan_beside_a_value_of_nan(isa: str, dtype: Any, rng: Any) -> None:
    """Poison in other panels than the rows' own does not disturb the panels that are clean."""
    q, k, v = inputs(rng, 64, 2000, dtype=dtype, heads=1, dim=16)
    clean, _ = run(q, k, v, causal=True, query_offset=500)
    k[:, :, 700], v[:, :, 1500] = np.nan, np.nan
    k[:, :, 564], v[:, :, 565] = np.inf, np.nan
    out, _ = run(q, k, v, causal=True, query_offset=500)
    assert_same_bits(out, clean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_out_may_hold_anything(isa: str, dtype: Any, shape: str, rng: Any) -> None:
    q, k, v = inputs(rng, dtype=dtype, **SHAPES[shape])
    clean, _ = run(q, k, v)
    for poison in POISONS:
        out = np.full_like(clean, poison)
        attncore.attention(q, k, v, out=out)
        assert_same_bits(out, clean)
    out = np.full_like(clean, np.nan)
    attncore.attention(q, k, v, out=out, mask=np.zeros(1, bool))
    assert (out == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_and_slopes_of_tokens_that_do_not_exist(isa: str, dtype: Any, rng: Any) -> None:
    q, k, v = inputs(rng, dtype=dtype, **SHAPES["prefill"])
    bias = rng.standard_normal((4, 70, 300)).astype(np.float32)
    options: dict[str, Any] = {"key_lengths": [211], "query_lengths": [50]}
    clean = run(q, k, v, bias=bias, **options)
    bias[:, :, 211:] = np.nan
    bias[:, 50:] = np.nan
    dirty = run(q, k, v, bias=bias, **options)
    assert_same_bits(dirty[0], clean[0])
    assert_same_bits(dirty[1], clean[1], "lse")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 4, 40])
def test_beside_subnormal_values(isa: str, dtype: Any, queries: int, rng: Any) -> None:
    """Which some products take for 0."""
    q, k, v = inputs(rng, queries, 70, heads=2, dim=40)
    q, k = q.astype(dtype), k.astype(dtype)
    least = np.finfo(np.float32).tiny if np.dtype(dtype).itemsize > 2 else 2.0**-126
    v = (v * (least / 4 if np.dtype(dtype).name != "float16" else 2.0**-16)).astype(dtype)
    assert (v != 0).mean() > 0.9
    mask = rng.random((queries, 70)) < 0.8
    mask[:, [3, 64]] = False
    clean = run(q, k, v, mask=mask)
    k2, v2, _ = poisoned(k, v, [3, 64], np.nan)
    dirty = run(q, k2, v2, mask=mask)
    assert_same_bits(dirty[0], clean[0])
    assert_same_bits(dirty[1], clean[1], "lse")
