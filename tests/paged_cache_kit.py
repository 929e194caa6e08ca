"""What the tests of PagedKVCache share: appends of random tokens, what must always hold."""

from __future__ import annotations

from typing import Any

import numpy as np

import attncore
from kit import assert_same_bits, normal
from reference import Array

DIM = 8


def paged(pages: int = 20, page_size: int = 4, **settings: Any) -> attncore.PagedKVCache:
    return attncore.PagedKVCache(pages, page_size, 2, DIM, **settings)


def give(cache: attncore.PagedKVCache, rng: np.random.Generator, **counts: Any) -> Array:
    """Appends random tokens to entries e0=…, e1=…, in one call; (entry, 2, tokens, dim)."""
    entries = [int(name[1:]) for name in counts]
    tokens = normal(rng, len(entries), 2, max(counts.values()), DIM)
    cache.append(tokens, -tokens, entries=entries, lengths=list(counts.values()))
    return tokens


def forked(
    rng: np.random.Generator, tokens: int, pages: int = 20, **settings: Any
) -> tuple[attncore.PagedKVCache, Array]:
    """A cache in pages of 4 whose entries 0 and 1 share a prompt, and the prompt."""
    cache = paged(pages, **settings)
    cache.add()
    prompt = give(cache, rng, e0=tokens)[0]
    assert cache.fork(0) == 1
    return cache, prompt


def assert_holds(cache: attncore.PagedKVCache, entry: int, tokens: Array) -> None:
    """(2, tokens, dim)"""
    key, value = cache.gather(entry)
    assert_same_bits(key, np.ascontiguousarray(tokens))
    assert_same_bits(value, -tokens)


def assert_consistent(cache: attncore.PagedKVCache) -> None:
    """No page is lost, none is in use that no table has."""
    tables = [cache.block_table(entry) for entry in cache.entries]
    used = np.concatenate([np.zeros(0, np.int64), *tables])
    counts = np.bincount(used[used >= 0], minlength=cache.pages)
    np.testing.assert_array_equal(cache.reference_counts(), counts)
    assert cache.free_pages + int((counts > 0).sum()) == cache.pages
    lengths = cache.lengths
    assert [int(n) for n in np.flatnonzero(lengths >= 0)] == cache.entries
    for entry, table in zip(cache.entries, tables, strict=True):
        assert len(table) == -(-int(lengths[entry]) // cache.page_size)
