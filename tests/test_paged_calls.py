"""Forms of `attention_paged`'s arguments, packed queries, threads, neighbours, memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits, inputs
from kit_paged import Paged, into_pages
from reference import Array
from test_paged import SHAPES, make
from test_tree import random_tree
from threads_kit import at_once


def packed(query: Array, lengths: Any) -> Array:
    """The first queries of each entry as (token, head, dim)."""
    parts = [q[:, :n].swapaxes(0, 1) for q, n in zip(query, lengths, strict=True)]
    return np.concatenate(parts) if parts else np.empty((0, *query.shape[1::2]), query.dtype)


QUERY_LENGTHS = [4, 0, 1, 9, 1]


def packed_case(rng: np.random.Generator, **more: Any) -> tuple[Array, Array, list[int], Paged]:
    """Queries (entry, …) and packed, their cumulative lengths, the pages."""
    sizes: dict[str, Any] = {"batch": 5, "heads": 4, "kv_heads": 2, "dim": 24, "value_dim": 16}
    q, k, v = inputs(rng, 9, 150, **{**sizes, **more})
    paged = into_pages(rng, k, v, [150, 33, 0, 60, 1], 16)
    return q, packed(q, QUERY_LENGTHS), [0, *np.cumsum(QUERY_LENGTHS).tolist()], paged


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_queries(isa: str, dtype: Any, causal: bool, rng: Any) -> None:
    query, tokens, cu, paged = packed_case(rng, dtype=dtype)
    out, lse = paged.attend(tokens, cu_query_lengths=cu, causal=causal)
    assert out.shape == (15, 4, 16)
    assert lse.shape == (4, 15)
    expected = paged.check(query, query_lengths=QUERY_LENGTHS, causal=causal)
    assert_same_bits(out, packed(expected[0], QUERY_LENGTHS))
    assert_same_bits(lse.T, packed(expected[1], QUERY_LENGTHS))


def test_packed_queries_with_options(isa: str, rng: Any) -> None:
    """Masks and biases are those of the padded batch; segments and parents are packed as queries are."""
    query, tokens, cu, paged = packed_case(rng)
    keys = paged.key.shape[2]
    shared: dict[str, Any] = {
        "causal": True,
        "mask": rng.random((5, 4, 9, keys)) < 0.7,
        "bias": rng.standard_normal((5, 1, 9, keys)).astype(np.float32),
        "sinks": rng.standard_normal(4).astype(np.float32),
        "softcap": 2.0,
        "key_segments": rng.integers(0, 2, (5, keys)),
        "dropout_p": 0.2,
        "seed": 3,
    }
    segments = rng.integers(0, 2, (5, 9))
    expected = paged.check(query, query_lengths=QUERY_LENGTHS, query_segments=segments, **shared)
    line = np.concatenate([s[:n] for s, n in zip(segments, QUERY_LENGTHS, strict=True)])
    out, lse = paged.attend(tokens, cu_query_lengths=cu, query_segments=line, **shared)
    assert_same_bits(out, packed(expected[0], QUERY_LENGTHS))
    assert_same_bits(lse.T, packed(expected[1], QUERY_LENGTHS))


def test_packed_trees(isa: str, rng: Any) -> None:
    query, tokens, cu, paged = packed_case(rng)
    paged = replace(paged, key_lengths=np.array([150, 33, 1, 60, 1]))
    paged.block_table[2, 0] = paged.block_table[0, 0]
    paged.key[2, :, :1] = paged.key[0, :, :1]
    paged.value[2, :, :1] = paged.value[0, :, :1]
    parents = random_tree(rng, 5, 9)
    expected = paged.check(query, query_lengths=QUERY_LENGTHS, tree_parents=parents)
    line = np.concatenate([p[:n] for p, n in zip(parents, QUERY_LENGTHS, strict=True)])
    out, _ = paged.attend(tokens, cu_query_lengths=cu, tree_parents=line)
    assert_same_bits(out, packed(expected[0], QUERY_LENGTHS))


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.int64, np.uint64, ">i4"])
def test_forms_of_tables_and_lengths(isa: str, dtype: Any, rng: Any) -> None:
    query, paged = make(rng, "few rows", 17)
    expected = paged.check(query)
    safe = np.where(paged.block_table < 0, 0, paged.block_table)
    wide = np.zeros((4, 2 * safe.shape[1]), dtype)
    wide[::2, ::2] = safe
    lengths = np.zeros(6, dtype)
    lengths[::3] = paged.key_lengths
    if np.dtype(dtype).itemsize == 1:
        lengths = lengths.astype(np.int16)
        lengths[::3] = paged.key_lengths
    other = replace(paged, block_table=wide[::2, ::2], key_lengths=lengths[::3])
    assert_same_bits(other.attend(query)[0], expected[0])
    lists: Any = replace(paged, block_table=safe.tolist(), key_lengths=paged.key_lengths.tolist())
    assert_same_bits(lists.attend(query)[0], expected[0])
    one_table = replace(paged, block_table=np.broadcast_to(safe[0], safe.shape))
    assert_same_bits(one_table.attend(query)[0][0], expected[0][0])


def test_out(isa: str, rng: Any) -> None:
    query, paged = make(rng, "forty rows", 16)
    expected, _ = paged.attend(query)
    for out in (
        np.full_like(expected, np.nan),
        np.full((*expected.shape[:3], 3 * expected.shape[3]), np.nan, np.float32)[..., ::-3],
    ):
        result, _ = paged.attend(query, out=out)
        assert result is out
        assert_same_bits(out, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_threads(isa: str, shape: str, rng: Any) -> None:
    query, paged = make(rng, shape, 16)
    expected = paged.attend(query, num_threads=1)
    for threads in (2, 3, 7):
        for ours, theirs in zip(paged.attend(query, num_threads=threads), expected, strict=True):
            assert_same_bits(ours, theirs)


@pytest.mark.parametrize("queries", [1, 4, 40])
def test_neighbours_and_the_width_of_the_table(isa: str, queries: int, rng: Any) -> None:
    """An entry's bits are the same alone, beside others, and in a table with room for more."""
    q, k, v = inputs(rng, queries, 2500, batch=4, heads=4, kv_heads=2, dim=16)
    paged = into_pages(rng, k, v, [1200, 2500, 1, 700], 64)
    out, lse = paged.attend(q, causal=True)
    for entry, length in enumerate(paged.key_lengths):
        pages = -(-length // 64)
        alone = replace(
            paged,
            block_table=paged.block_table[entry : entry + 1, :pages],
            key_lengths=np.array([length]),
        )
        ours, our_lse = alone.attend(q[entry : entry + 1], causal=True)
        assert_same_bits(ours[0], out[entry])
        assert_same_bits(our_lse[0], lse[entry])


@pytest.mark.parametrize("value_dim", [3000, 4096, 8192])
def test_room_for_more_and_wide_values(isa: str, value_dim: int, rng: Any) -> None:
    """The keys are split alike, though the states of longer entries are larger."""
    q, k, v = inputs(rng, 1, 1500, heads=1, dim=4, value_dim=value_dim)
    room = np.zeros((1, 1, 1500, value_dim), np.float32)
    expected = attncore.attention(q, k, v)
    long_k, long_v = np.concatenate([k, k], axis=2), np.concatenate([v, room], axis=2)
    assert_same_bits(attncore.attention(q, long_k, long_v, key_lengths=[1500]), expected)
    keys, values = (a.reshape(1, 3, 500, -1)[0, ..., None, :] for a in (k, v))
    table = [[0, 1, 2, 9, 9, 9]]
    assert_same_bits(attncore.attention_paged(q, keys, values, table, [1500]), expected)


def test_callers_at_once(isa: str, rng: Any) -> None:
    query, paged = make(rng, "decode of a group of 8", 16)
    expected, _ = paged.attend(query)
    results: list[Array] = []

    def run(_: int) -> None:
        for _ in range(20):
            results.append(paged.attend(query)[0])

    at_once(4, run)
    assert len(results) == 80
    for result in results:
        assert_same_bits(result, expected)


def test_the_table_may_be_longer_than_memory(rng: Any) -> None:
    """Only what the lengths reach is looked at."""
    query, paged = make(rng, "decode", 16)
    wide = np.broadcast_to(np.int64(-5), (3, 2**40))
    with pytest.raises(ValueError, match=r"block_table.*entry \(0, 0\) is -5"):
        replace(paged, block_table=wide).attend(query)
    zero = replace(paged, block_table=wide, key_lengths=np.zeros(3, int))
    assert (zero.attend(query)[0] == 0).all()
    slots = np.broadcast_to(paged.key_pages[:1, :1], (1, 2**40, 4, 64))
    with pytest.raises(ValueError, match=r"block_table.*2\*\*60"):
        attncore.attention_paged(query, slots, slots, wide, [1, 1, 1])


def test_masks_and_biases_may_end_with_the_longest_entry(isa: str, rng: Any) -> None:
    for queries in (1, 12):
        q, k, v = inputs(rng, queries, 70, batch=2, heads=2, dim=16)
        paged = into_pages(rng, k, v, [70, 21], 16)
        mask = rng.random((2, 1, queries, paged.key.shape[2])) < 0.6
        bias = rng.standard_normal((2, 1, paged.key.shape[2])).astype(np.float32)
        expected, _ = paged.check(q, mask=mask, bias=bias)
        out, _ = paged.attend(q, mask=mask[..., :70].copy(), bias=bias[..., :70].copy())
        assert_same_bits(out, expected)
        out, _ = paged.attend(q, mask=mask[..., :70].copy(), bias=bias)
        assert_same_bits(out, expected)
