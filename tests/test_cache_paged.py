"""PagedKVCache: pages shared, copied, given back and run out of."""

from __future__ import annotations

import numpy as np
import pytest

import attncore
from kit import assert_same_bits, normal
from paged_cache_kit import DIM, assert_consistent, assert_holds, forked, give, paged


def test_numbers_are_used_again() -> None:
    cache = paged()
    assert [cache.add() for _ in range(4)] == [0, 1, 2, 3]
    cache.free(2)
    cache.free(0)
    assert cache.entries == [1, 3]
    assert cache.lengths.tolist() == [-1, 0, -1, 0]
    assert cache.add() == 0
    assert cache.fork(3) == 2
    assert cache.add() == 4


def test_pages_are_taken_as_tokens_come(rng: np.random.Generator) -> None:
    cache = paged()
    cache.add()
    for tokens, pages in ((0, 0), (1, 1), (3, 1), (1, 2), (9, 4)):
        give(cache, rng, e0=tokens)
        assert len(cache.block_table(0)) == pages
        assert cache.free_pages == 20 - pages
        assert_consistent(cache)
    assert cache.memory().used == 4 * 4 * 2 * (DIM + DIM) * 4
    assert cache.memory().reserved == 20 * 4 * 2 * (DIM + DIM) * 4


def test_a_fork_shares_until_one_of_both_writes(rng: np.random.Generator) -> None:
    cache, prompt = forked(rng, 10)
    assert cache.block_table(1).tolist() == cache.block_table(0).tolist()
    assert cache.free_pages == 17
    assert cache.reference_counts().tolist() == [2] * 3 + [0] * 17
    mine = give(cache, rng, e1=1)[0]
    assert cache.free_pages == 16  # the last page is copied
    assert (cache.block_table(0) == cache.block_table(1)).tolist() == [True, True, False]
    theirs = give(cache, rng, e0=3)[0]
    assert cache.free_pages == 15  # it has its last page for itself now
    assert_holds(cache, 0, np.concatenate([prompt, theirs], 1))
    assert_holds(cache, 1, np.concatenate([prompt, mine], 1))
    assert_consistent(cache)
    cache.free(0)
    assert_holds(cache, 1, np.concatenate([prompt, mine], 1))
    assert cache.free_pages == 17
    cache.free(1)
    assert cache.free_pages == 20
    assert_consistent(cache)


def test_a_fork_at_a_page_s_end_copies_nothing(rng: np.random.Generator) -> None:
    cache, _ = forked(rng, 8)
    give(cache, rng, e0=1, e1=1)
    assert cache.free_pages == 16
    assert_consistent(cache)


@pytest.mark.parametrize("shorter", [0, 1])
def test_sharers_of_different_lengths_in_one_call(shorter: int, rng: np.random.Generator) -> None:
    """One of them begins to write where the other still has tokens."""
    cache, prompt = forked(rng, 7)
    cache.truncate(5, entries=shorter)
    added = give(cache, rng, e0=2, e1=3)
    for entry, count in ((0, 2), (1, 3)):
        length = 5 if entry == shorter else 7
        assert_holds(cache, entry, np.concatenate([prompt[:, :length], added[entry, :, :count]], 1))
    assert_consistent(cache)


@pytest.mark.parametrize("idle", [0, 1])
def test_a_sharer_that_gets_nothing_keeps_its_tokens(idle: int, rng: np.random.Generator) -> None:
    cache, prompt = forked(rng, 7)
    before = cache.block_table(idle).tolist()
    added = give(cache, rng, e0=idle, e1=1 - idle)[1 - idle]
    assert_holds(cache, idle, prompt)
    assert_holds(cache, 1 - idle, np.concatenate([prompt, added], 1))
    assert cache.block_table(idle).tolist() == before
    assert_consistent(cache)


def test_the_longest_of_all_sharers_keeps_the_page(rng: np.random.Generator) -> None:
    """A copy for each of the others is all that is needed."""
    cache, prompt = forked(rng, 3, pages=3)
    cache.truncate(2, entries=cache.fork(0))
    added = give(cache, rng, e0=1, e1=1, e2=1)
    assert cache.free_pages == 0
    for entry, length in ((0, 3), (1, 3), (2, 2)):
        assert_holds(cache, entry, np.concatenate([prompt[:, :length], added[entry]], 1))
    assert_consistent(cache)


def test_a_call_that_fails_leaves_sharers_alone(rng: np.random.Generator) -> None:
    """The shorter sharer's tokens are written before the last entry's are found bad."""
    cache, _ = forked(rng, 7, dtype="int8")
    cache.fork(0)
    cache.truncate([5, 6], entries=[1, 2])
    before = [cache.gather(entry) for entry in range(3)]
    tables = [cache.block_table(entry).tolist() for entry in range(3)]
    tokens = normal(rng, 3, 2, 4, DIM)
    bad = tokens.copy()
    bad[2, 1, 3, 0] = np.nan
    with pytest.raises(ValueError, match=r"key: has a NaN .* entry 2"):
        cache.append(bad, tokens, entries=[0, 1, 2])
    for entry in range(3):
        for now, then in zip(cache.gather(entry), before[entry], strict=True):
            assert_same_bits(now, then)
    assert [cache.block_table(entry).tolist() for entry in range(3)] == tables
    assert_consistent(cache)


@pytest.mark.parametrize(("counts", "needed"), [({"e0": 32}, 8), ({"e1": 21, "e0": 8}, 8)])
def test_running_out_of_pages(
    counts: dict[str, int], needed: int, rng: np.random.Generator
) -> None:
    cache = paged(8)
    cache.add()
    cache.add()
    prompt = give(cache, rng, e0=1)[0]
    with pytest.raises(MemoryError, match=f"append: needs {needed} pages, 7 of 8 are free"):
        give(cache, rng, **counts)
    assert cache.lengths.tolist() == [1, 0]
    assert_holds(cache, 0, prompt)
    assert_consistent(cache)
    rest = give(cache, rng, e0=3, e1=28)
    assert cache.free_pages == 0
    assert_holds(cache, 0, np.concatenate([prompt, rest[0, :, :3]], 1))
    with pytest.raises(MemoryError, match="needs 1 pages, 0 of 8 are free"):
        give(cache, rng, e0=1)
    cache.free(1)
    give(cache, rng, e0=1)
    assert_consistent(cache)


def test_a_copy_needs_a_page_too(rng: np.random.Generator) -> None:
    cache, prompt = forked(rng, 6, pages=2)
    with pytest.raises(MemoryError, match="needs 1 pages, 0 of 2 are free"):
        give(cache, rng, e1=1)
    assert_holds(cache, 0, prompt)
    assert_holds(cache, 1, prompt)
    assert_consistent(cache)
    cache.truncate(4, entries=1)
    cache.truncate(4, entries=0)
    assert cache.free_pages == 1
    assert_consistent(cache)


def test_trees(isa: str, rng: np.random.Generator) -> None:
    """Each new token sees what stood before, its ancestors and itself; rejected ones are forgotten."""
    cache = paged(40)
    cache.add()
    cache.add()
    prompts = give(cache, rng, e0=9, e1=30)
    new = normal(rng, 2, 2, 6, DIM)
    cache.append(new, -new)
    parents = np.array([[-1, 0, 0, 1, -1, 4], [-1, 0, 1, 2, 3, 4]])
    query = normal(rng, 2, 4, 6, DIM)
    out, lse = cache.attend(query, tree_parents=parents, return_lse=True)
    for entry, length in ((0, 9), (1, 30)):
        seen = np.zeros((6, 6), bool)
        for token, parent in enumerate(parents[entry]):
            seen[token] = seen[parent] if parent >= 0 else False
            seen[token, token] = True
        mask = np.concatenate([np.ones((6, length), bool), seen], 1)
        key = np.concatenate([prompts[entry, :, :length], new[entry]], 1)
        expected, its_lse = attncore.attention(
            query[entry], key, -key, mask=mask, causal=True, return_lse=True
        )
        np.testing.assert_allclose(out[entry], expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(lse[entry], its_lse, rtol=0, atol=1e-6)
    cache.truncate([11, 30])
    assert cache.lengths.tolist() == [11, 30]
    assert_consistent(cache)
