"""Attention on NumPy arrays.  docs/semantics.md is the contract of the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from attncore import _core
from attncore._types import Array, Floats, Ints, Layout, Plan, Window


@overload
def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    causal: bool = ...,
    window: Window | None = ...,
    query_offset: int | Ints | None = ...,
    mask: npt.NDArray[np.bool_] | None = ...,
    bias: Array | Sequence[Array] | None = ...,
    alibi: Array | None = ...,
    softcap: float | None = ...,
    sinks: Array | None = ...,
    scale: float | None = ...,
    query_segments: Ints | None = ...,
    key_segments: Ints | None = ...,
    query_lengths: int | Ints | None = ...,
    key_lengths: int | Ints | None = ...,
    layout: Layout = ...,
    out: Array | None = ...,
    return_lse: Literal[False] = ...,
    num_threads: int | None = ...,
) -> Array: ...
@overload
def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    causal: bool = ...,
    window: Window | None = ...,
    query_offset: int | Ints | None = ...,
    mask: npt.NDArray[np.bool_] | None = ...,
    bias: Array | Sequence[Array] | None = ...,
    alibi: Array | None = ...,
    softcap: float | None = ...,
    sinks: Array | None = ...,
    scale: float | None = ...,
    query_segments: Ints | None = ...,
    key_segments: Ints | None = ...,
    query_lengths: int | Ints | None = ...,
    key_lengths: int | Ints | None = ...,
    layout: Layout = ...,
    out: Array | None = ...,
    return_lse: Literal[True],
    num_threads: int | None = ...,
) -> tuple[Array, Floats]: ...
def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    causal: bool = False,
    window: Window | None = None,
    query_offset: int | Ints | None = None,
    mask: npt.NDArray[np.bool_] | None = None,
    bias: Array | Sequence[Array] | None = None,
    alibi: Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    scale: float | None = None,
    query_segments: Ints | None = None,
    key_segments: Ints | None = None,
    query_lengths: int | Ints | None = None,
    key_lengths: int | Ints | None = None,
    layout: Layout = "bhsd",
    out: Array | None = None,
    return_lse: bool = False,
    num_threads: int | None = None,
) -> Array | tuple[Array, Floats]:
    """Exact attention: softmax(scale · query keyᵀ + bias) value, for every batch entry and head.

    Arrays are read where they lie, whatever their strides, and may be read-only.  The score
    matrix never exists (Rabe & Staats 2021; Dao et al. 2022): memory is O(queries + keys).
    A query sees a key if every option that is given allows it; a query that sees nothing
    gets 0.

    Args:
        query: (batch, heads, queries, dim), or (heads, queries, dim), or (queries, dim);
            float32, float64, float16 or bfloat16 (of ml_dtypes).
        key: (batch, kv_heads, keys, dim) of query's dtype; heads is a multiple of kv_heads.
        value: (batch, kv_heads, keys, value_dim).
        causal: A query sees the keys up to its own position.
        window: (left, right): position − left ≤ key ≤ position + right; None is unbounded.
        query_offset: Position of query 0 among the keys, an int or one a batch entry.  The
            default, keys − queries, lets the last query see the last key; 0 is torch's way.
        mask: bool, broadcasts to (batch, heads, queries, keys); True lets attend.
        bias: float32 or query's dtype, added to the scores; broadcasts likewise; or a tuple of
            up to 8 such arrays.  −inf masks.
        alibi: Slopes, (heads,) or (batch, heads): + slope · −|position − key|
            (Press et al. 2022).
        softcap: c > 0: scores become c · tanh(score / c), before bias and masks.
        sinks: Logits, (heads,): a term of the softmax's denominator (Xiao et al. 2024).
        scale: Default 1/√dim; any finite number.
        query_segments: Ints (batch, queries); with key_segments: attend where equal.
        key_segments: Ints (batch, keys).
        query_lengths: Ints (batch,): queries past them see nothing.
        key_lengths: Ints (batch,): keys past them do not exist.
        layout: "bhsd", or "bshd" for query, key, value and out as (batch, token, head, dim).
        out: Where to write the result; must not overlap an input.
        return_lse: Return (out, lse), with lse the logarithm of the softmax's denominator.
        num_threads: For this call.

    Returns:
        out: (batch, heads, queries, value_dim) in query's dtype and rank, and if asked for
        lse: (batch, heads, queries) in float32 (float64 for float64).

    Raises:
        ValueError: A shape or value does not fit; the message names the argument.
        TypeError: A type or dtype does not fit.
        MemoryError: There is no memory for the workspace.

    Example:
        >>> import numpy as np, attncore
        >>> rng = np.random.default_rng(0)
        >>> query = rng.standard_normal((1, 8, 5, 64), dtype=np.float32)
        >>> key, value = rng.standard_normal((2, 1, 2, 9, 64), dtype=np.float32)
        >>> out, lse = attncore.attention(query, key, value, causal=True, return_lse=True)
        >>> out.shape, lse.shape
        ((1, 8, 5, 64), (1, 8, 5))
    """
    return _core.attention(  # type: ignore[no-any-return]
        query,
        key,
        value,
        out,
        return_lse,
        layout,
        causal,
        window,
        query_offset,
        mask,
        bias,
        alibi,
        softcap,
        sinks,
        scale,
        query_segments,
        key_segments,
        query_lengths,
        key_lengths,
        num_threads,
    )


def attention_weights(
    query: Array,
    key: Array,
    *,
    rows: int | Ints | None = None,
    top_k: int | None = None,
    causal: bool = False,
    window: Window | None = None,
    query_offset: int | Ints | None = None,
    mask: npt.NDArray[np.bool_] | None = None,
    bias: Array | Sequence[Array] | None = None,
    alibi: Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    scale: float | None = None,
    query_segments: Ints | None = None,
    key_segments: Ints | None = None,
    query_lengths: int | Ints | None = None,
    key_lengths: int | Ints | None = None,
    layout: Layout = "bhsd",
    num_threads: int | None = None,
) -> Any:
    """The probabilities that `attention` uses, for chosen queries.

    Takes no more memory than it returns.

    Args:
        query: As `attention`, like all options that are not described here.
        key: As `attention`.
        rows: Indices of queries, an int or a sequence; negative ones count from the end.
            Default: all.
        top_k: Return only the k largest of each row.

    Returns:
        (batch, heads, rows, keys) in float32 (float64 for float64); with top_k the pair
        (indices, probabilities), each (batch, heads, rows, top_k), in falling order, the lower
        index first among equals.  A row that sees fewer than top_k keys ends in index −1 and
        probability 0.

    Raises:
        ValueError: As `attention`; a row or top_k out of range.
        TypeError: As `attention`.

    Example:
        >>> import numpy as np, attncore
        >>> query = key = np.eye(4, dtype=np.float32)
        >>> indices, probabilities = attncore.attention_weights(query, key, top_k=1, scale=9.0)
        >>> indices.ravel().tolist()
        [0, 1, 2, 3]
    """
    return _core.attention_weights(
        query,
        key,
        None if rows is None else _row_indices(rows, query, layout),
        top_k,
        layout,
        causal,
        window,
        query_offset,
        mask,
        bias,
        alibi,
        softcap,
        sinks,
        scale,
        query_segments,
        key_segments,
        query_lengths,
        key_lengths,
        num_threads,
    )


def _row_indices(rows: int | Ints, query: Array, layout: Layout) -> npt.NDArray[np.int64]:
    """Indices in 0 … queries − 1."""
    array = np.atleast_1d(np.asarray(rows))
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"rows: dtype is {array.dtype}, accepted is an integer dtype")
    if array.ndim != 1:
        raise ValueError(f"rows: has {array.ndim} dimensions, must have 1")
    if not isinstance(query, np.ndarray):
        raise TypeError(f"query: must be a NumPy array, is {type(query).__name__}")
    if query.ndim < 2:
        raise ValueError(f"query: has {query.ndim} dimensions, must have 2, 3 or 4")
    axis = -3 if layout == "bshd" and query.ndim > 2 else -2
    queries = query.shape[axis]
    outside = array[(array < -queries) | (array >= queries)]
    if outside.size:
        raise ValueError(f"rows: has the index {outside[0]}, query has {queries} rows")
    array = array.astype(np.int64)
    return np.where(array < 0, array + queries, array)


def merge(
    outs: Sequence[Array], lses: Sequence[Array]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.floating[Any]]]:
    """Exact attention over the union of disjoint key sets, from the results on each.

    With L = log Σᵢ exp(lseᵢ), the whole is Σᵢ exp(lseᵢ − L) · outᵢ.  Sinks, if any, may be given
    to one part only.

    Args:
        outs: Arrays (..., queries, value_dim) of one shape and dtype.
        lses: Their log-sum-exps, (..., queries) each.

    Returns:
        out and lse of the whole, in the dtypes of the parts; 0 and −inf where all parts are empty.

    Raises:
        ValueError: There are no parts, or their shapes do not fit.
        TypeError: A dtype does not fit.

    Example:
        >>> import numpy as np, attncore
        >>> rng = np.random.default_rng(0)
        >>> query, key, value = rng.standard_normal((3, 1, 2, 6, 8))
        >>> first = attncore.attention(query, key[:, :, :4], value[:, :, :4], return_lse=True)
        >>> second = attncore.attention(query, key[:, :, 4:], value[:, :, 4:], return_lse=True)
        >>> out, lse = attncore.merge([first[0], second[0]], [first[1], second[1]])
        >>> np.allclose(out, attncore.attention(query, key, value))
        True
    """
    _check_parts(outs, lses)
    compute = np.float64 if lses[0].dtype == np.float64 else np.float32
    highest = lses[0].astype(compute)
    for lse in lses[1:]:
        np.maximum(highest, lse, out=highest)
    base = np.where(np.isneginf(highest), compute(0), highest)  # −inf − (−inf) would be NaN
    denominator = np.zeros_like(highest)
    total = np.zeros(outs[0].shape, compute)
    for out, lse in zip(outs, lses, strict=True):
        weight = np.exp(lse.astype(compute, copy=False) - base)
        denominator += weight
        # A part that saw nothing adds nothing, whatever its output holds.
        total += np.where(weight[..., None] == 0, compute(0), weight[..., None] * out.astype(compute, copy=False))
    empty = denominator == 0
    total /= np.where(empty, compute(1), denominator)[..., None]
    with np.errstate(divide="ignore"):
        lse = base + np.log(denominator)
    return total.astype(outs[0].dtype, copy=False), lse.astype(lses[0].dtype, copy=False)


def _check_parts(outs: Sequence[Array], lses: Sequence[Array]) -> None:
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(f"outs: has {len(outs)} parts, lses {len(lses)}; both must have as many, at least 1")
    for name, parts in (("outs", outs), ("lses", lses)):
        for part in parts:
            if not isinstance(part, np.ndarray):
                raise TypeError(f"{name}: must hold NumPy arrays, has {type(part).__name__}")
            if part.dtype != parts[0].dtype:
                raise TypeError(f"{name}: has dtypes {parts[0].dtype} and {part.dtype}, must have one")
            if part.shape != parts[0].shape:
                raise ValueError(f"{name}: has shapes {parts[0].shape} and {part.shape}, must have one")
    if lses[0].dtype not in (np.float32, np.float64):
        raise TypeError(f"lses: dtype is {lses[0].dtype}, accepted is float32 or float64")
    if outs[0].dtype.kind != "f" and outs[0].dtype.name != "bfloat16":
        raise TypeError(f"outs: dtype is {outs[0].dtype}, accepted is a float dtype")
    if outs[0].ndim < 1 or outs[0].shape[:-1] != lses[0].shape:
        raise ValueError(f"lses: shape is {lses[0].shape}, must be {outs[0].shape[:-1]}, as outs without dim")


def explain(
    query: Array,
    key: Array,
    value: Array,
    *,
    causal: bool = False,
    window: Window | None = None,
    query_offset: int | Ints | None = None,
    mask: npt.NDArray[np.bool_] | None = None,
    bias: Array | Sequence[Array] | None = None,
    alibi: Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    scale: float | None = None,
    query_segments: Ints | None = None,
    key_segments: Ints | None = None,
    query_lengths: int | Ints | None = None,
    key_lengths: int | Ints | None = None,
    layout: Layout = "bhsd",
    num_threads: int | None = None,
) -> Plan:
    """How `attention` would run with these arguments: kernel, tiles, tasks, memory, floor.

    Raises what `attention` would.

    Example:
        >>> import numpy as np, attncore
        >>> x = np.zeros((1, 2, 300, 64), np.float32)
        >>> attncore.explain(x, x, x, num_threads=1).threads
        1
    """
    plan = _core.explain(
        query,
        key,
        value,
        layout,
        causal,
        window,
        query_offset,
        mask,
        bias,
        alibi,
        softcap,
        sinks,
        scale,
        query_segments,
        key_segments,
        query_lengths,
        key_lengths,
        num_threads,
    )
    return Plan(**plan)
