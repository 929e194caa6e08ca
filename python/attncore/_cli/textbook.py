"""Attention as a textbook writes it in NumPy: the whole score matrix in memory.

What the demo and its tests compare attncore with; nothing of the library calls it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def textbook_attention(
    query: Array, key: Array, value: Array, lengths: Array | None = None
) -> Array:
    """softmax(Q·Kᵀ/√D)·V on axes (batch, head, token, dim); keys past ``lengths`` are hidden."""
    scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])
    if lengths is not None:
        hidden = np.arange(key.shape[-2]) >= np.asarray(lengths)[:, None]
        scores = np.where(hidden[:, None, None, :], -np.inf, scores)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out: Array = weights @ value
    return out
