"""Contract: a mask that heads share is looked at by one of them, with the bits of a mask for each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits, check, inputs
from reference import Array

ROWS, KEYS = 211, 397  # several row tiles and key tiles, the last ones not whole


def in_blocks(rng: np.random.Generator, batch: int) -> Array:
    """Tiles of all kinds: hidden, visible, mixed; rows and columns cross tiles' borders."""
    rows, keys = np.arange(ROWS)[:, None] // 37, np.arange(KEYS) // 128
    kind = rng.integers(0, 3, (batch, 1, 6, 4))[:, :, rows, keys]
    random = rng.random((batch, 1, ROWS, KEYS)) < 0.5
    return np.asarray((kind == 1) | ((kind == 2) & random))


def for_each_head(mask: Array, batch: int, heads: int) -> Array:
    """The same mask with an own copy a head, of which nothing is shared."""
    return np.ascontiguousarray(np.broadcast_to(mask, (batch, heads, ROWS, KEYS)))


OPTIONS: dict[str, dict[str, Any]] = {
    "alone": {},
    "causal": {"causal": True},
    "window": {"window": (150, 20)},
    "lengths": {"query_lengths": [ROWS, 120, 1], "key_lengths": [0, KEYS, 130]},
    "lengths and causal": {
        "query_lengths": [37, ROWS, 96],
        "key_lengths": [300] * 3,
        "causal": True,
    },
    "bias and sinks": {
        "bias": np.array([0.5, -1] * 3, np.float32)[:, None, None],
        "sinks": np.ones(6, np.float32),
    },
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("own", [False, True], ids=["one for all entries", "one for each"])
def test_bits(isa: str, dtype: Any, kv_heads: int, name: str, own: bool, rng: Any) -> None:
    batch, heads = 3, 6
    made = inputs(rng, ROWS, KEYS, batch=batch, heads=heads, kv_heads=kv_heads, dtype=dtype)
    options = OPTIONS[name]
    shared = in_blocks(rng, batch if own else 1)
    separate = for_each_head(shared, batch, heads)
    for threads in (1, 2):
        ours = attncore.attention(
            *made, mask=shared, return_lse=True, num_threads=threads, **options
        )
        theirs = attncore.attention(*made, mask=separate, return_lse=True, **options)
        for one, other, what in zip(ours, theirs, ("out", "lse"), strict=True):
            assert_same_bits(one, other, what)


def test_against_the_reference(isa: str, rng: Any) -> None:
    made = inputs(rng, ROWS, KEYS, batch=3, heads=6, kv_heads=3)
    check(*made, mask=in_blocks(rng, 3), causal=True)


def test_packed_sequences(isa: str, rng: Any) -> None:
    heads, lengths = 4, [(ROWS, KEYS), (40, 140), (150, 1)]
    starts = np.cumsum([(0, 0), *lengths], axis=0)
    query = rng.standard_normal((starts[-1, 0], heads, 16), np.float32)
    key, value = rng.standard_normal((2, starts[-1, 1], heads, 16), np.float32)
    shared = in_blocks(rng, 3)
    one, other = (
        attncore.attention_varlen(query, key, value, starts[:, 0], starts[:, 1], mask=mask)
        for mask in (shared, for_each_head(shared, 3, heads))
    )
    assert_same_bits(one, other)


def test_notes_take_memory_for_the_keys_there_are() -> None:
    """Not for all that a table of pages has room for."""
    pages = np.zeros((4, 1024, 2, 16), np.float32)
    query, mask = np.zeros((1, 2, 7, 16), np.float32), np.eye(7, 50, dtype=bool)
    table = np.zeros((1, 2**18), np.int32)
    small = attncore.explain_paged(query, pages, pages, table[:, :1], [50], mask=mask)
    large = attncore.explain_paged(query, pages, pages, table, [50], mask=mask)
    assert large.workspace_bytes <= small.workspace_bytes + 2**16


def test_notes_take_memory_for_each_sequence() -> None:
    """Not for the longest one's square in each."""
    lengths = np.array([8192] + [16] * 1000)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    x = np.zeros((ends[-1], 4, 16), np.float32)
    mask = np.lib.stride_tricks.as_strided(np.ones(2 * 8192, bool), (8192, 8192), (1, 1))
    plain = attncore.explain_varlen(x, x, x, ends, ends, num_threads=1).workspace_bytes
    noted = attncore.explain_varlen(x, x, x, ends, ends, mask=mask, num_threads=1).workspace_bytes
    assert noted < plain + 2**16


def test_a_mask_that_changes_between_calls_is_looked_at_again(isa: str, rng: Any) -> None:
    made = inputs(rng, ROWS, KEYS, heads=2)
    workspace_of_before = in_blocks(rng, 1)
    attncore.attention(*made, mask=workspace_of_before)
    check(*made, mask=~workspace_of_before)
