"""append of caches: one token of each sequence, from Python."""

from __future__ import annotations

import itertools

import numpy as np

import attncore
from attncore._cli.case import Array, dtype_named
from attncore._cli.measure import Contender, WrongOutput
from steps import QUANTISED, Append

Cache = attncore.KVCache | attncore.PagedKVCache


def empty_cache(append: Append) -> Cache:
    """A cache of as many entries as there are sequences, with room for what is timed."""
    sizes = append.kv_heads, append.dim
    rotary = append.rotary or None
    room = append.before + append.tokens
    if not append.page:
        return attncore.KVCache(
            append.batch, *sizes, capacity=room, dtype=append.stored, rotary=rotary
        )
    pages = append.batch * -(-room // append.page)
    cache = attncore.PagedKVCache(pages, append.page, *sizes, dtype=append.stored, rotary=rotary)
    for _ in range(append.batch):
        cache.add()
    return cache


def tokens_of(append: Append, count: int) -> tuple[Array, Array]:
    """Keys and values of so many tokens, (batch, head, token, dim), as models make them."""
    dtype = dtype_named("bfloat16" if append.stored in QUANTISED else append.stored)
    rng = np.random.default_rng(count)
    shape = (2, append.batch, append.kv_heads, count, append.dim)
    key, value = rng.standard_normal(shape, np.float32).astype(dtype)
    return key, value


def check(name: str, append: Append, cache: Cache, value: Array) -> None:
    """WrongOutput unless the last token of each entry is the one that was appended.

    Values are: keys may be rotated.
    """
    for entry in range(append.batch):
        stored = cache.gather(entry)[1][:, -1].astype(np.float64)
        exact = value[entry, :, 0].astype(np.float64)
        room = {"int4": 0.1, "float8_e4m3fn": 0.07, "int8": 0.01}.get(append.stored, 0.0)
        if not np.abs(stored - exact).max() <= room * np.abs(exact).max():
            raise WrongOutput(f"{name}: entry {entry} does not end with what was appended")


def appending(name: str, append: Append) -> Contender:
    """What appends `append.tokens` tokens, one after another, after a check."""
    cache = empty_cache(append)
    cache.append(*tokens_of(append, append.before))
    key, value = tokens_of(append, 1)
    cache.append(key, value)
    check(name, append, cache, value)
    cache.truncate(append.before)

    def call() -> None:
        for _ in itertools.repeat(None, append.tokens):
            cache.append(key, value)
        cache.truncate(append.before)

    return Contender(name, call)
