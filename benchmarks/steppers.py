"""Who makes a decoding step: attncore's functions, torch; and the check of what they give."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

import attncore
from attncore._cli.case import Array, dtype_named
from attncore._cli.measure import TOLERANCE, Contender, WrongOutput
from attncore._cli.packages import load, present
from steps import QUANTISED, Step
from stores import Store
from training import Unsupported, as_array, torch_tensor


def query_of(step: Step) -> Array:
    """The new tokens' queries in the layout of the call."""
    tokens, heads, dim = step.tokens, step.heads, step.dim
    rng = np.random.default_rng(3)
    numbers = rng.standard_normal((tokens, heads, dim), np.float32)
    query = numbers.astype(dtype_named(step.query_dtype))
    if step.packed:
        return query
    query = query.reshape(step.batch, step.queries, heads, dim)
    if step.layout == "bshd" and not step.page:
        return query
    return np.ascontiguousarray(query.swapaxes(1, 2))


def by_entry(step: Step, x: Array) -> list[Array]:
    """Queries or outputs of each sequence, (head, token, dim)."""
    if step.packed:
        ends = np.concatenate([[0], step.query_lengths.cumsum()])
        parts = itertools.pairwise(ends)
        return [x[first:end].swapaxes(0, 1) for first, end in parts]
    if step.layout == "bshd" and not step.page:
        return list(x.swapaxes(1, 2))
    return list(x)


def function_of(step: Step) -> Callable[..., Array]:
    """attncore's function for keys and values that lie so."""
    if step.page:
        return attncore.attention_paged
    return attncore.attention_varlen if step.packed else attncore.attention


def ours(
    step: Step, query: Array, stores: Sequence[Store], threads: int
) -> list[Callable[[], Any]]:
    """A call of attncore for each of the stores."""
    function = function_of(step)
    options: dict[str, Any] = {"num_threads": threads, **({"causal": True} if step.causal else {})}
    return [partial(function, query, *x.arguments, **x.options, **options) for x in stores]


def kv_cache(
    step: Step, query: Array, stores: Sequence[Store], threads: int
) -> list[Callable[[], Any]]:
    """attend of a KVCache for each of the stores, to which the store's tokens were appended."""

    def attend(store: Store) -> Callable[[], Any]:
        cache = attncore.KVCache(
            step.batch, step.kv_heads, step.dim,
            capacity=step.keys, value_dim=step.value_dim, value_in_key=step.latent, dtype=step.stored,
        )  # fmt: skip
        for batch in range(step.batch):
            entry = store.entry(batch)
            cache.append(entry.key, None if step.latent else entry.value, entries=batch)
        return partial(cache.attend, query, num_threads=threads)

    return [attend(store) for store in stores]


def torch(
    step: Step, query: Array, stores: Sequence[Store], threads: int
) -> list[Callable[[], Any]]:
    """torch's scaled_dot_product_attention on the same memory."""
    if not present("torch"):
        raise Unsupported("not installed")
    if step.page or step.packed or step.layout != "bhsd" or step.stored in QUANTISED or step.causal:
        raise Unsupported("no such keys")
    library = load("torch")
    library.set_num_threads(threads)
    sdpa = library.nn.functional.scaled_dot_product_attention
    q = torch_tensor(query)
    tensors = [[torch_tensor(x) for x in store.arguments] for store in stores]
    return [partial(sdpa, q, *kv, enable_gqa=step.heads != step.kv_heads) for kv in tensors]


MAKERS = {"attncore": ours, "KVCache": kv_cache, "torch": torch}


def numbers(step: Step, stored: Array, scale: Array | None) -> Array:
    """Stored rows (token, …) as float64 (token, dim)."""
    if step.stored == "int4":  # two's complement, the low half first
        halves = np.stack([stored & 15, stored >> 4], axis=-1).reshape(len(stored), -1)
        rows = ((halves.astype(np.int8) ^ 8) - 8).astype(np.float64)
    else:
        rows = stored.astype(np.float64)
    return rows if scale is None else rows * scale.astype(np.float64)[:, None]


def reference_row(step: Step, query: Array, store: Store, at: tuple[int, int, int]) -> Array:
    """The output of one (sequence, head, query) in float64."""
    batch, head, row = at
    entry = store.entry(batch)
    kv = head // (step.heads // step.kv_heads)
    key_scale, value_scale = (
        None if x is None else x[kv] for x in (entry.key_scale, entry.value_scale)
    )
    seen = len(entry.key[kv])
    if step.causal:
        seen += row + 1 - int(step.query_lengths[batch])
    scores = numbers(step, entry.key[kv], key_scale)[:seen] @ query.astype(np.float64)
    scores /= math.sqrt(step.dim)
    weights = np.exp(scores - scores.max())
    out: Array = weights @ numbers(step, entry.value[kv], value_scale)[:seen] / weights.sum()
    return out


def check(name: str, step: Step, query: Array, store: Store, out: Array) -> float:
    """The largest relative error over sampled rows; WrongOutput where it is too large."""
    wanted = (*query.shape[:-1], step.value_dim)
    if out.shape != wanted:
        raise WrongOutput(f"{name}: the shape is {out.shape}, not {wanted}")
    rng = np.random.default_rng(1)
    queries, outs = by_entry(step, query), by_entry(step, out)
    last = step.batch - 1
    places = {(0, 0, 0), (last, step.heads - 1, int(step.query_lengths[last]) - 1)}
    for _ in range(4):
        batch = int(rng.integers(step.batch))
        row = int(rng.integers(step.query_lengths[batch]))
        places.add((batch, int(rng.integers(step.heads)), row))
    worst = 0.0
    for batch, head, row in sorted(places):
        exact = reference_row(step, queries[batch][head, row], store, (batch, head, row))
        got = outs[batch][head, row].astype(np.float64)
        error = float(np.linalg.norm(got - exact) / np.linalg.norm(exact))
        worst = max(worst, error) if math.isfinite(error) else math.inf
    if not worst <= TOLERANCE[query.dtype.name]:
        raise WrongOutput(f"{name}: off by {worst:.1e} on sampled rows")
    return worst


def verified(
    name: str, step: Step, stores: Sequence[Store], threads: int
) -> tuple[Contender, Array]:
    """What takes turns with all stores, and its result of the first: that and the last one's
    are checked."""
    query = query_of(step)
    calls = MAKERS[step.by](step, query, stores, threads)
    outs = {at: as_array(calls[at]()) for at in {0, len(calls) - 1}}
    for at, out in outs.items():
        check(name, step, query, stores[at], out)
    if len(calls) == 1:
        return Contender(name, calls[0], as_array), outs[0]
    turns = itertools.cycle(calls)

    def call() -> Any:
        return next(turns)()

    return Contender(name, call, as_array), outs[0]
