"""Contract: what a row does not see reaches neither its gradients nor, through it, anybody else's, nor their bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits, inputs
from kit_backward import (
    Named,
    assert_same_gradients,
    attention_backward,
    d_outputs,
    differentiate,
    gradients,
    named,
)
from reference import Array, score
from test_contract_poison import HIDING, POISONS, make_options, poisoned

SHAPES: dict[str, dict[str, Any]] = {
    "prefill": {"queries": 41, "keys": 150, "heads": 4, "kv_heads": 2, "dim": 40},
    "decode": {"queries": 1, "keys": 170, "heads": 8, "kv_heads": 1, "dim": 64},
    "long decode": {"queries": 2, "keys": 2300, "heads": 4, "kv_heads": 2, "dim": 16},
    "tiny": {"queries": 3, "keys": 7, "heads": 1, "dim": 5},
}


def finite(one: Array) -> bool:
    return bool(np.isfinite(one.astype(np.float64)).all())


def visible(arrays: Any, options: dict[str, Any]) -> Array:
    with np.errstate(all="ignore"):
        query, key, value = arrays
        return score(query, key, value, np.dtype(np.float32), **options).visible


def by_kv_head(heads: Array, arrays: Any) -> Array:
    """Any of the query heads that read a KV head."""
    batch, _, *rest = heads.shape
    any_of: Array = np.any(heads.reshape(batch, arrays[1].shape[1], -1, *rest), axis=2)
    return any_of


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", POISONS)
def test_the_slope_of_a_hidden_score(isa: str, dtype: Any, poison: float, rng: Any) -> None:
    """A softcap's derivative at a hidden key's score may be NaN."""
    made = inputs(rng, 9, 40, dtype=dtype)
    d_out, _ = d_outputs(rng, made[0], made[2])
    options: dict[str, Any] = {"softcap": 3.0, "mask": np.arange(40) != 7}
    expected = gradients(d_out, made, **options)
    made[1][:, :, 7] = made[2][:, :, 7] = poison
    assert_same_gradients(gradients(d_out, made, **options), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_padding(isa: str, dtype: Any, shape: str, poison: float, rng: Any) -> None:
    """Past the lengths everything may be garbage: operands, out, lse, and their gradients."""
    made = inputs(rng, batch=2, dtype=dtype, **SHAPES[shape])
    rows, keys = made[0].shape[2], made[1].shape[2]
    query_lengths, key_lengths = [rows, max(1, rows - 2)], [keys - 2, keys // 2]
    d_out, d_lse = d_outputs(rng, made[0], made[2])
    bias = np.float32(rng.standard_normal((made[0].shape[1], rows, keys)))
    options: dict[str, Any] = {
        "query_lengths": query_lengths,
        "key_lengths": key_lengths,
        "causal": True,
        "bias": bias,
        "alibi": np.float32(rng.random(made[0].shape[1])),
    }
    found, out, lse = differentiate(d_out, made, d_lse=d_lse, **options)
    of_queries, of_keys = [a.copy() for a in (d_out, made[0], out)], [a.copy() for a in made[1:]]
    lses = [lse.copy(), d_lse.copy()]
    for b in range(2):
        for a in (*of_queries, *lses):
            a[b, :, query_lengths[b] :] = poison
        for a in of_keys:
            a[b, :, key_lengths[b] :] = poison
    bias[:, :, max(key_lengths) :] = poison
    d_dirty, query, its_out = of_queries
    ours = attention_backward(d_dirty, query, *of_keys, its_out, lses[0], d_lse=lses[1], **options)
    assert_same_gradients(named(ours), named(found))
    assert all(finite(one) for one in named(ours).values())


def touched(seen: Array, poisoned_keys: Array, arrays: Any) -> Named:
    """Which rows, keys and values a poisoned key may reach: those that see it, and what they see."""
    rows: Array = np.any(seen & poisoned_keys, axis=-1)
    keys = by_kv_head(np.any(seen & rows[..., None], axis=-2), arrays)
    return {"query": rows, "key": keys, "value": keys}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", ["key", "value"])
@pytest.mark.parametrize("hiding", HIDING)
@pytest.mark.parametrize("shape", ["prefill", "decode", "tiny"])
def test_keys_that_some_rows_do_not_see(
    isa: str, dtype: Any, shape: str, hiding: str, what: str, rng: Any
) -> None:
    made = inputs(rng, dtype=dtype, **SHAPES[shape])
    options = make_options(rng, hiding, made[0], made[1])
    d_out, _ = d_outputs(rng, made[0], made[2])
    at = np.zeros(made[1].shape[2], bool)
    at[rng.choice(len(at), 3, replace=False)] = True
    seen = visible(made, options)
    reached = touched(seen, at, made)
    clean = gradients(d_out, made, wanted=("query", "key", "value"), **options)
    for poison in (np.nan, np.inf):
        k, v, _ = poisoned(made[1], made[2], at, poison, what)
        ours = gradients(d_out, (made[0], k, v), wanted=("query", "key", "value"), **options)
        for name, one in ours.items():
            away = ~reached[name]
            assert_same_bits(one[away], clean[name][away], f"d_{name} with {poison} in {what}")
        if np.isnan(poison):
            assert np.isnan(ours["query"][reached["query"]].astype(np.float64)).all()
            assert np.isnan(ours["key"][reached["key"]].astype(np.float64)).all()
        if what == "value":  # dV = Pᵀ dO does not read it
            assert_same_bits(ours["value"], clean["value"], "d_value")


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_that_no_row_sees(isa: str, dtype: Any, rng: Any) -> None:
    made = inputs(rng, batch=2, dtype=dtype, **SHAPES["prefill"])
    mask = rng.random(150) < 0.5
    d_out, d_lse = d_outputs(rng, made[0], made[2])
    for options in ({"mask": mask}, {"bias": np.where(mask, 0, -np.inf).astype(np.float32)}):
        clean = gradients(d_out, made, d_lse=d_lse, **options)
        assert (clean["key"][:, :, ~mask] == 0).all()
        assert (clean["value"][:, :, ~mask] == 0).all()
        for poison in POISONS:
            k, v, _ = poisoned(made[1], made[2], ~mask, poison)
            dirty = gradients(d_out, (made[0], k, v), d_lse=d_lse, **options)
            assert_same_gradients(dirty, clean, f"with {poison}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("what", ["query", "d_out", "d_lse", "lse"])
def test_a_row_stays_in_its_row(isa: str, dtype: Any, shape: str, what: str, rng: Any) -> None:
    """And in the keys that it sees."""
    made = inputs(rng, dtype=dtype, **SHAPES[shape])
    d_out, d_lse = d_outputs(rng, made[0], made[2])
    mask = rng.random((made[0].shape[2], made[1].shape[2])) < 0.5
    found, out, lse = differentiate(d_out, made, d_lse=d_lse, mask=mask)
    clean = named(found)
    for poison in (np.nan, np.inf):
        given = {"query": made[0], "d_out": d_out, "d_lse": d_lse, "lse": lse}
        given[what] = given[what].copy()
        given[what][:, -1, -1] = poison
        if what == "query":
            out, given["lse"] = attncore.attention(
                given["query"], *made[1:], mask=mask, return_lse=True
            )
        ours = attention_backward(
            given["d_out"],
            given["query"],
            *made[1:],
            out,
            given["lse"],
            d_lse=given["d_lse"],
            mask=mask,
        )
        others = np.ones(d_lse.shape, bool)
        others[:, -1, -1] = False
        assert_same_bits(ours.query[others], clean["query"][others], "d_query")
        keys = np.ones(made[1].shape[:3], bool)
        keys[:, -1] = ~mask[-1]
        for name, one in (("key", ours.key), ("value", ours.value)):
            assert_same_bits(one[keys], clean[name][keys], f"d_{name}")
        if np.isnan(poison) and what != "lse":
            assert np.isnan(ours.query[:, -1, -1].astype(np.float64)).all()
            assert np.isnan(ours.key[~keys].astype(np.float64)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing_may_hold_anything(isa: str, dtype: Any, rng: Any) -> None:
    made = inputs(rng, dtype=dtype, **SHAPES["prefill"])
    d_out, d_lse = d_outputs(rng, made[0], made[2])
    mask = rng.random((41, 150)) < 0.5
    mask[::4] = False
    clean = gradients(d_out, made, d_lse=d_lse, mask=mask)
    for poison in POISONS:
        query, its_d_out = made[0].copy(), d_out.copy()
        query[:, :, ::4] = its_d_out[:, :, ::4] = poison
        its_d_lse = d_lse.copy()
        its_d_lse[:, :, ::4] = poison
        dirty = gradients(its_d_out, (query, *made[1:]), d_lse=its_d_lse, mask=mask)
        assert_same_gradients(dirty, clean, f"with {poison}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_number_of_d_out(isa: str, dtype: Any, rng: Any) -> None:
    """In d_value it stays in its dim."""
    made = inputs(rng, dtype=dtype, **SHAPES["prefill"])
    d_out, _ = d_outputs(rng, made[0], made[2])
    clean = gradients(d_out, made)
    d_out[:, :, 5, 3] = np.nan
    ours = gradients(d_out, made)
    dims = np.arange(40) != 3
    assert_same_bits(ours["value"][..., dims], clean["value"][..., dims], "d_value")
    assert np.isnan(ours["value"][..., 3].astype(np.float64)).all()
    rows = np.arange(41) != 5
    assert_same_bits(ours["query"][:, :, rows], clean["query"][:, :, rows], "d_query")
    assert np.isnan(ours["query"][:, :, 5].astype(np.float64)).all()
    assert np.isnan(ours["key"].astype(np.float64)).all()


def test_poison_in_other_panels(isa: str, rng: Any) -> None:
    """Panels that are clean are not disturbed by poison elsewhere that their rows do not see."""
    made = inputs(rng, 64, 2000, heads=1, dim=16)
    d_out, _ = d_outputs(rng, made[0], made[2])
    options: dict[str, Any] = {"causal": True, "query_offset": 500}
    clean = gradients(d_out, made, **options)
    for array, key, poison in ((1, 700, np.nan), (2, 1500, np.nan), (1, 564, np.inf)):
        made[array][:, :, key] = poison
    made[2][:, :, 565] = np.nan
    assert_same_gradients(gradients(d_out, made, **options), clean)
