"""The names of what goes in and out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.floating[Any]]
Ints: TypeAlias = npt.NDArray[np.integer[Any]] | Sequence[int]
Layout: TypeAlias = Literal["bhsd", "bshd"]
Window: TypeAlias = tuple[int | None, int | None]


class ScoreOptions(TypedDict, total=False):
    """The options that `attention`, `attention_weights` and `explain` share."""

    layout: Layout
    causal: bool
    window: Window | None
    query_offset: int | Ints | None
    mask: npt.NDArray[np.bool_] | None
    bias: Array | Sequence[Array] | None
    alibi: Array | Sequence[float] | None
    softcap: float | None
    sinks: Array | Sequence[float] | None
    scale: float | None
    query_segments: Ints | None
    key_segments: Ints | None
    query_lengths: int | Ints | None
    key_lengths: int | Ints | None
    num_threads: int | None


@dataclass(frozen=True)
class Plan:
    """How a call would run; ``print(plan)`` shows it for people.

    ``flops`` counts the products of visible tiles, ``bytes`` what is read and written at least,
    ``estimated_seconds`` is the floor that both give on this machine, measured when asked.
    """

    isa: str
    kernel: str
    threads: int
    query_tile: int
    key_tile: int
    tasks: int
    key_splits: int
    workspace_bytes: int
    flops: float
    bytes: float
    estimated_seconds: float
    text: str = field(repr=False)

    def __str__(self) -> str:
        return self.text
