"""The gradients of `attention`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from attncore import _core
from attncore._inspect import _require_known, _row_indices
from attncore._types import Array, Gradients, Ints, ScoreOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


def attention_backward(
    d_out: Array,
    query: Array,
    key: Array,
    value: Array,
    out: Array,
    lse: Array,
    *,
    d_lse: Array | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    wanted: Collection[str] | None = None,
    into: Gradients | None = None,
    **options: Unpack[ScoreOptions],
) -> Gradients:
    """The gradients of a loss that depends on ``out, lse = attention(query, key, value, …)``.

    The scores are recomputed from the inputs and lse, tile by tile (Dao et al. 2022), in O(N)
    memory.  Sums are in float32 (float64 for float64), rounded once at the end, and their bits do
    not depend on the number of threads.

    Args:
        d_out: The loss's gradient with respect to out, like out.
        query: As it was given to `attention`, as are key, value and all options.
        key: Likewise, but of query's dtype, as is value.
        value: Likewise.
        out: What `attention` returned.
        lse: Likewise, by return_lse=True.
        d_lse: The loss's gradient with respect to lse, like lse.
        dropout_p: As for `attention`.
        seed: As for `attention`.
        wanted: Names of the gradients to compute, of `Gradients`' fields.  Default: those of all
            arrays that are given.  Leaving out what is not needed saves time, above all the
            gradient of a broadcast bias.
        into: Arrays to write to, of the shapes and dtypes of the inputs, any strides; None: a new
            one.
        options: Those of `attention`, but out and return_lse.  Scores are computed anew by float32's
            own products, whatever the precision.

    Returns:
        `Gradients` (query, key, value, bias, alibi, sinks, relative_bias), each of the shape and
        dtype of its argument, summed over what broadcasting repeats; bias is a tuple where a tuple
        was given, relative_bias is the table's.  None for what is not given or not wanted.

    Raises:
        ValueError: A shape or value does not fit; the message names the argument.
        TypeError: A type or dtype does not fit.
        MemoryError: There is no memory for the workspace.

    Example:
        >>> import numpy as np, attncore
        >>> query, key, value = np.random.default_rng(0).standard_normal((3, 1, 2, 4, 8))
        >>> out, lse = attncore.attention(query, key, value, causal=True, return_lse=True)
        >>> d = attncore.attention_backward(
        ...     np.ones_like(out), query, key, value, out, lse, causal=True)
        >>> d.query.shape, d.bias is None
        ((1, 2, 4, 8), True)
    """
    given = _given(query, key, value, options)
    targets = _targets(given, _wanted(wanted, given), into)
    _require_known("attention_backward", options)
    given_options = {**options, "dropout_p": dropout_p, "seed": seed}
    _core.attention_backward(
        query, key, value, out, lse, d_out, d_lse, _in_order(targets), given_options
    )
    return targets


def _given(query: Array, key: Array, value: Array, options: ScoreOptions) -> dict[str, Any]:
    """The differentiable arguments that are there, as arrays of the dtypes that gradients get."""
    given: dict[str, Any] = {"query": query, "key": key, "value": value}
    for name in ("query", "key", "value"):
        if not isinstance(given[name], np.ndarray):
            raise TypeError(f"{name}: must be a NumPy array, is {type(given[name]).__name__}")
    return given | _given_options(options)


def _given_options(options: ScoreOptions) -> dict[str, Any]:
    given: dict[str, Any] = {}
    bias = options.get("bias")
    if isinstance(bias, (tuple, list)):
        given["bias"] = tuple(_floats("bias", one) for one in bias)
    elif bias is not None:
        given["bias"] = _floats("bias", bias)
    for name in ("alibi", "sinks"):
        if options.get(name) is not None:
            given[name] = _floats(name, options.get(name))
    relative_bias = options.get("relative_bias")
    if isinstance(relative_bias, tuple) and len(relative_bias) == 3:
        given["relative_bias"] = _floats("relative_bias", relative_bias[0])
    return given


def _floats(name: str, array: Any) -> Array:
    """Python's numbers become float32, as the core has them."""
    if isinstance(array, np.ndarray):
        return array
    converted = np.asarray(array)
    if converted.dtype.kind not in "fiu":
        raise TypeError(f"{name}: must be an array, is {type(array).__name__}")
    return converted.astype(np.float32)


def _require_names(wanted: Collection[str], accepted: Collection[str]) -> None:
    if isinstance(wanted, str) or not isinstance(wanted, Collection):
        raise TypeError(f"wanted: must be a collection of names, is {type(wanted).__name__}")
    for name in wanted:
        if name not in accepted:
            raise ValueError(f"wanted: has {name!r}, accepted are {', '.join(accepted)}")


def _wanted(wanted: Collection[str] | None, given: dict[str, Any]) -> Collection[str]:
    if wanted is None:
        return given
    _require_names(wanted, Gradients._fields)
    for name in wanted:
        if name not in given:
            raise ValueError(f"wanted: has '{name}', which is not given")
    return wanted


def _targets(given: dict[str, Any], wanted: Collection[str], into: Gradients | None) -> Gradients:
    """The arrays to write to."""
    if into is not None and not isinstance(into, Gradients):
        raise TypeError(f"into: must be an attncore.Gradients, is {type(into).__name__}")
    targets: dict[str, Any] = {}
    for name in Gradients._fields:
        ready = None if into is None else getattr(into, name)
        if name not in wanted:
            if ready is not None:
                why = "not given" if name not in given else "not in wanted"
                raise ValueError(f"into: has {name}, which is {why}")
            continue
        like = given[name]
        if isinstance(like, tuple):
            places = (None,) * len(like) if ready is None else ready
            if not isinstance(places, (tuple, list)) or len(places) != len(like):
                raise ValueError(f"into: {name} must be a tuple of {len(like)} arrays")
            pairs = zip(places, like, strict=True)
            targets[name] = tuple(_place(name, place, one) for place, one in pairs)
        else:
            targets[name] = _place(name, ready, like)
    return Gradients(**targets)


def _in_order(targets: Gradients) -> tuple[Any, ...]:
    """The arrays to write to, as the core takes them."""
    biases = targets.bias if isinstance(targets.bias, (tuple, list)) else (targets.bias,)
    return (
        targets.query,
        targets.key,
        targets.value,
        None if targets.bias is None else tuple(biases),
        targets.alibi,
        targets.sinks,
        targets.relative_bias,
    )


def _place(name: str, ready: Any, like: Array) -> Array:
    """The array that is ready, or a new one; the core checks the rest."""
    if ready is None:
        return np.empty(like.shape, like.dtype)
    if not isinstance(ready, np.ndarray):
        raise TypeError(f"into: {name} must be a NumPy array, is {type(ready).__name__}")
    if ready.ndim != like.ndim:
        raise ValueError(f"into: {name} has {ready.ndim} dimensions, must have {like.ndim}")
    return ready


def dropout_mask(
    seed: int,
    p: float,
    shape: Sequence[int],
    *,
    rows: int | Ints | None = None,
) -> npt.NDArray[np.bool_]:
    """Which weights `attention` keeps with ``dropout_p=p`` and this seed.

    The decision is a function of (seed, batch, head, query, key) by the counter-based generator
    Philox 4×32-10 (Salmon et al. 2011); docs/semantics.md has the format.

    Args:
        seed: 0 … 2⁶⁴ − 1.
        p: 0 ≤ p < 1, rounded to a multiple of 2⁻¹⁶.
        shape: (batch, heads, queries, keys).
        rows: Indices of queries, an int or a sequence; negative ones count from the end.
            Default: all.

    Returns:
        bool, (batch, heads, rows, keys): True is kept.

    Raises:
        ValueError: A value is out of range.
        TypeError: A type does not fit.

    Example:
        >>> import attncore
        >>> attncore.dropout_mask(7, 0.25, (1, 2, 4, 1000)).mean().round(2)
        np.float64(0.75)
    """
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape: must be a sequence of ints, is {type(shape).__name__}")
    if len(shape) != 4 or any(not hasattr(n, "__index__") or n < 0 for n in shape):
        raise ValueError(f"shape: is {shape}, must be (batch, heads, queries, keys)")
    if isinstance(p, bool) or not isinstance(p, (int, float, np.integer, np.floating)):
        raise TypeError(f"p: must be a number, is {type(p).__name__}")
    if not 0 <= p < 1:
        raise ValueError(f"p: is {p}, must be at least 0 and less than 1")
    batch, heads, queries, keys = shape
    indices = None
    if rows is not None:
        indices = _row_indices(rows, np.empty((queries, 0), np.float32), "bhsd")
    count = queries if indices is None else len(indices)
    keep = np.empty((batch, heads, count, keys), np.bool_)
    _core.dropout_mask(seed, float(p), indices, keep)
    return keep
