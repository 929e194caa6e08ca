"""`attention_paged` has the bits of `attention` on the gathered arrays, and these are right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits, inputs
from kit_paged import Paged, into_pages
from reference import Array
from test_tree import random_tree

PAGE_SIZES = [1, 3, 16, 17, 64, 128, 1000]

# queries, lengths, heads, kv_heads, dim: rows a KV head are few (read where they lie), some (packed), or many.
SHAPES: dict[str, tuple[int, list[int], int, int, int]] = {
    "decode": (1, [70, 1, 300], 4, 4, 64),
    "decode of a group of 3": (1, [333, 129], 6, 2, 40),
    "decode of a group of 8": (1, [130, 64], 8, 1, 32),
    "few rows": (2, [300, 5], 6, 2, 16),
    "nine rows": (3, [200, 131], 6, 2, 24),
    "rows beyond the direct form": (7, [200, 131], 6, 2, 24),
    "forty rows": (5, [150, 7], 8, 1, 48),
    "prefill": (40, [140, 40], 2, 2, 32),
}


def make(
    rng: np.random.Generator, shape: str, page_size: int, dtype: Any = np.float32, **more: Any
) -> tuple[Array, Paged]:
    queries, lengths, heads, kv_heads, dim = SHAPES[shape]
    sizes = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "value_dim": dim + 8}
    q, k, v = inputs(rng, queries, max(lengths), batch=len(lengths), dtype=dtype, **sizes)
    return q, into_pages(rng, k, v, lengths, page_size, **more)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_page_sizes(isa: str, shape: str, page_size: int, rng: Any) -> None:
    query, paged = make(rng, shape, page_size)
    paged.check(query)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dtypes(isa: str, shape: str, dtype: Any, rng: Any) -> None:
    query, paged = make(rng, shape, 17, dtype)
    paged.check(query, causal=True)


@pytest.mark.parametrize("page_size", [16, 1000])
@pytest.mark.parametrize("queries", [1, 40, 130])
def test_long_entries(isa: str, queries: int, page_size: int, rng: Any) -> None:
    """Beyond the sizes where keys are split, sums are folded and packed keys are shared."""
    lengths = [5003, 2049, 130]
    q, k, v = inputs(rng, queries, 5003, batch=3, heads=2, kv_heads=1, dim=16)
    into_pages(rng, k, v, lengths, page_size).check(q, causal=True)


@pytest.mark.parametrize("group", [1, 3, 8])
def test_every_number_of_rows(isa: str, group: int, rng: Any) -> None:
    """1 … 40 rows a KV head, across the border between the direct and the packed form."""
    for queries in range(1, 40 // group + 1):
        q, k, v = inputs(rng, queries, 61, heads=2 * group, kv_heads=2, dim=20)
        into_pages(rng, k, v, [61], 16).check(q, causal=True)


OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window": (20, 0)},
    "window that hides all pages but the last": {"causal": True, "window": (2, None)},
    "sinks": {"sinks": True},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi": True},
    "mask": {"mask": True},
    "bias": {"bias": True},
    "relative bias": {"relative_bias": True},
    "segments": {"segments": True},
    "query lengths": {"query_lengths": True, "causal": True},
    "offset": {"query_offset": 30, "causal": True},
    "dropout": {"dropout_p": 0.3, "seed": 9},
    "tree": {"tree": True},
    "scale": {"scale": -0.4},
    "all": {
        "causal": True,
        "window": (60, 3),
        "sinks": True,
        "softcap": 3.0,
        "alibi": True,
        "mask": True,
        "bias": True,
        "segments": True,
        "query_lengths": True,
    },
}


def options_for(rng: np.random.Generator, name: str, query: Array, paged: Paged) -> dict[str, Any]:
    options = dict(OPTIONS[name])
    batch, heads, queries, _ = query.shape
    keys = paged.key.shape[2]
    floats: dict[str, Any] = {
        "sinks": rng.standard_normal(heads),
        "alibi": rng.random(heads),
        "bias": rng.standard_normal((batch, 1, queries, keys)),
    }
    for option in floats.keys() & options.keys():
        options[option] = floats[option].astype(np.float32)
    if "mask" in options:
        options["mask"] = rng.random((batch, heads, queries, keys)) < 0.6
    if "relative_bias" in options:
        table = rng.standard_normal((heads, 32)).astype(np.float32)
        options["relative_bias"] = attncore.RelativeBias(table)
    if options.pop("segments", False):
        options["key_segments"] = rng.integers(0, 2, (batch, keys))
        options["query_segments"] = rng.integers(0, 2, (batch, queries))
    if "query_lengths" in options:
        options["query_lengths"] = rng.integers(0, queries + 1, batch)
    if options.pop("tree", False):
        options["tree_parents"] = random_tree(rng, batch, queries)
    return options


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    "shape", ["decode of a group of 3", "few rows", "rows beyond the direct form", "prefill"]
)
def test_options(isa: str, shape: str, name: str, rng: Any) -> None:
    query, paged = make(rng, shape, 16)
    options = options_for(rng, name, query, paged)
    paged.check(query, **options)


VIEWS: dict[str, Any] = {
    "columns": np.asfortranarray,
    "slots backwards": lambda pool: np.ascontiguousarray(pool[:, ::-1])[:, ::-1],
    "pages far apart": lambda pool: np.repeat(pool, 3, axis=0)[::3],
    "every other number": lambda pool: np.repeat(pool, 2, axis=3)[..., ::2],
    "dims backwards": lambda pool: np.ascontiguousarray(pool[..., ::-1])[..., ::-1],
    "read-only": lambda pool: np.frombuffer(pool.tobytes(), pool.dtype).reshape(pool.shape),
    "unaligned": lambda pool: np.frombuffer(b"x" + pool.tobytes(), pool.dtype, offset=1).reshape(
        pool.shape
    ),
}


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", ["few rows", "forty rows"])
def test_strides(isa: str, shape: str, view: str, layout: str, rng: Any) -> None:
    query, paged = make(rng, shape, 17)
    expected = paged.check(query, causal=True)
    out, lse = paged.in_layout(layout).view(VIEWS[view]).attend(query, causal=True)
    assert_same_bits(out, expected[0])
    assert_same_bits(lse, expected[1], "lse")


def test_layouts_of_the_query(isa: str, rng: Any) -> None:
    query, paged = make(rng, "few rows", 16)
    out, lse = paged.check(query)
    other, other_lse = paged.attend(query.swapaxes(1, 2).copy(), layout="bshd")
    assert_same_bits(other.swapaxes(1, 2), out)
    assert_same_bits(other_lse, lse, "lse")
    one = replace(paged, block_table=paged.block_table[1], key_lengths=int(paged.key_lengths[1]))  # type: ignore[arg-type]
    other, other_lse = one.attend(query[1])
    assert_same_bits(other, out[1])
    assert_same_bits(other_lse, lse[1], "lse")


def test_shared_and_repeated_pages(isa: str, rng: Any) -> None:
    """Entries that begin with the same pages, one that has a page twice, one page for all."""
    key_pages = rng.standard_normal((9, 16, 2, 32)).astype(np.float32)
    value_pages = rng.standard_normal((9, 16, 2, 24)).astype(np.float32)
    table = np.array([[4, 4, 7, 4], [4, 4, 7, 0], [3, 3, 3, 3], [4, 4, 1, 99]])
    lengths = np.array([64, 59, 50, 40])
    safe = np.where(table < 9, table, 0)
    key, value = (
        pool[safe].reshape(4, 64, 2, -1).swapaxes(1, 2) for pool in (key_pages, value_pages)
    )
    paged = Paged(key, value, key_pages, value_pages, table, lengths)
    for queries in (1, 3, 30):
        query = rng.standard_normal((4, 6, queries, 32)).astype(np.float32)
        paged.check(query, causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", ["decode", "few rows", "forty rows", "prefill"])
def test_poison_in_other_slots(isa: str, shape: str, poison: float, dtype: Any, rng: Any) -> None:
    """Slots past the lengths, pages of nobody, and what the table holds past the pages."""
    seed = rng.integers(2**32)
    query, paged = make(np.random.default_rng(seed), shape, 17, dtype, poison=poison)
    clean_query, clean = make(
        np.random.default_rng(seed), shape, 17, dtype, poison=0, garbage=10**9
    )
    assert_same_bits(query, clean_query)
    for ours, theirs in zip(paged.attend(query), clean.attend(query), strict=True):
        assert np.isfinite(ours.astype(np.float64)).all()
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("queries", [1, 3, 9, 40])
def test_poison_that_a_mask_hides(isa: str, queries: int, rng: Any) -> None:
    q, k, v = inputs(rng, queries, 200, heads=2, dim=24)
    hidden = rng.random((queries, 224)) < 0.3
    hidden[:, 5] = hidden[:, 77] = True
    hidden[0, 140] = False
    clean = into_pages(rng, k, v, [200], 16).attend(q, mask=~hidden)
    for poison in (np.nan, np.inf):
        dirty_k, dirty_v = k.copy(), v.copy()
        dirty_k[:, :, 5] = dirty_v[:, :, [5, 77]] = poison
        dirty = into_pages(rng, dirty_k, dirty_v, [200], 16)
        for ours, theirs in zip(dirty.attend(q, mask=~hidden), clean, strict=True):
            assert_same_bits(ours, theirs)
        dirty_v[:, :, 140, 3] = poison  # some rows see it
        out, lse = into_pages(rng, dirty_k, dirty_v, [200], 16).attend(q, mask=~hidden)
        sees = ~hidden[:, 140]
        assert_same_bits(out[:, :, ~sees], clean[0][:, :, ~sees])
        others = np.arange(24) != 3
        assert_same_bits(out[..., others], clean[0][..., others])
        assert (~np.isfinite(out[:, :, sees, 3])).all()
        assert_same_bits(lse, clean[1], "lse")


def test_no_keys(isa: str, rng: Any) -> None:
    query, paged = make(rng, "few rows", 16)
    paged = replace(paged, key_lengths=np.array([0, 5]))
    out, lse = paged.check(query, causal=True)
    assert (out[0] == 0).all()
    assert (lse[0] == -np.inf).all()
    out, lse = replace(paged, key_lengths=np.array([0, 0])).check(
        query, sinks=np.ones(6, np.float32)
    )
    assert (out == 0).all()
    assert (lse == 1).all()
    none = replace(paged, key_lengths=np.array([0, 0]), block_table=np.empty((2, 0), np.int32))
    out, lse = none.attend(query)
    assert (out == 0).all()
    nobody = none.view(lambda pool: pool[:0])
    assert_same_bits(nobody.attend(query)[0], out)


def test_no_queries_and_no_entries(isa: str, rng: Any) -> None:
    query, paged = make(rng, "few rows", 16)
    assert paged.attend(query[:, :, :0])[0].shape == (2, 6, 0, 24)
    empty = replace(paged, block_table=paged.block_table[:0], key_lengths=paged.key_lengths[:0])
    out, lse = empty.attend(query[:0])
    assert out.shape == (0, 6, 2, 24)
    assert lse.shape == (0, 6, 2)


@pytest.mark.parametrize("dim", [1, 2, 3, 15, 40, 80, 96, 129])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dims(isa: str, dim: int, dtype: Any, rng: Any) -> None:
    for value_dim in (dim, 21):
        for queries in (1, 3, 12):
            q, k, v = inputs(rng, queries, 70, dim=dim, value_dim=value_dim, dtype=dtype)
            into_pages(rng, k, v, [70], 16).check(q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [1, 8, 16])
def test_values_that_are_a_view_of_the_keys(isa: str, heads: int, dtype: Any, rng: Any) -> None:
    """Latent attention (DeepSeek-AI 2024): 576 numbers a token, of which the first 512 are the value."""
    q, k, _ = inputs(rng, 1, 150, batch=2, heads=heads, kv_heads=1, dim=576, dtype=dtype)
    paged = into_pages(rng, k, k, [150, 33], 64)
    shared = replace(paged, value=paged.key[..., :512], value_pages=paged.key_pages[..., :512])
    shared.check(q, scale=192**-0.5)
