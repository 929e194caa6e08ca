"""Caches with a window: pages go back to the pool, results stay."""

from __future__ import annotations

import numpy as np
import pytest

import attncore
from cache_kit import assert_attends
from kit import normal
from paged_cache_kit import DIM, assert_consistent, assert_holds, give, paged


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("window", [0, 3, 10, 100])
@pytest.mark.parametrize("step", [1, 7])
def test_a_window_gives_pages_back(
    isa: str, page_size: int, window: int, step: int, rng: np.random.Generator
) -> None:
    """After 200 tokens no more pages are held than documented, and results are as with all tokens."""
    most = -(-(window + 2 * step) // page_size) + 1
    cache = paged(most, page_size, window=window)
    cache.add()
    tokens = normal(rng, 1, 2, 210, DIM)
    for first in range(0, 210, step):
        new = tokens[:, :, first : first + step]
        cache.append(new, -new)
        query = normal(rng, 1, 4, step, DIM)
        out, lse = cache.attend(query, return_lse=True)
        end = first + step
        own = tokens[0, :, :end]
        assert_attends((out[0], lse[0]), query[0], own, -own, window=(window, None))
        assert_consistent(cache)
    table = cache.block_table(0)
    gone = int((table < 0).sum())
    assert gone == max(0, 210 - step - window) // page_size
    assert_holds(cache, 0, tokens[0, :, gone * page_size :])


def test_what_a_window_has_given_back(rng: np.random.Generator) -> None:
    cache = paged(window=6)
    cache.add()
    tokens = normal(rng, 1, 2, 40, DIM)
    cache.append(tokens, -tokens)
    cache.append(tokens[:, :, :2], tokens[:, :, :2])
    assert cache.block_table(0).tolist()[:8] == [-1] * 8
    kept = 32
    with pytest.raises(ValueError, match=r"query: has 5 tokens for entry 0.*before 32.*given back"):
        cache.attend(normal(rng, 1, 2, 5, DIM))
    cache.attend(normal(rng, 1, 2, 4, DIM))
    cache.attend(normal(rng, 1, 2, 9, DIM), window=(1, None))
    with pytest.raises(ValueError, match="query: has 10 tokens"):
        cache.attend(normal(rng, 1, 2, 10, DIM), window=(1, None))
    cache.attend(normal(rng, 1, 2, 10, DIM), query_lengths=[4])
    with pytest.raises(
        ValueError, match=r"lengths: leaves 37 tokens of entry 0.*before 32.*at least 38"
    ):
        cache.truncate(37)
    cache.truncate(kept + 6)
    assert_consistent(cache)
    fork = cache.fork(0)
    give(cache, rng, e0=1)
    assert_consistent(cache)
    cache.free(0)
    assert_holds(cache, fork, tokens[0, :, kept:38])
    cache.truncate(0)
    assert cache.free_pages == cache.pages
    assert give(cache, rng, e1=3).shape[2] == 3
    assert_consistent(cache)


def test_who_gets_nothing_gives_nothing_back(rng: np.random.Generator) -> None:
    """The queries of its last append may still come."""
    cache = paged(page_size=1, window=2)
    cache.add()
    cache.add()
    give(cache, rng, e0=6, e1=6)
    give(cache, rng, e0=0, e1=2)
    assert (cache.block_table(0) >= 0).all()
    cache.attend(normal(rng, 2, 4, 6, DIM), query_lengths=[6, 2])
    assert_consistent(cache)


def test_the_cache_s_window_is_the_widest(isa: str, rng: np.random.Generator) -> None:
    for cache in (paged(window=5), attncore.KVCache(1, 2, DIM, capacity=40, window=5)):
        if isinstance(cache, attncore.PagedKVCache):
            cache.add()
        tokens = normal(rng, 1, 2, 30, DIM)
        cache.append(tokens, -tokens)
        query = normal(rng, 1, 2, 4, DIM)
        for window, left in ((None, 5), ((9, None), 5), ((None, None), 5), ((2, 0), 2)):
            out, lse = cache.attend(query, window=window, return_lse=True)
            own = tokens[0]
            assert_attends((out[0], lse[0]), query[0], own, -own, window=(left, None))


@pytest.mark.parametrize("queries", [1, 40])
def test_what_others_hold_does_not_matter(isa: str, queries: int, rng: np.random.Generator) -> None:
    """Gaps in tables point to page 0, where another entry holds NaN, infinities and huge numbers."""
    cache = paged(60, 4, window=21)
    cache.add()
    cache.add()
    poison = rng.choice([np.nan, np.inf, -np.inf, 3e38], (2, 20, DIM)).astype(np.float32)
    cache.append(poison, poison, entries=1)
    assert 0 in cache.block_table(1)
    tokens = normal(rng, 1, 2, 150, DIM)
    for first in range(0, 150, 50):
        new = tokens[:, :, first : first + 50]
        cache.append(new, -new, entries=0)
    assert (cache.block_table(0)[:19] == -1).all()
    query = normal(rng, 4, queries, DIM)
    out, lse = cache.attend(query, entries=0, return_lse=True)
    own = tokens[0]
    assert_attends((out, lse), query, own, -own, window=(21, None))
