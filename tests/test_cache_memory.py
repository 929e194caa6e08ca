"""The memory of caches: address space becomes memory where tokens are written, and no sooner."""

from __future__ import annotations

import pytest

from kit import run_child

CHILD = """
    import numpy as np
    import attncore

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((4, 8, 2000, 64), dtype=np.float32)
    first = tokens[:, :, :1]
    warm = attncore.KVCache(4, 8, 64, capacity=10)
    warm.append(first, first)
    before = resident()
    cache = {make}
    reserved = cache.memory().reserved
    assert reserved >= 2**32, reserved
    assert resident() - before < 2**20
    cache.append(first, first)
    assert cache.memory().used <= {page} * 4 * 8 * 128 * 4
    assert resident() - before < {few}, resident() - before
    for _ in range(4):
        cache.append(tokens, tokens)
    used = cache.memory().used
    assert resident() - before < 2 * used + {few}, (resident() - before, used)
    key, value = cache.gather(3)
    np.testing.assert_array_equal(key[:, 1:2001], tokens[3])
    np.testing.assert_array_equal(value[:, -2000:], tokens[3])
    before = resident()
    del cache, key, value
    assert resident() < before - used / 2
"""
PAGED = "attncore.PagedKVCache(2**16, 32, 8, 64); [cache.add() for _ in range(4)]"


@pytest.mark.parametrize(
    ("make", "page", "few"),
    [
        # 64 rows of keys and values, which begin in pages of their own.
        ("attncore.KVCache(4, 8, 64, capacity=2**18)", 1, 2**20),
        (PAGED, 32, 2**23),  # some huge pages
    ],
)
def test_memory_comes_with_tokens(make: str, page: int, few: int) -> None:
    pytest.importorskip("resource")
    run_child(CHILD.format(make=make, page=page, few=few))
