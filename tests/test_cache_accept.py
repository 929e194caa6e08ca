"""`accept` of both caches: a branch of a tree stays, as if its tokens had been appended alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from cache_kit import KINDS, STORAGE, make_cache, query_dtype
from kit import assert_same_bits, normal

PARENTS = [-1, 0, 0, 1, 2, 2]
DEPTH = np.array([0, 1, 1, 2, 2, 2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("rotary", [None, attncore.Rotary(100.0, interleaved=True)])
def test_a_branch_stays(
    kind: str, storage: str, rotary: attncore.Rotary | None, rng: np.random.Generator
) -> None:
    """Ragged: entries of several lengths keep branches of several lengths, to the bit."""
    old, new = normal(rng, 2, 3, 2, 11, 8), normal(rng, 2, 3, 2, 6, 8)
    lengths, branches = [11, 4, 1], [[0, 2, 4], [0, 1], []]
    cache, expected = (
        make_cache(kind, 3, 2, 8, dtype=storage, rotary=rotary, page_size=4) for _ in range(2)
    )
    for one in (cache, expected):
        one.append(*old, lengths=lengths)
    positions = None if rotary is None else np.array(lengths)[:, None] + DEPTH
    cache.append(*new, positions=positions)
    for entry, branch in enumerate(branches):
        key, value = (a[entry][:, branch] for a in new)
        expected.append(key, value, entries=[entry])
    cache.accept([[0, 2, 4, -1], [0, 1, -1, 5], [-1, -1, 7, 2]], 6)
    assert cache.lengths.tolist() == [14, 6, 1] == expected.lengths.tolist()
    for entry in range(3):
        for ours, theirs in zip(cache.gather(entry), expected.gather(entry), strict=True):
            assert_same_bits(ours, theirs)
    query = normal(rng, 3, 4, 1, 8, dtype=query_dtype(storage))
    assert_same_bits(cache.attend(query), expected.attend(query))


@pytest.mark.parametrize("kind", KINDS)
def test_speculation(kind: str, rng: np.random.Generator) -> None:
    """The loop: a tree is appended, attended to, one branch of it accepted; then the next step."""
    cache = make_cache(kind, 1, 2, 8, rotary=True, page_size=4)
    keys, values, queries = normal(rng, 3, 1, 2, 30, 8)
    cache.append(keys[:, :, :5], values[:, :, :5])
    tokens = np.arange(5)
    for step in range(5, 29, 6):
        new = np.arange(step, step + 6)
        cache.append(keys[:, :, new], values[:, :, new], positions=len(tokens) + DEPTH)
        out = cache.attend(queries[:, :, new], tree_parents=PARENTS, rotate_query=True)
        branch = [0, 2, 5] if step % 4 else [0, 1]
        cache.accept(branch, 6)
        tokens = np.concatenate([tokens, new[branch]])
        at = np.arange(len(tokens))
        q, k = (attncore.rope(a[:, :, tokens], at) for a in (queries, keys))
        whole = attncore.attention(q, k, values[:, :, tokens], causal=True)
        last = len(branch)
        np.testing.assert_allclose(out[:, :, branch], whole[:, :, -last:], rtol=0, atol=2e-6)


def test_latent(rng: np.random.Generator) -> None:
    cache = make_cache("PagedKVCache", 1, 1, 8, value_dim=6, value_in_key=True, page_size=2)
    key = normal(rng, 1, 1, 9, 8)
    cache.append(key)
    cache.accept([1, 3, 4], 5)
    assert_same_bits(cache.gather(0)[0], np.ascontiguousarray(key[0][:, [0, 1, 2, 3, 5, 7, 8]]))


def test_forks_keep_their_tokens(rng: np.random.Generator) -> None:
    """Pages that others share are copied before tokens move in them; that needs free pages."""
    cache = attncore.PagedKVCache(5, 4, 1, 2)
    key = normal(rng, 1, 1, 10, 2)
    first = cache.add()
    cache.append(key, key, entries=[first])
    second = cache.fork(first)
    cache.accept([0, 2], 4, entries=[second])  # tokens 6 … 9: 8 moves to 7, in the second page
    assert cache.reference_counts().tolist() == [2, 1, 1, 1, 0]
    assert_same_bits(cache.gather(first)[0], key[0])
    kept = np.ascontiguousarray(key[0][:, [0, 1, 2, 3, 4, 5, 6, 8]])
    assert_same_bits(cache.gather(second)[0], kept)
    third = cache.fork(first)
    with pytest.raises(MemoryError, match="accept: needs 2 pages, 1 of 5 are free"):
        cache.accept([0, 2, 3], 4, entries=[third])
    assert_same_bits(cache.gather(third)[0], key[0])
    cache.accept([0, 1], 4, entries=[third])  # nothing moves: no copies
    assert cache.free_pages == 1


def test_all_who_have_a_page_write_to_it(rng: np.random.Generator) -> None:
    """The last one keeps it: one copy less."""
    cache = attncore.PagedKVCache(3, 4, 1, 2)
    key = normal(rng, 1, 1, 8, 2)
    both = [cache.add()]
    cache.append(key, key)
    both.append(cache.fork(0))
    cache.accept([0, 2], 4, entries=both)
    assert cache.reference_counts().tolist() == [2, 1, 1]
    for entry in both:
        kept = np.ascontiguousarray(key[0][:, [0, 1, 2, 3, 4, 6]])
        assert_same_bits(cache.gather(entry)[0], kept)


BAD: dict[str, tuple[tuple[Any, Any], type[Exception], str]] = {
    "too many new tokens": (([0], 6), ValueError, "new_tokens: is 6 for entry 0, must be 0 … 5"),
    "negative": (([0], -1), ValueError, "new_tokens: is -1 for entry 0, must be 0 … 5"),
    "of another number of entries": (([0], [1, 2, 3]), ValueError, "new_tokens: shape is"),
    "new tokens of floats": (([0], 2.0), TypeError, "new_tokens: dtype is float"),
    "past the new ones": (
        ([0, 3], 3),
        ValueError,
        "branch: has 3 for entry 0, must be above 0 there and below 3, or -1",
    ),
    "twice": (([1, 1], 3), ValueError, "branch: has 1 for entry 0, must be above 1"),
    "backwards": (([[0, 1], [1, 0]], 3), ValueError, "branch: has 0 for entry 1, must be above 1"),
    "below -1": (([0, -2], 3), ValueError, "branch: has -2 for entry 0"),
    "branch of floats": (([0.0], 3), TypeError, "branch: dtype is float"),
    "of too many axes": (([[[0]]], 3), ValueError, "branch: has 3 dimensions"),
    "a scalar": ((0, 3), ValueError, "branch: is a scalar"),
    "no branch": ((None, 3), ValueError, "branch: is not given"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input(kind: str, case: str, rng: np.random.Generator) -> None:
    given, exception, message = BAD[case]
    cache = make_cache(kind, 2, 1, 2)
    key = normal(rng, 2, 1, 5, 2)
    cache.append(key, key)
    with pytest.raises(exception, match=message):
        cache.accept(*given)
    assert cache.lengths.tolist() == [5, 5]
    assert_same_bits(cache.gather(1)[0], key[1])
    for distinct in ([0, 0], [2]):
        with pytest.raises(ValueError, match="entries: has"):
            cache.accept([0], 1, entries=distinct)


def test_what_a_window_gave_back(rng: np.random.Generator) -> None:
    cache = attncore.PagedKVCache(20, 2, 1, 2, window=3)
    cache.add()
    for _ in range(6):
        key = normal(rng, 1, 1, 2, 2)
        cache.append(key, key)
    assert cache.block_table(0).tolist()[:3] == [-1, -1, -1]
    with pytest.raises(ValueError, match="new_tokens: leaves 3 tokens of entry 0"):
        cache.accept([0, 1, 2], 12)
    with pytest.raises(ValueError, match="branch: moves a token of entry 0 to 1, whose tokens"):
        cache.accept([0, *range(2, 12)], 12)
    cache.accept([1], 2)
    assert cache.lengths.tolist() == [11]
