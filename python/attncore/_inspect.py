"""What `attention` does, made visible: its probabilities, its plan."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from attncore import _core
from attncore._types import Array, Ints, Layout, Plan, ScoreOptions, Table, is_int

if TYPE_CHECKING:
    from typing_extensions import Unpack


def attention_weights(
    query: Array,
    key: Array,
    *,
    rows: int | Ints | None = None,
    top_k: int | None = None,
    **options: Unpack[ScoreOptions],
) -> Any:
    """The probabilities that `attention` uses, for chosen queries.

    Takes no more memory than it returns.

    Args:
        query: As `attention`.
        key: As `attention`, of query's dtype.
        rows: Indices of queries, an int or a sequence; negative ones count from the end.
            Default: all.
        top_k: Return only the k largest of each row.
        options: Those of `attention`, but dropout_p, seed, out and return_lse.  The probabilities
            have float32's accuracy whatever the precision.

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
    _require_known("attention_weights", options)
    require_top_k(top_k)
    indices = None if rows is None else _row_indices(rows, query, options.get("layout", "bhsd"))
    return _core.attention_weights(query, key, indices, top_k, options)


def require_top_k(top_k: int | None) -> None:
    if top_k is not None and not is_int(top_k):
        raise TypeError(f"top_k: must be an int, is {type(top_k).__name__}")
    if top_k is not None and not -(2**62) < top_k < 2**62:
        raise ValueError(f"top_k: is {top_k}, which is out of range")


def rows_within(rows: int | Ints | Table, queries: int, most_axes: int) -> npt.NDArray[np.int64]:
    """Ints in −queries … queries − 1."""
    array = np.atleast_1d(np.asarray(rows))
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"rows: dtype is {array.dtype}, accepted is an integer dtype")
    if array.ndim > most_axes:
        raise ValueError(f"rows: has {array.ndim} dimensions, must have at most {most_axes}")
    outside = array[(array < -queries) | (array >= queries)]
    if outside.size:
        raise ValueError(f"rows: has the index {outside[0]}, query has {queries} rows")
    return array.astype(np.int64)


def _row_indices(rows: int | Ints, query: Array, layout: Layout) -> npt.NDArray[np.int64]:
    """Indices in 0 … queries − 1."""
    if not isinstance(query, np.ndarray):
        raise TypeError(f"query: must be a NumPy array, is {type(query).__name__}")
    if query.ndim < 2:
        raise ValueError(f"query: has {query.ndim} dimensions, must have 2, 3 or 4")
    axis = -3 if layout == "bshd" and query.ndim > 2 else -2
    queries = query.shape[axis]
    array = rows_within(rows, queries, 1)
    return np.where(array < 0, array + queries, array)


def explain(query: Array, key: Array, value: Array, **options: Unpack[ScoreOptions]) -> Plan:
    """How `attention` would run with these arguments: kernel, tiles, tasks, memory, floor.

    Some of the call's tasks are run and timed, for some milliseconds; arrays are only read.

    Args:
        query: As `attention`, as are key, value and what is raised.
        key: Likewise.
        value: Likewise.
        options: Those of `attention`, but dropout_p, seed, out and return_lse.

    Returns:
        A `Plan`.

    Raises:
        ValueError: A shape or value does not fit; the message names the argument.
        TypeError: A type or dtype does not fit.
        MemoryError: There is no memory for the workspace.

    Example:
        >>> import numpy as np, attncore
        >>> x = np.zeros((1, 2, 300, 64), np.float32)
        >>> attncore.explain(x, x, x, num_threads=1).threads
        1
    """
    _require_known("explain", options)
    return Plan(**_core.explain(query, key, value, options))


def _require_known(function: str, options: Iterable[str], known: type = ScoreOptions) -> None:
    """`known`: the TypedDict of the options that the function has."""
    for name in options:
        if name not in known.__annotations__:
            raise TypeError(f"{function}() got an unexpected keyword argument '{name}'")
