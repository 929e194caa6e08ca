"""The reference that every test compares with, and the rule that says how close is close.

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

Array = npt.NDArray[Any]

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
TINY = {"float64": 2.0**-1074, "float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}


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


def reference(query: Array, key: Array, value: Array, **options: Any) -> Result:
    wider = query.dtype == np.float64 and query.size * key.size < 2**28  # slow, where it is long
    exact = np.dtype(np.longdouble if wider else np.float64)
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


def _evaluate(
    query: Array,
    key: Array,
    value: Array,
    accumulate: np.dtype[Any],
    operand: np.dtype[Any],
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    query_offset: Any = None,
    mask: Array | None = None,
    bias: Any = None,
    alibi: Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    scale: float | None = None,
    query_segments: Array | None = None,
    key_segments: Array | None = None,
    query_lengths: Any = None,
    key_lengths: Any = None,
    layout: str = "bhsd",
) -> Result:
    q, k, v = (to_bhsd(a, layout).astype(accumulate) for a in (query, key, value))
    batch, heads, rows, dim = q.shape
    keys = k.shape[2]
    k, v = (np.repeat(a, heads // a.shape[1], axis=1) for a in (k, v))

    query_length = per_batch(query_lengths, np.array(rows), batch)
    key_length = per_batch(key_lengths, np.array(keys), batch)
    offset = per_batch(query_offset, (key_length - query_length).reshape(batch), batch)
    row, at = np.arange(rows)[:, None], np.arange(keys)
    distance = at - (row + offset)  # (batch, 1, rows, keys): key - position

    with np.errstate(all="ignore"):
        factor = accumulate.type(1 / np.sqrt(accumulate.type(dim)) if scale is None else scale)
        scores = (q @ k.swapaxes(2, 3)) * factor
        sizes = np.abs(np.nan_to_num(q)) @ np.abs(np.nan_to_num(k)).swapaxes(2, 3)
        if softcap is not None:
            scores = accumulate.type(softcap) * np.tanh(scores / accumulate.type(softcap))
        if alibi is not None:
            slopes = np.atleast_2d(np.asarray(alibi).astype(accumulate))
            scores = scores - slopes[:, :, None, None] * np.abs(distance).astype(accumulate)
        added = np.zeros((1, 1, rows, keys), accumulate)
        for one in bias if isinstance(bias, (tuple, list)) else () if bias is None else (bias,):
            added = added + np.asarray(one).astype(accumulate)
        scores = scores + added

        visible = np.broadcast_to((row < query_length) & (at < key_length), scores.shape)
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
        result = _softmax(scores, visible, v, sinks, operand)
    out = from_bhsd(result.out, query.ndim, layout)
    lse, weights = (a[(0,) * (4 - query.ndim)] for a in (result.lse, result.weights))
    size = float(np.max(sizes, initial=0) * abs(factor))
    return Result(out, lse, weights, result.magnitude, size)


def _softmax(
    scores: Array, visible: Array, v: Array, sinks: Array | None, operand: np.dtype[Any]
) -> Result:
    scores = np.where(visible, scores, -np.inf)
    sink = np.full((scores.shape[1], 1, 1), -np.inf, scores.dtype)
    if sinks is not None:
        sink = np.asarray(sinks).astype(scores.dtype).reshape(-1, 1, 1)
    top = np.maximum(scores.max(axis=-1, keepdims=True, initial=-np.inf), sink)
    top = np.where(top == -np.inf, 0, top)
    unnormalised = np.where(visible, np.exp(scores - top), 0)
    total = unnormalised.sum(axis=-1, keepdims=True) + np.exp(sink - top)
    weights = unnormalised / np.where(total == 0, 1, total)
    p = weights.astype(operand).astype(scores.dtype)
    if np.isfinite(v).all():
        out = p @ v
    else:  # 0 times NaN is NaN: only the visible keys may take part
        terms = np.where(visible[..., None], p[..., None] * v[:, :, None], 0)
        out = terms.sum(axis=3)
    magnitude = float(np.max(p @ np.abs(np.nan_to_num(v)), initial=0.0))
    lse = (top + np.log(total))[..., 0]
    return Result(out.astype(operand), lse, weights, magnitude)


def assert_close_by_rule(
    ours: Array, exact: Array, plainly: Array, magnitude: float = 0.0, what: str = "out"
) -> None:
    """error(ours) <= 2 * error(plain) + a few units in the last place.

    error(plain) is the largest over the array, so that what low precision costs anybody is allowed
    twice.  It can be near 0 by luck where an array is small; therefore one unit in the last place
    of each element (the rounding of the output) and 16 of the accumulation's at the magnitude of
    the sum that was rounded are allowed beside it.  NaN and the infinities must stand where they
    stand in the reference.
    """
    assert ours.shape == exact.shape, f"{what}: shape {ours.shape}, not {exact.shape}"
    if ours.size == 0:
        return
    name = str(ours.dtype)
    got, other = ours.astype(exact.dtype), plainly.astype(exact.dtype)
    representable = np.abs(exact) <= _largest(name)
    with np.errstate(all="ignore"):  # an infinity minus itself
        same = np.where(np.isnan(exact), np.isnan(got), got == exact)
        stands = np.where(np.isfinite(exact), np.isfinite(got) | ~representable, same)
        assert stands.all(), (
            f"{what}: {got[~stands][0]} at {_where(~stands)}, not {exact[~stands][0]}"
        )
        finite = np.isfinite(exact) & representable
        if not finite.any():
            return
        error, floor = (np.where(finite, np.abs(a - exact), 0) for a in (got, other))
        allowed = 2 * np.max(floor[np.isfinite(floor)], initial=0) + EPS[name] * np.abs(exact)
        allowed = allowed + TINY[name] + 16 * EPS[str(accumulation(ours.dtype))] * magnitude
        over = np.where(finite, error - allowed, -np.inf)
    worst = np.unravel_index(np.argmax(over), over.shape)
    at = tuple(int(i) for i in worst)
    assert over[worst] <= 0, (
        f"{what}: error {error[worst]:.3g} at {at}, allowed {allowed[worst]:.3g}"
    )


def _largest(name: str) -> float:
    return 65504.0 if name == "float16" else 3.3e38 if name != "float64" else 1.7e308


def _where(bad: Array) -> list[int]:
    return [int(i) for i in np.argwhere(bad)[0]]
