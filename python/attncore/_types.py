"""The names of what goes in and out."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.floating[Any]]
Ints: TypeAlias = npt.NDArray[np.integer[Any]] | Sequence[int]
Table: TypeAlias = npt.NDArray[np.integer[Any]] | Sequence[Sequence[int]] | Sequence[int]
Layout: TypeAlias = Literal["bhsd", "bshd"]
Precision: TypeAlias = Literal["highest", "high", "medium"]
Window: TypeAlias = tuple[int | None, int | None]


def is_int(given: Any) -> bool:
    """What counts something: no bool, and no array of floats, which has __index__ as well."""
    try:
        operator.index(given)
    except TypeError:
        return False
    return not isinstance(given, bool)


class RelativeBias(NamedTuple):
    """The relative position bias of T5 (Raffel et al. 2020), computed inside attention's tiles.

    A score gets ``table[head, bucket(key - position)]``.  Half of one direction's buckets are for
    the distances 0, 1, …; the others for ranges that widen by a constant ratio up to
    ``max_distance``; all beyond is in the last.

    Args:
        table: (heads, buckets), float32 or query's dtype.
        bidirectional: Half of the buckets are for keys after the position (T5's encoder); if not,
            those keys share bucket 0 (its decoder).
        max_distance: Greater than the number of buckets for single distances, at most 2²⁰.

    The functions that take one raise ValueError where ``table`` has fewer than 2 buckets a direction
    or an odd number for two, or where ``max_distance`` does not fit.

    Example:
        >>> import numpy as np, attncore
        >>> x = np.ones((1, 2, 5, 8), np.float32)
        >>> bias = attncore.RelativeBias(np.zeros((2, 32), np.float32), bidirectional=False)
        >>> attncore.attention(x, x, x, causal=True, relative_bias=bias).shape
        (1, 2, 5, 8)
    """

    table: Array
    bidirectional: bool = True
    max_distance: int = 128


class Gradients(NamedTuple):
    """What `attention_backward` returns: each like its argument, None for what was not given."""

    query: Array | None = None
    key: Array | None = None
    value: Array | None = None
    bias: Array | tuple[Array | None, ...] | None = None
    alibi: Array | None = None
    sinks: Array | None = None
    relative_bias: Array | None = None


class CrossGradients(NamedTuple):
    """The gradients of a call with a context."""

    x: Array | None
    context: Array | None


class CrossValueGradients(NamedTuple):
    """The gradients of a call with a context and a value context."""

    x: Array | None
    context: Array | None
    value_context: Array | None


class _SharedOptions(TypedDict, total=False):
    causal: bool
    window: Window | None
    mask: npt.NDArray[np.bool_] | None
    bias: Array | Sequence[Array] | None
    alibi: Array | Sequence[float] | None
    relative_bias: RelativeBias | None
    softcap: float | None
    sinks: Array | Sequence[float] | None
    scale: float | None
    query_lengths: int | Ints | None
    tree_parents: Ints | None
    precision: Precision
    num_threads: int | None


class _PlaceOptions(_SharedOptions, total=False):
    query_offset: int | Ints | None
    query_segments: Ints | None
    key_segments: Ints | None


class _LayoutOption(TypedDict, total=False):
    layout: Layout


class AttendOptions(_LayoutOption, _SharedOptions, total=False):
    """The options of `attention` that caches leave to the caller."""


class PagedOptions(_LayoutOption, _PlaceOptions, total=False):
    """The options of attention over pages: key_lengths is no option there."""


class PackedOptions(_PlaceOptions, total=False):
    """The options of attention over packed sequences, whose layout is fixed."""

    key_lengths: int | Ints | None


class ScoreOptions(_LayoutOption, PackedOptions, total=False):
    """The options that `attention`, `attention_weights` and `explain` share."""


@dataclass(frozen=True)
class Plan:
    """How a call would run; ``print(plan)`` shows it for people.

    A task takes ``query_tile`` rows and ``key_tile`` keys at a time; there are ``tasks`` of them, and
    keys are split into up to ``key_splits`` parts.  ``flops`` counts the products (by 64 rows
    of a sequence, but where segments are given) of the pairs that causal, window, lengths and segments in their order leave (what masks, biases, other segments
    and trees hide is not counted out, though it may be skipped), ``bytes`` what is read and written at least; ``floor_seconds``
    is the longer of the two on this machine, ``estimated_seconds`` the call's time, from some of
    its tasks, run and timed.

    Example:
        >>> import numpy as np, attncore
        >>> x = np.zeros((1, 2, 300, 64), np.float32)
        >>> plan = attncore.explain(x, x, x)
        >>> plan.flops == 4 * 2 * 300 * 300 * 64
        True
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
    floor_seconds: float
    estimated_seconds: float
    text: str = field(repr=False)

    def __str__(self) -> str:
        return self.text
