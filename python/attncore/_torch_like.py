"""The signature and meaning of torch.nn.functional.scaled_dot_product_attention, on NumPy arrays."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import numpy as np

from attncore._api import attention
from attncore._types import Array, Precision


def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    precision: Precision = "highest",
) -> Array:
    """Attention with torch's signature and semantics.

    Unlike `attention`, is_causal is top-left (query i sees keys 0 … i), heads may differ only with
    enable_gqa, and there may be any number of leading axes.

    Args:
        query: (..., heads, queries, dim), float32, float64, float16 or bfloat16 (of ml_dtypes);
            the leading axes of query, key and value broadcast.
        key: (..., kv_heads, keys, dim), of a dtype as `attention` takes it.
        value: (..., kv_heads, keys, value_dim), likewise.
        attn_mask: bool (True lets attend), or floats that are added to the scores; broadcasts to
            (..., heads, queries, keys).
        dropout_p: Must be 0: torch draws from a global generator, which this library has not;
            `attention` has dropout with a seed.
        is_causal: Not together with attn_mask.
        scale: Default 1/√dim.
        enable_gqa: kv_heads may divide heads.
        precision: As for `attention`; not torch's, which has it as a global setting.

    Returns:
        (..., heads, queries, value_dim).  Rows that see nothing are 0.

    Raises:
        ValueError: A shape or value does not fit.
        TypeError: A type or dtype does not fit.
        NotImplementedError: dropout_p > 0.
        MemoryError: There is no memory for the workspace.

    Example:
        >>> import numpy as np, attncore
        >>> x = np.ones((2, 4, 3, 8), np.float32)
        >>> attncore.scaled_dot_product_attention(x, x, x, is_causal=True).shape
        (2, 4, 3, 8)
    """
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: is {dropout_p}, must be within 0 … 1")
    if dropout_p > 0:
        raise NotImplementedError(
            f"dropout_p: is {dropout_p}, must be 0: use attention with a seed"
        )
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask: is given with is_causal=True, only one of them may be")
    for name, array in (("query", query), ("key", key), ("value", value)):
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{name}: must be a NumPy array, is {type(array).__name__}")
        if array.ndim < 2:
            raise ValueError(f"{name}: has {array.ndim} dimensions, must have at least 2")
    if not enable_gqa and query.ndim > 2 and key.ndim > 2 and query.shape[-3] != key.shape[-3]:
        raise ValueError(
            f"key: has {key.shape[-3]} heads, query {query.shape[-3]}; that needs enable_gqa=True"
        )
    query, key, value = _same_lead(query, key, value)
    mask, bias = _mask_and_bias(attn_mask, query, key)
    attend = partial(attention, causal=is_causal, query_offset=0, scale=scale, precision=precision)
    if query.ndim <= 4:
        return attend(query, key, value, mask=mask, bias=bias)
    # Its leading axes lie one stride apart: whatever the batches are, they are views of it.
    out = np.empty((*query.shape[:-1], value.shape[-1]), query.dtype)
    for q, k, v, m, b, o in _batches(query, key, value, mask, bias, out):
        attend(q, k, v, mask=m, bias=b, out=o)
    return out


def _same_lead(*arrays: Array) -> list[Array]:
    """Axes before the heads, broadcast; arrays that have none are left to `attention`."""
    rank = max(x.ndim for x in arrays)
    if rank < 4:
        return [*arrays]
    arrays = tuple(x.reshape((1,) * (rank - x.ndim) + x.shape) for x in arrays)
    leads = [x.shape[:-3] for x in arrays]
    if leads.count(leads[0]) == len(leads):
        return [*arrays]
    try:
        lead = np.broadcast_shapes(*leads)
    except ValueError:
        raise ValueError(
            f"query, key, value: their leading axes {', '.join(map(str, leads))} do not broadcast"
        ) from None
    return [np.broadcast_to(x, (*lead, *x.shape[-3:])) for x in arrays]


def _mask_and_bias(
    attn_mask: Array | None, query: Array, key: Array
) -> tuple[Array | None, Array | None]:
    if attn_mask is None:
        return None, None
    if not isinstance(attn_mask, np.ndarray):
        raise TypeError(f"attn_mask: must be a NumPy array, is {type(attn_mask).__name__}")
    scores = (*query.shape[:-1], key.shape[-2])
    try:
        np.broadcast_to(attn_mask, scores)
    except ValueError:
        raise ValueError(
            f"attn_mask: shape is {attn_mask.shape}, must broadcast to {scores}"
        ) from None
    if attn_mask.dtype == np.bool_:
        return attn_mask, None
    if attn_mask.dtype not in (np.float32, query.dtype):
        raise TypeError(
            f"attn_mask: dtype is {attn_mask.dtype}, accepted is bool, float32 or query's dtype"
        )
    return None, attn_mask


def _batches(*arrays: Array | None) -> Iterator[list[Array | None]]:
    """Views of one leading axis each, which make up the whole: nothing is copied.

    Of leading axes that lie one stride apart in every array, the most entries are one call's batch;
    the others are looped over.
    """
    given = [x for x in arrays if x is not None]
    lead = given[0].shape[:-3]
    whole = [None if x is None else _with_lead(x, lead) for x in arrays]
    run = max(_runs(lead, [x for x in whole if x is not None]), key=lambda r: math.prod(lead[r]))
    for before in np.ndindex(lead[: run.start]):
        for after in np.ndindex(lead[run.stop :]):
            at = (*before, *[slice(None)] * (run.stop - run.start), *after)
            yield [
                None if x is None else x[at].reshape(math.prod(lead[run]), *x.shape[-3:])
                for x in whole
            ]


def _with_lead(array: Array, lead: tuple[int, ...]) -> Array:
    """(..., heads, queries, keys), of which a mask may lack the first ones."""
    tail = ((1,) * 3 + array.shape)[-3:]
    return np.broadcast_to(array, lead + tail) if array.shape != lead + tail else array


def _runs(lead: tuple[int, ...], arrays: list[Array]) -> list[slice]:
    """The leading axes, cut where an array's strides say that two are not one."""
    if 0 in lead:
        return [slice(0, len(lead))]
    cuts = [0]
    outer: int | None = None
    for axis, length in enumerate(lead):
        if length == 1:
            continue
        if outer is not None and any(x.strides[outer] != length * x.strides[axis] for x in arrays):
            cuts.append(axis)
        outer = axis
    return [slice(*ends) for ends in pairwise([*cuts, len(lead)])]
