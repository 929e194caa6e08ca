"""The settings of rotary position embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from attncore._types import Array

RotaryFields: TypeAlias = tuple[float, int | None, bool, tuple[float, ...] | None, float]


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (Su et al. 2021), for layers, caches and `rope`.

    The first ``dims`` of a head, an even number, are rotated, by default all: as pairs (2i, 2i + 1)
    if ``interleaved``, else (i, i + dims / 2).  Pair i turns by position · frequency i, which is
    ``base``^(−2i / dims), base being at least 1e-100, or ``frequencies[i]``: models whose context
    was stretched have frequencies of their own (docs/layers.md has Llama 3's and YaRN's).  What is
    rotated is multiplied by ``factor`` too, as YaRN (Peng et al. 2023) does.

    Raises:
        ValueError: frequencies are not one-dimensional, or empty.
        TypeError: They are no real numbers.

    Example:
        >>> import numpy as np, attncore
        >>> attncore.KVCache(1, 1, 64, capacity=8, rotary=attncore.Rotary(base=5e5)).lengths
        array([0])
        >>> linear = attncore.Rotary(frequencies=[1 / 8, 0.1 / 8])  # positions eight times closer
        >>> x = np.array([[1.0, 0, 0, 0]])
        >>> bool(np.allclose(attncore.rope(x, [8], rotary=linear), attncore.rope(x, [1])))
        True
    """

    base: float = 10000.0
    dims: int | None = None
    interleaved: bool = False
    frequencies: Sequence[float] | Array | None = None
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.frequencies is None:
            return
        try:
            frequencies = np.asarray(self.frequencies)
        except ValueError:
            raise TypeError("frequencies: must be a sequence of numbers") from None
        if frequencies.size > 0 and frequencies.dtype.kind not in "fiu":
            raise TypeError(f"frequencies: dtype is {frequencies.dtype}, must be real numbers")
        if frequencies.ndim != 1 or frequencies.size == 0:
            raise ValueError(
                f"frequencies: shape is {frequencies.shape}, must be one for each pair of dims"
            )
        object.__setattr__(self, "frequencies", tuple(frequencies.astype(np.float64).tolist()))


def rotary_of(rotary: Rotary | bool | None) -> Rotary | None:
    """What a layer's or a cache's argument means."""
    if isinstance(rotary, (bool, np.bool_)):
        return Rotary() if rotary else None
    if rotary is not None and not isinstance(rotary, Rotary):
        raise TypeError(f"rotary: must be a Rotary, a bool or None, is {type(rotary).__name__}")
    return rotary


def fields_of(rotary: Rotary) -> RotaryFields:
    """As the core takes it."""
    frequencies: Any = rotary.frequencies
    return rotary.base, rotary.dims, rotary.interleaved, frequencies, rotary.factor


def plain_rotary(rotary: Rotary) -> Rotary:
    """With Python's numbers."""
    dims = None if rotary.dims is None else int(rotary.dims)
    return Rotary(
        float(rotary.base), dims, bool(rotary.interleaved), rotary.frequencies, float(rotary.factor)
    )


def in_file(rotary: Rotary) -> dict[str, Any]:
    """In JSON; what the first files did not have is there where it says something."""
    base, dims, interleaved, frequencies, factor = fields_of(rotary)
    saved: dict[str, Any] = {"base": base, "dims": dims, "interleaved": interleaved}
    if frequencies is not None:
        saved["frequencies"] = list(frequencies)
    if factor != 1:
        saved["factor"] = factor
    return saved
