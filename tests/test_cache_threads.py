"""Caches used from several threads at once: readers together, a writer alone, no torn state."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import attncore
from cache_kit import KINDS, make_cache
from kit import assert_same_bits, normal
from reference import Array
from threads_kit import at_once


def is_refused(call: Callable[[], Any]) -> bool:
    try:
        call()
    except RuntimeError as error:
        if not re.fullmatch("cache: another thread is (changing|reading) it", str(error)):
            raise
        return True
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_readers_together(kind: str, rng: np.random.Generator) -> None:
    cache = make_cache(kind, 4, 2, 32)
    cache.append(normal(rng, 4, 2, 900, 32), normal(rng, 4, 2, 900, 32))
    queries = [normal(rng, 4, 8, n, 32) for n in (1, 2, 5, 17)]
    expected = [cache.attend(query) for query in queries]

    def read(first: int) -> None:
        for i in range(first, first + 12):
            query = queries[i % 4]
            assert_same_bits(cache.attend(query, num_threads=1 + i % 2), expected[i % 4])
            assert cache.lengths.tolist() == [900] * 4
            assert cache.gather(i % 4)[0].shape == (2, 900, 32)

    at_once(4, read)


def refuse_while(long: Callable[[], Any], calls: list[Callable[[], Any]]) -> None:
    """While another thread runs `long` again and again, each of the calls is refused sooner or later."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            is_refused(long)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        try:
            for call in calls:
                end = time.monotonic() + 60  # the other thread may get no core for a while
                while not is_refused(call) and not running.done():
                    assert time.monotonic() < end
        finally:
            stop.set()
        running.result()


@pytest.mark.parametrize("kind", KINDS)
def test_a_writer_finds_a_reader(kind: str, rng: np.random.Generator) -> None:
    cache = make_cache(kind, 2, 1, 64)
    cache.append(normal(rng, 2, 1, 1500, 64), normal(rng, 2, 1, 1500, 64))
    query = normal(rng, 2, 8, 1500, 64)
    nothing = np.zeros((2, 1, 0, 64), np.float32)
    writes: list[Callable[[], Any]] = [
        lambda: cache.append(nothing, nothing),
        lambda: cache.truncate(1500),
    ]
    if isinstance(cache, attncore.PagedKVCache):
        writes += [lambda: cache.free(cache.fork(0)), lambda: cache.free(cache.add())]
    refuse_while(lambda: cache.attend(query, entries=[0, 1], num_threads=1), writes)
    assert cache.lengths[:2].tolist() == [1500, 1500]


@pytest.mark.parametrize("kind", KINDS)
def test_anybody_finds_a_writer(kind: str, rng: np.random.Generator) -> None:
    cache = make_cache(kind, 2, 4, 128, dtype="int8")
    tokens = normal(rng, 2, 4, 1000, 128)

    def write() -> None:  # either may be refused: emptied first, it never has more than one append
        cache.truncate(0)
        cache.append(tokens, tokens)

    query = normal(rng, 2, 4, 1, 128)
    reads: list[Callable[[], Any]] = [
        lambda: cache.attend(query),
        lambda: cache.lengths,
        lambda: cache.gather(0),
        cache.memory,
        lambda: cache.truncate(0),
    ]
    refuse_while(write, reads)


@pytest.mark.parametrize("kind", KINDS)
def test_no_torn_state(kind: str, rng: np.random.Generator) -> None:
    """Writers and readers at once: a result is that of some number of whole appends, in order."""
    cache = make_cache(kind, 1, 1, 16, page_size=4)
    tokens, query = normal(rng, 1, 1, 120, 16), normal(rng, 1, 2, 1, 16)
    expected = [
        attncore.attention(query, tokens[:, :, :n], tokens[:, :, :n]) for n in range(0, 121, 3)
    ]
    turn = threading.Lock()
    appended = 0
    seen: list[Array] = []

    def write() -> None:
        nonlocal appended
        while True:
            with turn:  # for the order of tokens; readers know nothing of it
                if appended == 120:
                    return
                new = tokens[:, :, appended : appended + 3]
                if not is_refused(lambda new=new: cache.append(new, new)):  # type: ignore[misc]
                    appended += 3

    def read() -> None:
        while appended < 120:
            is_refused(lambda: seen.append(cache.attend(query)))

    at_once(4, lambda i: write() if i < 2 else read())
    for out in seen:
        assert any((out == right).all() for right in expected)
    assert_same_bits(cache.gather(0)[0], np.ascontiguousarray(tokens[0]))
    assert_same_bits(cache.attend(query), expected[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_lets_go(kind: str) -> None:
    """A call that fails, as reader or writer, does not stay in the cache."""
    cache = make_cache(kind, 1, 1, 4)
    wrong = np.zeros((1, 1, 3, 5), np.float32)
    for _ in range(3):
        with pytest.raises(ValueError, match="key"):
            cache.append(wrong, wrong)
        with pytest.raises(ValueError, match="query"):
            cache.attend(wrong)
    cache.append(wrong[..., :4], wrong[..., :4])
    assert cache.attend(wrong[..., :4]).shape == (1, 1, 3, 4)
