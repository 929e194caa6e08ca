"""What the tests of packed sequences share: arrays (token, head, dim), the padded batch that they mean, options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

import attncore
from kit import inputs, normal
from reference import Array, accumulation

untyped: Any = attncore  # of unpacked arrays, whose number mypy does not know

Options = dict[str, Any]
LENGTHS: list[tuple[int, int]] = [  # of queries and keys
    (0, 3),
    (5, 9),
    (150, 140),
    (0, 0),
    (31, 0),
    (1, 211),
    (97, 300),
    (2, 2),
]
SHORT: list[tuple[int, int]] = [(0, 3), (5, 9), (37, 31), (0, 0), (13, 0), (1, 130)]


@dataclass(frozen=True)
class Packed:
    query: Array
    key: Array
    value: Array
    queries: Array  # cumulative
    keys: Array

    @property
    def arrays(self) -> tuple[Array, Array, Array]:
        return self.query, self.key, self.value

    @property
    def batch(self) -> int:
        return len(self.queries) - 1

    @property
    def longest(self) -> tuple[int, int]:
        return longest(self.queries), longest(self.keys)

    def tokens(self, entry: int) -> tuple[slice, slice, slice]:
        """A sequence's own, of query, key and value."""
        rows, keys = (slice(*ends[entry : entry + 2]) for ends in (self.queries, self.keys))
        return rows, keys, keys

    def alone(self, entry: int) -> list[Array]:
        return [a[at] for a, at in zip(self.arrays, self.tokens(entry), strict=True)]

    def of(self, arrays: Sequence[Array]) -> Packed:
        """The same with other arrays."""
        query, key, value = arrays
        return Packed(query, key, value, self.queries, self.keys)

    def padded(self, fill: float = 0.0) -> list[Array]:
        """(batch, head, token, dim)"""
        ends = self.queries, self.keys, self.keys
        return [padded(a, e, fill) for a, e in zip(self.arrays, ends, strict=True)]

    def attend(self, **options: Any) -> tuple[Array, Array]:
        """out and lse."""
        results: tuple[Array, Array] = untyped.attention_varlen(
            *self.arrays, self.queries, self.keys, return_lse=True, **options
        )
        return results


def packed(
    rng: np.random.Generator,
    lengths: Sequence[tuple[int, int]] = LENGTHS,
    **shape: Any,
) -> Packed:
    """Standard normal operands of sequences of these numbers of queries and keys; `shape` as for `inputs`."""
    queries, keys = (
        np.concatenate(([0], np.cumsum([one[i] for one in lengths], dtype=np.int64)))
        for i in (0, 1)
    )
    made = inputs(rng, int(queries[-1]), int(keys[-1]), **shape)
    query, key, value = (a[0].swapaxes(0, 1).copy() for a in made)
    return Packed(query, key, value, queries, keys)


def longest(ends: Array) -> int:
    return int(np.diff(ends).max(initial=0))


def padded(array: Array, ends: Array, fill: float = 0.0) -> Array:
    """(token, head, …) → (batch, head, token, …)"""
    rest = array.shape[2:]
    made = np.full((len(ends) - 1, array.shape[1], longest(ends), *rest), fill, array.dtype)
    for entry, (begin, end) in enumerate(pairwise(ends)):
        made[entry, :, : end - begin] = array[begin:end].swapaxes(0, 1)
    return made


def unpadded(array: Array, ends: Array) -> Array:
    """(batch, head, token, …) → (token, head, …)"""
    counts = np.diff(ends)
    parts = [array[b, :, :n].swapaxes(0, 1) for b, n in enumerate(counts)]
    if not parts:
        return np.empty((0, array.shape[1], *array.shape[3:]), array.dtype)
    return np.concatenate(parts)


def padded_tokens(array: Array, ends: Array) -> Array:
    """(token,) → (batch, token)"""
    return padded(array[:, None], ends)[:, 0]


def as_padded(problem: Packed, options: Options) -> Options:
    """The options of the padded batch."""
    made = dict(options)
    for name, ends in (("query", problem.queries), ("key", problem.keys)):
        made.setdefault(f"{name}_lengths", np.diff(ends))
        if f"{name}_segments" in made:
            made[f"{name}_segments"] = padded_tokens(made[f"{name}_segments"], ends)
    if "tree_parents" in made:
        made["tree_parents"] = padded_tokens(made["tree_parents"], problem.queries)
    return made


def d_outputs(rng: np.random.Generator, problem: Packed) -> tuple[Array, Array]:
    """Standard normal d_out and d_lse."""
    tokens, heads, _ = problem.query.shape
    dtype = problem.query.dtype
    d_out = rng.standard_normal((tokens, heads, problem.value.shape[2])).astype(np.float32)
    d_lse = rng.standard_normal((heads, tokens)).astype(accumulation(dtype))
    return d_out.astype(dtype), d_lse


def options_of_all_kinds(rng: np.random.Generator, problem: Packed) -> dict[str, Options]:
    """By name; what can be is another for each sequence."""
    batch, (rows, keys) = problem.batch, problem.longest
    heads = problem.query.shape[1]

    numbers = partial(normal, rng)

    def sorted_ints(count: int) -> Array:
        return np.sort(rng.integers(0, 1 + count // 60, count))

    lengths = [
        np.array([rng.integers(0, n + 1) for n in np.diff(ends)])
        for ends in (problem.queries, problem.keys)
    ]
    segments = {
        "query_segments": sorted_ints(len(problem.query)),
        "key_segments": sorted_ints(len(problem.key)),
    }
    table = attncore.RelativeBias(numbers(heads, 32))
    return {
        "none": {},
        "causal": {"causal": True},
        "window": {"window": (70, 20), "softcap": 2.0},
        "offset": {"causal": True, "query_offset": 7},
        "offsets": {"window": (40, None), "query_offset": rng.integers(-20, 90, batch)},
        "mask": {"mask": rng.random((batch, 1, rows, keys)) < 0.7},
        "mask of keys": {"mask": rng.random(keys) < 0.7},
        "bias": {"bias": numbers(batch, heads, rows, keys)},
        "biases": {"bias": (numbers(heads, 1, keys), numbers(batch, 1, 1, keys), numbers(rows, 1))},
        "alibi": {"alibi": numbers(heads) / 50, "causal": True},
        "alibis": {"alibi": numbers(batch, heads) / 50},
        "relative bias": {"relative_bias": table},
        "sinks": {"sinks": numbers(heads), "scale": 0.3},
        "segments": segments,
        "lengths": {"query_lengths": lengths[0], "key_lengths": lengths[1], "causal": True},
        "dropout": {"dropout_p": 0.3, "seed": 12345678901},
        "all": {
            "causal": True,
            "window": (90, 5),
            "bias": (numbers(batch, heads, rows, keys), numbers(1, 1, 1, keys)),
            "mask": rng.random((heads, 1, keys)) < 0.9,
            "alibi": numbers(batch, heads) / 50,
            "relative_bias": table,
            "softcap": 3.0,
            "sinks": numbers(heads),
            "key_lengths": lengths[1],
            "dropout_p": 0.2,
            "seed": 7,
            **segments,
        },
    }


OPTIONS = list(
    options_of_all_kinds(np.random.default_rng(0), packed(np.random.default_rng(0), [(1, 1)]))
)
