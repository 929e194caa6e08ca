"""The memory of decoding steps: keys and values in arrays, pages or packed, more than caches hold.

Lines of a case share memory: each is another view of the same random numbers, as long as
contents don't matter.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from attncore._cli.case import Array, dtype_named
from attncore._cli.packages import load, need
from steps import QUANTISED, Step

BLOCK = 1_048_583  # random numbers, repeated; a prime, so that no two pages are the same

#: typical sizes of stored numbers are divided by this to be about 1
UNIT = {"int8": 64.0, "float8_e4m3fn": 8.0, "int4": 4.0}


@dataclass(frozen=True)
class Entry:
    """The keys and values of one sequence, (kv_head, token, …) as they are stored."""

    key: Array
    value: Array
    key_scale: Array | None = None  # (kv_head, token)
    value_scale: Array | None = None


@dataclass(frozen=True)
class Store:
    """The keys and values of one call: what it is given, and how to look up a sequence's."""

    arguments: tuple[Array, ...]
    options: dict[str, Any]
    entry: Callable[[int], Entry]


def stored_dtype(stored: str) -> np.dtype[Any]:
    """The dtype of arrays that hold such numbers."""
    if stored == "float8_e4m3fn":
        need(["ml_dtypes"], "pip install ml_dtypes")
        return np.dtype(load("ml_dtypes").float8_e4m3fn)
    return np.dtype(np.uint8) if stored == "int4" else dtype_named(stored)


def huge(items: int, dtype: np.dtype[Any]) -> Array:
    """Memory of this process alone, in huge pages where the system gives them."""
    room = mmap.mmap(
        -1, max(1, items * dtype.itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    if hasattr(mmap, "MADV_HUGEPAGE"):
        room.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(room, dtype, items)


def random_block(stored: str, seed: int) -> Array:
    """Numbers of about 1 (times UNIT), of every value that int8 and int4 have."""
    rng = np.random.default_rng(seed)
    dtype = stored_dtype(stored)
    if stored == "int4":
        return rng.integers(0, 256, BLOCK, np.uint8)
    if stored == "int8":
        return rng.integers(-128, 128, BLOCK, np.int8)
    return (rng.standard_normal(BLOCK, np.float32) * UNIT.get(stored, 1)).astype(dtype)


@dataclass
class Pools:
    """Large arrays of random numbers, made when first asked for."""

    made: dict[tuple[str, str], Array] = field(default_factory=dict)

    def numbers(self, what: str, stored: str, *shape: int) -> Array:
        """An array of this shape; `what` (key, value, …) tells apart those of the same kind."""
        items = int(np.prod(shape))
        pool = self.made.get((what, stored))
        if pool is None or pool.size < items:
            pool = huge(items, stored_dtype(stored))
            block = random_block(stored, len(self.made))
            for start in range(0, items, BLOCK):
                pool[start : start + BLOCK] = block[: items - start]
            self.made[what, stored] = pool
        return pool[:items].reshape(shape)

    def scales(self, what: str, stored: str, *shape: int) -> Array:
        """Positive float32 factors that bring stored numbers to about 1."""
        whole = self.made.get((what, stored))
        if whole is None or whole.size < np.prod(shape):
            rng = np.random.default_rng(len(self.made))
            whole = rng.uniform(0.5, 1.5, int(np.prod(shape))).astype(np.float32)
            whole /= np.float32(UNIT[stored])
            self.made[what, stored] = whole
        return whole[: np.prod(shape)].reshape(shape)


def pairs(step: Step, pools: Pools, *places: int) -> list[Array]:
    """Key and value of shape (…places, dim), and where they are quantised scales (…places)."""
    key = pools.numbers("key", step.stored, *places, step.width(step.dim))
    if step.latent:
        value = key[..., : step.width(step.value_dim)]
    else:
        value = pools.numbers("value", step.stored, *places, step.width(step.value_dim))
    if step.stored not in QUANTISED:
        return [key, value]
    return [key, value, *(pools.scales(f"{x}_scale", step.stored, *places) for x in "kv")]


def contiguous(step: Step, pools: Pools) -> list[Store]:
    """One array of all sequences, (batch, head, token, dim) or (batch, token, head, dim)."""
    flash = step.layout == "bshd"
    places = (step.keys, step.kv_heads) if flash else (step.kv_heads, step.keys)
    arrays = pairs(step, pools, step.sets, step.batch, *places)
    options: dict[str, Any] = {"layout": "bshd"} if flash else {}

    def store(at: int) -> Store:
        def entry(batch: int) -> Entry:
            return Entry(*(x[at, batch].swapaxes(0, 1) if flash else x[at, batch] for x in arrays))

        return Store((arrays[0][at], arrays[1][at]), options, entry)

    return [store(at) for at in range(step.sets)]


def packed(step: Step, pools: Pools) -> list[Store]:
    """One sequence after another, (token, head, dim)."""
    ends = np.concatenate([[0], step.lengths.cumsum()])
    arrays = pairs(step, pools, step.sets, int(ends[-1]), step.kv_heads)
    query_ends = np.concatenate([[0], step.query_lengths.cumsum()])

    def store(at: int) -> Store:
        def entry(batch: int) -> Entry:
            tokens = slice(ends[batch], ends[batch + 1])
            return Entry(*(x[at, tokens].swapaxes(0, 1) for x in arrays))

        given = (arrays[0][at], arrays[1][at], query_ends.astype(np.int32), ends.astype(np.int32))
        return Store(given, {}, entry)

    return [store(at) for at in range(step.sets)]


def tables(step: Step) -> tuple[Array, int]:
    """Block tables (set, batch, page) of pages in random order, and the number of pages."""
    counts = -(-step.lengths // step.page)
    total = step.sets * int(counts.sum())
    order = np.random.default_rng(2).permutation(total).astype(np.int32)
    table = np.zeros((step.sets, step.batch, int(counts.max())), np.int32)
    used = np.arange(table.shape[-1]) < counts[:, None]
    table[np.broadcast_to(used, table.shape)] = order
    return table, total


def paged(step: Step, pools: Pools) -> list[Store]:
    """Pages in random order: (page, slot, head, dim), or (page, head, slot, dim) in memory."""
    table, total = tables(step)
    if step.layout == "bshd":
        arrays = pairs(step, pools, total, step.page, step.kv_heads)
    else:
        arrays = [x.swapaxes(1, 2) for x in pairs(step, pools, total, step.kv_heads, step.page)]
    if step.prefix:
        table = shared(step, arrays, table)

    def store(at: int) -> Store:
        def entry(batch: int) -> Entry:
            length = step.lengths[batch]
            pages = table[at, batch, : -(-length // step.page)]
            found = (x[pages].reshape(-1, *x.shape[2:])[:length] for x in arrays)
            return Entry(*(x.swapaxes(0, 1) for x in found))

        options = dict(zip(("key_scale", "value_scale"), arrays[2:], strict=False))
        given = (arrays[0], arrays[1], table[at], step.lengths.astype(np.int32))
        return Store(given, options, entry)

    return [store(at) for at in range(len(table))]


def shared(step: Step, arrays: list[Array], table: Array) -> Array:
    """Every sequence begins with the first one's tokens; sharing: in the very same pages.

    Each sequence's copy is a turn of its own, so that calls find other memory each time.
    """
    table = table[:1]
    count = step.prefix // step.page
    for x in arrays[:1] if step.latent else arrays:
        x[table[0, 1:, :count]] = x[table[0, 0, :count]]
    if not step.sharing:
        return table
    turns = np.repeat(table, step.batch, axis=0)
    turns[:, :, :count] = table[0, :, None, :count]
    return turns


def stores(step: Step, pools: Pools) -> list[Store]:
    """What calls take turns with."""
    if step.page:
        return paged(step, pools)
    return packed(step, pools) if step.packed else contiguous(step, pools)
