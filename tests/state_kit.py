"""AttentionState over pieces of arrays, held against the reference over all keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

import attncore
from kit import DTYPE_NAMES
from reference import Array, Result, plain, reference

# Options of the whole and of a piece; key_lengths is of both.
OF_PIECES = ("mask", "bias", "key_segments", "key_lengths")

# (state's dtype, dtype of keys and values)
DTYPE_PAIRS = [("float32", name) for name in DTYPE_NAMES if name != "float64"]
DTYPE_PAIRS += [("float64", name) for name in DTYPE_NAMES]


def sizes_to_cuts(sizes: Iterable[int], keys: int) -> list[tuple[int, int]]:
    """(begin, end) of pieces of these sizes, repeated until all keys are in one."""
    pieces: list[tuple[int, int]] = []
    begin, sizes = 0, list(sizes)
    while begin < keys:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append((begin, min(begin + size, keys)))
        begin += size
    return pieces


def piece_of(
    key: Array, value: Array, begin: int, end: int, **options: Any
) -> tuple[tuple[Array, Array], dict[str, Any]]:
    """Arguments of an update with keys begin … end − 1 of (batch, head, token, dim) arrays."""

    def part(array: Array) -> Array:
        return array[..., begin:end] if array.shape[-1:] != (1,) else array

    own: dict[str, Any] = {}
    for name, option in options.items():
        if name == "key_lengths":
            own[name] = np.clip(np.asarray(option) - begin, 0, end - begin)
        elif isinstance(option, tuple):
            own[name] = tuple(part(array) for array in option)
        else:
            own[name] = part(option)
    return (key[:, :, begin:end], value[:, :, begin:end]), own


def make_state(query: Array, value: Array, **options: Any) -> attncore.AttentionState:
    whole = {name: option for name, option in options.items() if name not in OF_PIECES}
    return attncore.AttentionState(query, value_dim=value.shape[-1], **whole)


def updates(
    key: Array, value: Array, pieces: Iterable[tuple[int, int]], **options: Any
) -> Iterator[tuple[tuple[Array, Array], dict[str, Any]]]:
    own = {name: option for name, option in options.items() if name in OF_PIECES}
    return (piece_of(key, value, begin, end, **own) for begin, end in pieces)


def in_pieces(
    query: Array, key: Array, value: Array, pieces: Iterable[tuple[int, int]], **options: Any
) -> tuple[Array, Array]:
    """out and lse of a state that has seen these pieces one after another."""
    state = make_state(query, value, **options)
    for arrays, own in updates(key, value, pieces, **options):
        state.update(*arrays, **own)
    return state.result()


def expected(
    query: Array, key: Array, value: Array, dtype: str, **options: Any
) -> tuple[Result, Result]:
    """The reference and the plain evaluation, of arrays that were rounded to the state's dtype."""
    arrays = [array.astype(np.float32).astype(dtype) for array in (query, key, value)]
    if dtype == "float64":
        arrays = [array.astype(dtype) for array in (query, key, value)]
    return reference(*arrays, **options), plain(*arrays, **options)
