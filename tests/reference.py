"""The reference that every test compares with; rule.py says how close is close.

`reference` follows the contract (docs/semantics.md) with the whole score matrix, in float64 (for
small float64 inputs in long double, which is wider on x86).
`plain` is the same text in the arithmetic of an ordinary low-precision evaluation: products
accumulated in float32 (float64 for float64), the probabilities rounded to the input's dtype before
the second product, the output rounded at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from philox import keep_mask, kept_factor

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Result:
    """What rounding scales with: `magnitude` is the largest sum of probability times |value|,
    `score_magnitude` the largest sum of |query| times |key|, scaled."""

    out: Array
    lse: Array
    weights: Array
    magnitude: float = 0.0
    score_magnitude: float = 0.0


def accumulation(dtype: npt.DTypeLike) -> np.dtype[Any]:
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def widest(query: Array, key: Array) -> np.dtype[Any]:
    """Long double for float64, but where it would take long: no BLAS knows it."""
    wide = query.dtype.type in (np.float64, np.longdouble) and query.size * key.size < 2**28
    return np.dtype(np.longdouble if wide else np.float64)


def reference(query: Array, key: Array, value: Array, **options: Any) -> Result:
    exact = widest(query, key)
    return _evaluate(query, key, value, exact, exact, **options)


def plain(query: Array, key: Array, value: Array, **options: Any) -> Result:
    return _evaluate(query, key, value, accumulation(query.dtype), query.dtype, **options)


def to_bhsd(array: Array, layout: str) -> Array:
    """Any rank and layout as (batch, head, token, dim)."""
    if array.ndim == 2:
        return array[None, None]
    array = array[None] if array.ndim == 3 else array
    return array.transpose(0, 2, 1, 3) if layout == "bshd" else array


def from_bhsd(array: Array, rank: int, layout: str) -> Array:
    if rank == 2:
        return np.squeeze(array, (0, 1))
    array = np.transpose(array, (0, 2, 1, 3)) if layout == "bshd" else array
    whole: Array = array
    return whole if rank == 4 else whole[0]


def per_batch(given: Any, default: Array, batch: int) -> Array:
    """An int, or one a batch entry, as (batch, 1, 1, 1)."""
    chosen = default if given is None else np.asarray(given, np.int64)
    wide: Array = np.broadcast_to(chosen, (batch,))
    return wide.reshape(batch, 1, 1, 1)


@dataclass(frozen=True)
class Scored:
    """A problem up to its scores: operands as (batch, head, token, dim), the heads of keys and values repeated."""

    q: Array
    k: Array
    v: Array
    scale: Any
    products: Array  # scale · q · k
    scores: Array  # after softcap and all that is added
    exists: Array  # the row is within query_lengths, (batch, 1, row)
    visible: Array  # (batch, head, row, key)
    distance: Array  # key − position, (batch, 1, row, key)


def score(
    query: Array,
    key: Array,
    value: Array,
    accumulate: np.dtype[Any],
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    query_offset: Any = None,
    mask: Array | None = None,
    bias: Any = None,
    alibi: Array | None = None,
    relative_bias: Any = None,
    softcap: float | None = None,
    scale: float | None = None,
    query_segments: Array | None = None,
    key_segments: Array | None = None,
    query_lengths: Any = None,
    key_lengths: Any = None,
    tree_parents: Any = None,
    layout: str = "bhsd",
) -> Scored:
    q, k, v = (to_bhsd(a, layout).astype(accumulate) for a in (query, key, value))
    batch, heads, rows, dim = q.shape
    keys = k.shape[2]
    k, v = (np.repeat(a, heads // a.shape[1], axis=1) for a in (k, v))

    query_length = per_batch(query_lengths, np.array(rows), batch)
    key_length = per_batch(key_lengths, np.array(keys), batch)
    offset = per_batch(query_offset, (key_length - query_length).reshape(batch), batch)
    row, at = np.arange(rows)[:, None], np.arange(keys)
    distance = at - (row + offset)

    factor = accumulate.type(1 / np.sqrt(accumulate.type(dim)) if scale is None else scale)
    products = (q @ k.swapaxes(2, 3)) * factor
    scores = products
    if softcap is not None:
        scores = accumulate.type(softcap) * np.tanh(scores / accumulate.type(softcap))
    if alibi is not None:
        slopes = np.atleast_2d(np.asarray(alibi).astype(accumulate))
        scores = scores - slopes[:, :, None, None] * np.abs(distance).astype(accumulate)
    added = np.zeros((1, 1, rows, keys), accumulate)
    if relative_bias is not None:
        table = np.asarray(relative_bias.table).astype(accumulate)
        chosen = table[:, relative_buckets(relative_bias, distance[:, 0])]  # (head, batch, …)
        added = added + chosen.swapaxes(0, 1)
    for one in as_tuple(bias):
        added = added + np.asarray(one).astype(accumulate)
    scores = scores + added

    exists: Array = row < query_length
    visible = np.broadcast_to(exists & (at < key_length), scores.shape)
    visible = visible & (added != -np.inf)
    if causal:
        visible = visible & (distance <= 0)
    left, right = window if window is not None else (None, None)
    if left is not None:
        visible = visible & (distance >= -left)
    if right is not None:
        visible = visible & (distance <= right)
    if mask is not None:
        visible = visible & mask
    if query_segments is not None and key_segments is not None:
        ours, theirs = np.atleast_2d(query_segments), np.atleast_2d(key_segments)
        visible = visible & (ours[:, None, :, None] == theirs[:, None, None, :])
    if tree_parents is not None:
        first = (key_length - query_length).reshape(batch)
        visible = visible & descent(np.broadcast_to(tree_parents, (batch, rows)), first, keys)
    return Scored(q, k, v, factor, products, scores, exists[..., 0], visible, distance)


def descent(parents: Array, first: Array, keys: int) -> Array:
    """Which keys a query sees: those before the new ones, which begin at `first`, and its line of descent."""
    sees = np.zeros((*parents.shape[:2], keys), bool)
    for entry, line in enumerate(parents):
        sees[entry, :, : first[entry]] = True
        for row in range(len(line)):
            at = row
            while at >= 0 and first[entry] + at < keys:
                sees[entry, row, first[entry] + at] = True
                at = line[at]
    return sees[:, None]


def as_tuple(bias: Any) -> tuple[Array, ...]:
    return tuple(bias) if isinstance(bias, (tuple, list)) else () if bias is None else (bias,)


def relative_buckets(relative_bias: Any, distance: Array) -> Array:
    """T5's bucket of key − position (Raffel et al. 2020), as Hugging Face's T5 computes it."""
    count, first = np.asarray(relative_bias.table).shape[1], np.zeros_like(distance)
    if relative_bias.bidirectional:
        count //= 2
        first = count * (distance > 0)
        distance = np.abs(distance)
    else:
        distance = -np.minimum(distance, 0)
    single = count // 2  # buckets of one distance each; the others grow exponentially
    ratio = np.log(np.maximum(distance, single) / single) / np.log(
        relative_bias.max_distance / single
    )
    large = np.minimum(single + (ratio * (count - single)).astype(int), count - 1)
    buckets: Array = first + np.where(distance < single, distance, large)
    return buckets


@dataclass(frozen=True)
class Softmaxed:
    weights: Array
    dropped: Array  # weights after dropout, rounded to the operand's dtype
    keep: Any  # what dropout multiplies weights by: 0 or its factor
    sink: Array  # the sink's weight, (batch, head, row)
    out: Array
    lse: Array


def softmax(
    scored: Scored,
    sinks: Array | None,
    operand: np.dtype[Any],
    dropout_p: float,
    seed: int,
) -> Softmaxed:
    visible, kind = scored.visible, scored.scores.dtype
    scores = np.where(visible, scored.scores, -np.inf)
    sink = np.full((scores.shape[1], 1, 1), -np.inf, kind)
    if sinks is not None:
        sink = np.asarray(sinks).astype(kind).reshape(-1, 1, 1)
    top = np.maximum(scores.max(axis=-1, keepdims=True, initial=-np.inf), sink)
    top = np.where(top == -np.inf, 0, top)
    unnormalised = np.exp(scores - top)
    of_sink = np.exp(sink - top)
    total = np.where(visible, unnormalised, 0).sum(axis=-1, keepdims=True) + of_sink
    whole = np.where(total == 0, 1, total)
    weights = np.where(visible, unnormalised / whole, 0)
    keep: Any = kind.type(1)
    if dropout_p > 0:
        kept = keep_mask(seed, dropout_p, scores.shape)
        keep = kind.type(kept_factor(dropout_p)) * kept
    dropped = (weights * keep).astype(operand).astype(kind)
    out = visible_product(dropped, scored.v, visible)
    lse = (top + np.log(total))[..., 0]
    return Softmaxed(weights, dropped, keep, (of_sink / whole)[..., 0], out.astype(operand), lse)


def visible_product(left: Array, right: Array, visible: Array) -> Array:
    """left @ right over the visible elements of left only: 0 times NaN is NaN."""
    if np.isfinite(right).all():
        return left @ right
    terms = np.where(visible[..., None], left[..., None] * right[:, :, None], 0)
    total: Array = terms.sum(axis=3)
    return total


def magnitudes(a: Array) -> Array:
    """|a|, as large as can be where it is infinite and 0 where it is NaN."""
    finite: Array = a if np.isfinite(a).all() else np.nan_to_num(a)
    return np.abs(finite)


def _evaluate(
    query: Array,
    key: Array,
    value: Array,
    accumulate: np.dtype[Any],
    operand: np.dtype[Any],
    *,
    sinks: Array | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> Result:
    with np.errstate(all="ignore"):
        scored = score(query, key, value, accumulate, **options)
        soft = softmax(scored, sinks, operand, dropout_p, seed)
        q, k, v = (magnitudes(a) for a in (scored.q, scored.k, scored.v))
        size = float(np.max(q @ k.swapaxes(2, 3), initial=0) * abs(scored.scale))
        magnitude = float(np.max(soft.dropped @ v, initial=0.0))
    out = from_bhsd(soft.out, query.ndim, options.get("layout", "bhsd"))
    lse, weights = (a[(0,) * (4 - query.ndim)] for a in (soft.lse, soft.weights))
    return Result(out, lse, weights, magnitude, size)
