"""The union of attention over disjoint key sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attncore._types import Array, Floats, Layout


def merge(
    outs: Sequence[Array], lses: Sequence[Array], *, layout: Layout = "bhsd"
) -> tuple[Array, Floats]:
    """Exact attention over the union of disjoint key sets, from the results on each.

    With L = log Σᵢ exp(lseᵢ), the whole is Σᵢ exp(lseᵢ − L) · outᵢ (Rabe & Staats 2021).  Sinks, if
    any, may be given to one part only.

    Args:
        outs: Arrays (..., queries, value_dim) of one shape and one float dtype.
        lses: Their log-sum-exps, (..., queries) each, float32 or float64.
        layout: "bshd" where outs are (..., queries, heads, value_dim), as of calls in that layout and
            of packed sequences; lses are (..., heads, queries) all the same.

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
    if layout not in ("bhsd", "bshd"):
        raise ValueError(f"layout: is {layout!r}, must be 'bhsd' or 'bshd'")
    bshd = layout == "bshd"
    _check_parts(outs, lses, bshd)
    outs = [np.swapaxes(out, -2, -3) for out in outs] if bshd else outs
    compute = np.float64 if lses[0].dtype == np.float64 else np.float32
    with np.errstate(invalid="ignore", divide="ignore"):  # Inf and NaN go through as they are
        out, lse = _merge(outs, lses, compute)
    return np.swapaxes(out, -2, -3) if bshd else out, lse


def _merge(
    outs: Sequence[Array], lses: Sequence[Array], compute: type[np.floating[Any]]
) -> tuple[Array, Floats]:
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
        seen = weight[..., None] != 0
        np.add(total, weight[..., None] * out.astype(compute, copy=False), out=total, where=seen)
    empty = denominator == 0
    total /= np.where(empty, compute(1), denominator)[..., None]
    total_lse = base + np.log(denominator)
    return total.astype(outs[0].dtype, copy=False), total_lse.astype(lses[0].dtype, copy=False)


def _check_parts(outs: Sequence[Array], lses: Sequence[Array], bshd: bool) -> None:
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(
            f"outs: has {len(outs)} parts, lses {len(lses)}; both must have as many, at least 1"
        )
    for name, parts in (("outs", outs), ("lses", lses)):
        for part in parts:
            if type(part) is np.ma.MaskedArray or not isinstance(part, np.ndarray):
                raise TypeError(f"{name}: must hold NumPy arrays, has {type(part).__name__}")
            if part.dtype != parts[0].dtype:
                raise TypeError(
                    f"{name}: has dtypes {parts[0].dtype} and {part.dtype}, must have one"
                )
            if part.shape != parts[0].shape:
                raise ValueError(
                    f"{name}: has shapes {parts[0].shape} and {part.shape}, must have one"
                )
    if lses[0].dtype not in (np.float32, np.float64):
        raise TypeError(f"lses: dtype is {lses[0].dtype}, accepted is float32 or float64")
    if outs[0].dtype.kind != "f" and outs[0].dtype.name != "bfloat16":
        raise TypeError(f"outs: dtype is {outs[0].dtype}, accepted is a float dtype")
    fewest = 3 if bshd else 1
    if outs[0].ndim < fewest:
        raise ValueError(f"outs: has {outs[0].ndim} dimensions, must have at least {fewest}")
    rows = (np.swapaxes(outs[0], -2, -3) if bshd else outs[0]).shape[:-1]
    if rows != lses[0].shape:
        raise ValueError(f"lses: shape is {lses[0].shape}, must be {rows}, as outs without dim")
