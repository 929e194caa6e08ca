"""Entries that begin with the same pages read them together: with the bits that each has alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits
from kit_paged import Paged
from kit_quantised import STORED, scale_for, store
from reference import Array
from test_tree import random_tree

SIZE = 64  # tokens of a page

# The pages of each entry: a number is a page of its own, "a" … "z" are pages that entries share.
TABLES: dict[
    str, list[tuple[str, int, int]]
] = {  # (shared pages, own pages, tokens of the last page)
    "one prompt": [("a" * 20, 1, 5), ("a" * 20, 2, 64), ("a" * 20, 0, 64), ("a" * 20, 3, 1)],
    "one prompt of all": [("a" * 36, 0, 64)] * 9,
    "two prompts": [("a" * 17, 1, 9), ("b" * 17, 1, 9), ("a" * 17, 2, 1), ("b" * 17, 0, 64)],
    "a tree of prompts": [
        ("a" * 16 + "b" * 16 + "c" * 16, 1, 3),
        ("a" * 16 + "b" * 16 + "c" * 16, 2, 3),
        ("a" * 16 + "b" * 16 + "d" * 16, 1, 3),
        ("a" * 16 + "b" * 16 + "d" * 16, 1, 4),
        ("a" * 16 + "e" * 16, 1, 3),
        ("a" * 16 + "e" * 20, 1, 3),
    ],
    "too short to share": [("a" * 15, 2, 3), ("a" * 15, 1, 64), ("a" * 3, 30, 3)],
    "a page more than a part": [("a" * 17, 0, 1), ("a" * 17, 0, 1), ("a" * 16, 0, 64)],
    "long": [("a" * 80, 1, 7), ("a" * 80, 3, 7), ("a" * 33, 4, 1)],
    "shorter and longer": [("a" * 18, 20, 7)] * 10 + [("a" * 18, 0, 3)] * 3,
    "many": [("a" * 18, entry % 3, 60 - entry) for entry in range(23)],
}


def make(
    rng: np.random.Generator,
    table: str,
    *,
    kv_heads: int = 2,
    dim: int = 16,
    value_dim: int = 24,
    dtype: Any = np.float32,
) -> Paged:
    numbers: dict[tuple[str, int], int] = {}
    lines: list[list[int]] = []
    lengths = []
    for entry, (shared, own, last) in enumerate(TABLES[table]):
        names = [(letter, i) for i, letter in enumerate(shared)]
        names += [(f"own {entry}", i) for i in range(own)]
        lines.append([numbers.setdefault(name, len(numbers)) for name in names])
        lengths.append((len(names) - 1) * SIZE + last)
    order = rng.permutation(len(numbers))
    width = max(map(len, lines))
    pages = np.array([[order[page] for page in line] + [0] * (width - len(line)) for line in lines])
    pools = [
        rng.standard_normal((len(numbers), SIZE, kv_heads, n)).astype(np.float32).astype(dtype)
        for n in (dim, value_dim)
    ]
    key, value = (
        pool[pages].reshape(len(lines), width * SIZE, kv_heads, -1).swapaxes(1, 2) for pool in pools
    )
    return Paged(key, value, pools[0], pools[1], pages, np.array(lengths))


def queries_for(rng: np.random.Generator, paged: Paged, queries: int, group: int = 2) -> Array:
    batch, kv_heads, _, dim = paged.key.shape
    query = rng.standard_normal((batch, kv_heads * group, queries, dim))
    return query.astype(np.float32).astype(paged.key.dtype)


def compare(paged: Paged, query: Array, *, threads: int = 2, **options: Any) -> None:
    """With the entries gathered, and with each alone."""
    out, lse = paged.attend(query, num_threads=threads, **options)
    expected = paged.attend_gathered(query, **options)
    assert_same_bits(out, expected[0])
    assert_same_bits(lse, expected[1], "lse")


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("group", [1, 3, 8])
def test_tables(isa: str, table: str, group: int, rng: Any) -> None:
    paged = make(rng, table)
    for queries in (1, 3):
        for threads in (1, 2, 5):
            compare(paged, queries_for(rng, paged, queries, group), threads=threads, causal=True)


@pytest.mark.parametrize("table", ["one prompt", "a tree of prompts"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_right(isa: str, table: str, dtype: Any, rng: Any) -> None:
    paged = make(rng, table, dtype=dtype)
    paged.check(queries_for(rng, paged, 1), causal=True)


@pytest.mark.parametrize("queries", [1, 4, 8, 9, 20, 32, 33, 70])
def test_every_form_of_rows(isa: str, queries: int, rng: Any) -> None:
    """Read in place, packed by themselves, packed for many."""
    paged = make(rng, "one prompt")
    compare(paged, queries_for(rng, paged, queries, 1), causal=True)


@pytest.mark.parametrize("dims", ["beside each other", "apart", "backwards"])
@pytest.mark.parametrize("table", ["one prompt", "one prompt of all", "shorter and longer"])
def test_entries_of_different_rows(isa: str, table: str, dims: str, rng: Any) -> None:
    """Some few, which read keys in place (as copies where dims lie apart), some many, which pack them."""
    paged = make(rng, table, kv_heads=1, dim=40)
    if dims == "apart":
        paged = paged.view(lambda pool: np.repeat(pool, 2, axis=3)[..., ::2])
    elif dims == "backwards":
        paged = paged.view(lambda pool: np.ascontiguousarray(pool[..., ::-1])[..., ::-1])
    batch = len(paged.key_lengths)
    last = np.arange(batch) * 4 >= 3 * batch
    for most in (1, 9, 20, 32, 50):
        query = queries_for(rng, paged, most, 1)
        any_lengths = rng.integers(0, most + 1, batch)
        for lengths in (any_lengths, np.where(last, most, min(most, 8))):
            for threads in (1, 2):
                compare(paged, query, threads=threads, causal=True, query_lengths=lengths)


OPTIONS = [
    "window",
    "mask",
    "bias",
    "sinks",
    "alibi",
    "segments",
    "dropout",
    "tree",
    "offset",
    "all",
]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("queries", [2, 10])
def test_options(isa: str, name: str, queries: int, rng: Any) -> None:
    paged = make(rng, "a tree of prompts")
    query = queries_for(rng, paged, queries)
    batch, heads, _, _ = query.shape
    keys = paged.key.shape[2]
    mask = rng.random((batch, 1, queries, keys)) < 0.5
    mask[1, :, :, :1200] = False  # a part that one entry does not see
    every: dict[str, dict[str, Any]] = {
        "window": {"window": (900, 0)},
        "mask": {"mask": mask},
        "bias": {"bias": rng.standard_normal((batch, heads, 1, keys)).astype(np.float32)},
        "sinks": {"sinks": rng.standard_normal(heads).astype(np.float32)},
        "alibi": {"alibi": rng.random((batch, heads)).astype(np.float32) / 100},
        "segments": {
            "query_segments": rng.integers(0, 2, (batch, queries)),
            "key_segments": np.broadcast_to(np.arange(keys) // 700, (batch, keys)) % 2,
        },
        "dropout": {"dropout_p": 0.4, "seed": 11},
        "tree": {"tree_parents": random_tree(rng, batch, queries)},
        "offset": {"query_offset": rng.integers(-50, 3500, batch), "causal": True},
    }
    every["all"] = {**every["mask"], **every["bias"], **every["alibi"], **every["offset"]}
    compare(paged, query, **every[name])


@pytest.mark.parametrize("own", [[2, 2], [0, 2], [1, 3], [2, 7, 0]])
def test_segments_may_hide_a_shared_prefix(isa: str, own: list[int], rng: Any) -> None:
    """Of all entries, or of some; 7 is no key's."""
    paged = make(rng, "one prompt of all", kv_heads=1)
    query = queries_for(rng, paged, 2)
    ours = np.repeat(np.resize(own, len(query))[:, None], 2, axis=1)
    theirs = np.broadcast_to(np.arange(36 * SIZE) // 600, (len(query), 36 * SIZE))
    for threads in (1, 2):
        compare(paged, query, threads=threads, query_segments=ours, key_segments=theirs)


@pytest.mark.parametrize("queries", [1, 3, 20])
def test_entries_that_see_different_ends_of_a_shared_part(isa: str, queries: int, rng: Any) -> None:
    """In whichever order they come."""
    paged = make(rng, "one prompt of all", kv_heads=1)
    query = queries_for(rng, paged, queries)
    batch = len(query)
    for ends in ([1300, 2000], [2000, 1300], [100, 2000], [1500, -5, 1100, 10**6]):
        offset = np.resize(ends, batch)
        for threads in (1, 2):
            compare(paged, query, threads=threads, causal=True, query_offset=offset)
            out, _ = paged.attend(query, num_threads=threads, causal=True, query_offset=offset)
            for entry in range(batch):  # nothing is shared alone
                at = slice(entry, entry + 1)
                alone = Paged(paged.key[at], paged.value[at], paged.key_pages, paged.value_pages,
                              paged.block_table[at], paged.key_lengths[at])  # fmt: skip
                own, _ = alone.attend(query[at], causal=True, query_offset=offset[at])
                assert_same_bits(out[at], own)


@pytest.mark.parametrize("queries", [1, 4, 9])
def test_tiles_cut_short_of_keys_whose_dims_lie_apart(isa: str, queries: int, rng: Any) -> None:
    """Such keys are copied, and not over what the entries of a gang work in."""
    plain = make(rng, "one prompt of all", kv_heads=1)
    apart = plain.view(lambda pool: np.ascontiguousarray(pool.swapaxes(1, 3)).swapaxes(1, 3))
    query = queries_for(rng, plain, queries, 1)
    keys = plain.key.shape[2]
    ends = np.resize([keys - 10, 1500], len(query))
    options: dict[str, Any]
    for options in ({"mask": np.arange(keys) != 1023}, {"causal": True, "query_offset": ends}):
        for ours, theirs in zip(
            apart.attend(query, **options), plain.attend(query, **options), strict=True
        ):
            assert_same_bits(ours, theirs)


@pytest.mark.parametrize("stored", STORED[1:])
def test_stored_otherwise(isa: str, stored: str, rng: Any) -> None:
    """Beside each other they have the bits that each has alone, where nothing is shared."""
    paged = make(rng, "a tree of prompts", dim=34)
    pools = {}
    scales: dict[str, Any] = {}
    for what in ("key", "value"):
        pool = getattr(paged, f"{what}_pages")
        if stored not in ("float16", "bfloat16"):
            scales[f"{what}_scale"] = scale_for(stored, pool)
            pool = pool / scales[f"{what}_scale"][..., None]
        pools[what] = store(pool, stored)
    for queries in (1, 12):
        query = queries_for(rng, paged, queries)
        together = attncore.attention_paged(
            query, pools["key"], pools["value"], paged.block_table, paged.key_lengths, **scales
        )
        for entry in range(len(query)):
            one = slice(entry, entry + 1)
            alone = attncore.attention_paged(
                query[one],
                pools["key"],
                pools["value"],
                paged.block_table[one],
                paged.key_lengths[one],
                **scales,
            )
            assert_same_bits(together[one], alone)


@pytest.mark.parametrize("queries", [1, 12])
def test_poison_of_one_entry(isa: str, queries: int, rng: Any) -> None:
    """A key of NaN that one entry sees, and a mask hides from others, in a page that all share."""
    paged = make(rng, "one prompt")
    query = queries_for(rng, paged, queries)
    mask = np.ones((4, 1, 1, paged.key.shape[2]), bool)
    mask[1:, ..., 100] = False
    clean, clean_lse = paged.attend(query, mask=mask)
    for poison in (np.nan, np.inf):
        dirty = paged.view(np.copy)
        page = paged.block_table[0, 100 // SIZE]
        dirty.key_pages[page, 100 % SIZE] = dirty.value_pages[page, 100 % SIZE] = poison
        out, lse = dirty.attend(query, mask=mask)
        assert_same_bits(out[1:], clean[1:])
        assert_same_bits(lse[1:], clean_lse[1:], "lse")
        assert not np.isfinite(out[0]).any()


def test_random_tables(isa: str, rng: Any) -> None:
    """Entries that leave a common way anywhere; page sizes that are no part's divisor."""
    for size in (16, 100, 1024, 1500):
        pages = -(-4000 // size)
        pools = [rng.standard_normal((3 * pages, size, 1, n)).astype(np.float32) for n in (8, 12)]
        for _ in range(4):
            batch = int(rng.integers(2, 12))
            table = np.broadcast_to(np.arange(pages), (batch, pages)).copy()
            for entry in range(batch):
                leaves = int(rng.integers(0, pages + 1))
                table[entry, leaves:] = rng.integers(0, 3 * pages, pages - leaves)
            lengths = rng.integers(0, pages * size + 1, batch)
            key, value = (
                p[table].reshape(batch, pages * size, 1, -1).swapaxes(1, 2) for p in pools
            )
            paged = Paged(key, value, pools[0], pools[1], table, lengths)
            query = queries_for(rng, paged, int(rng.integers(1, 14)), 2)
            for threads in (1, 3):
                compare(paged, query, threads=threads, causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 3])
def test_different_numbers_of_rows(isa: str, group: int, dtype: Any, rng: Any) -> None:
    """Which form multiplies a row is a matter of its own sequence, not of those that share its keys."""
    paged = make(rng, "one prompt of all", dtype=dtype)
    query = queries_for(rng, paged, 9, group)
    lengths = np.array([1, 5, 2, 9, 4, 3, 1, 8, 2])
    for threads in (1, 2):
        compare(paged, query, threads=threads, causal=True, query_lengths=lengths)
    out, lse = paged.attend(query, causal=True, query_lengths=lengths)
    for entry, length in enumerate(lengths):
        at = slice(entry, entry + 1)
        alone = Paged(paged.key[at], paged.value[at], paged.key_pages, paged.value_pages,
                      paged.block_table[at], paged.key_lengths[at])  # fmt: skip
        own = alone.attend(query[at, :, :length], causal=True)
        assert_same_bits(out[at, :, :length], own[0])
        assert_same_bits(lse[at, :, :length], own[1], "lse")
