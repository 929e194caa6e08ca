"""What dropout keeps, written in NumPy: the counter-based generator Philox 4×32-10 (Salmon et al. 2011).

The format (docs/semantics.md): the key is the seed, low word first; the counter is
(16 · ⌊key / 128⌋ + key mod 16, query, head, batch).  A block's four words are eight values of 16 bits, value
2w is the low half of word w; the key's value has the number ⌊(key mod 128) / 16⌋.  A weight is kept where
the value is at least the threshold ⌊p · 65536 + ½⌋, at most 65535, and then multiplied by 65536 / (65536 − threshold).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]  # of 32 bits: products of two fit

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
LOW = np.uint64(0xFFFFFFFF)
ROUNDS = 10


def philox4x32(counter: Any, key: tuple[int, int]) -> tuple[Words, ...]:
    """The four words of a block; counter is four words, or four arrays of them that broadcast."""
    a, b, c, d = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter))
    first, second = key
    for _ in range(ROUNDS):
        left, right = np.uint64(MULTIPLIERS[0]) * a, np.uint64(MULTIPLIERS[1]) * c
        a, b, c, d = (
            (right >> np.uint64(32)) ^ b ^ np.uint64(first),
            right & LOW,
            (left >> np.uint64(32)) ^ d ^ np.uint64(second),
            left & LOW,
        )
        first, second = (first + WEYL[0]) % 2**32, (second + WEYL[1]) % 2**32
    return a, b, c, d


def threshold(p: float) -> int:
    return min(math.floor(p * 65536 + 0.5), 65535)


def keep_mask(
    seed: int, p: float, shape: tuple[int, int, int, int], rows: Any = None
) -> npt.NDArray[np.bool_]:
    """(batch, head, row, key), True where dropout keeps; `rows` are the queries, all by default."""
    batch, heads, queries, keys = shape
    key = np.arange(keys)
    row = np.arange(queries) if rows is None else np.asarray(rows)
    counter = (
        16 * (key // 128) + key % 16,
        row[:, None],
        np.arange(heads)[:, None, None],
        np.arange(batch)[:, None, None, None],
    )
    words = np.stack(philox4x32(counter, (int(seed) % 2**32, int(seed) >> 32)))
    number = key % 128 // 16
    chosen = np.take_along_axis(words, (number // 2)[None, None, None, None, :], axis=0)[0]
    values = chosen >> (16 * (number % 2)).astype(np.uint64) & np.uint64(0xFFFF)
    return np.asarray(values >= threshold(p))


def kept_factor(p: float) -> float:
    """What kept weights are multiplied by."""
    return 65536 / (65536 - threshold(p))
