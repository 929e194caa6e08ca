"""What docs/caching.md says: its pictures, its table of storage, its bound of results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from reference import Array, reference

# dtype: (error of a number over the largest of its token, bytes of 64 numbers)
STORAGE = {
    "float32": (2**-24, 256),
    "bfloat16": (1 / 256, 128),
    "float16": (1 / 2048, 128),
    "int8": (1 / 254, 68),
    "float8_e4m3fn": (1 / 16, 68),
    "int4": (1 / 14, 36),
}


def ones(*shape: int) -> Array:
    return np.ones(shape, np.float32)


def test_the_picture_of_pages() -> None:
    cache = attncore.PagedKVCache(4, page_size=4, kv_heads=1, dim=2)

    def tables() -> list[list[int]]:
        return [cache.block_table(entry).tolist() for entry in cache.entries]

    first = cache.add()
    cache.append(ones(1, 1, 10, 2), ones(1, 1, 10, 2), entries=[first])
    second = cache.fork(first)
    assert (first, second) == (0, 1)
    assert tables() == [[0, 1, 2], [0, 1, 2]]
    assert cache.reference_counts().tolist() == [2, 2, 2, 0]
    cache.append(ones(1, 1, 1, 2), ones(1, 1, 1, 2), entries=[second])
    assert tables() == [[0, 1, 2], [0, 1, 3]]
    assert cache.reference_counts().tolist() == [2, 2, 1, 1]
    cache.truncate([8], entries=[first])
    assert tables() == [[0, 1], [0, 1, 3]]
    assert cache.reference_counts().tolist() == [2, 2, 0, 1]


def test_the_picture_of_a_tree(rng: np.random.Generator) -> None:
    """Which of the new tokens sees which."""
    sees = ["x", "xx", "x x", "xx x", "x x x"]
    mask = np.array([[row[i : i + 1] == "x" for i in range(5)] for row in sees])
    query, key, value = rng.standard_normal((3, 1, 2, 5, 8), dtype=np.float32)
    out = attncore.attention(query, key, value, tree_parents=[-1, 0, 0, 1, 2])
    assert (out == attncore.attention(query, key, value, mask=mask)).all()


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("size", [0.1, 1.0])
def test_the_bound_of_results(storage: str, size: float, rng: np.random.Generator) -> None:
    """From errors of keys and values to that of attention to them."""
    pytest.importorskip("ml_dtypes")
    share, bytes_of_token = STORAGE[storage]
    q, k, v = (size * rng.standard_normal((1, 2, n, 64)) for n in (3, 200, 200))
    cache = attncore.KVCache(1, kv_heads=2, dim=64, capacity=200, dtype=storage)
    cache.append(k, v)
    assert cache.memory().used == 2 * 2 * 200 * bytes_of_token
    slack = share + 2**-23  # float32's own rounding
    stored: Any = cache.gather(0)
    for ours, theirs in zip(stored, (k[0], v[0]), strict=True):
        largest = np.abs(theirs).max(axis=-1, keepdims=True)
        assert (np.abs(ours.astype(float) - theirs) <= slack * largest).all()

    exact = reference(q, k, v).out.astype(float)
    delta = np.abs(q).sum(axis=-1) / 8 * slack * np.abs(k).max()  # (batch, head, query)
    far = np.abs(v[:, :, None] - exact[:, :, :, None]).max(axis=3)  # (batch, head, query, dim)
    bound = np.expm1(2 * delta)[..., None] * far + slack * np.abs(v).max()
    out = cache.attend(q.astype(np.float32), causal=False)
    error = np.abs(out - exact)
    assert (error <= bound + 1e-6).all()
    if storage != "float32":
        assert error.max() > 1e-6  # it is the storage that is measured
