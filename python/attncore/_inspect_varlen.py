"""What `attention_varlen` does, made visible: its probabilities, its plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from attncore import _core
from attncore._inspect import require_top_k, rows_within
from attncore._types import Array, Ints, PackedOptions, Plan, Table
from attncore._varlen import _packed

if TYPE_CHECKING:
    from typing_extensions import Unpack


def attention_weights_varlen(
    query: Array,
    key: Array,
    cu_query_lengths: Ints,
    cu_key_lengths: Ints,
    *,
    rows: int | Ints | Table | None = None,
    top_k: int | None = None,
    **options: Unpack[PackedOptions],
) -> Any:
    """The probabilities that `attention_varlen` uses, for chosen queries: as `attention_weights`.

    They are those of the padded batch: queries and keys count from their sequence's first one up to
    the longest sequence's last, and what a sequence lacks is 0.

    Args:
        query: As `attention_varlen`, as are key, both cumulative lengths and all options.
        key: Likewise.
        cu_query_lengths: Ints (batch + 1,).
        cu_key_lengths: Ints (batch + 1,).
        rows: Queries of each sequence, an int or ints (rows,), or of each its own, (batch, rows);
            negative ones count from the sequence's end: −1 is the last.  Default: all.
        top_k: Return only the k largest of each row.
        options: Those of `attention_varlen`, but dropout_p, seed, out and return_lse.

    Returns:
        (batch, heads, rows, keys of the longest) in float32 (float64 for float64); with top_k the
        pair (indices, probabilities), each (batch, heads, rows, top_k), as `attention_weights` has
        them.

    Raises:
        ValueError: As `attention_varlen`; a row or top_k out of range.
        TypeError: As `attention_varlen`.

    Example:
        >>> import numpy as np, attncore
        >>> query = key = np.ones((9, 2, 16), np.float32)
        >>> ends = [0, 4, 9]  # two sequences, of 4 and 5 tokens
        >>> last = attncore.attention_weights_varlen(query, key, ends, ends, rows=-1)
        >>> last.shape, last[0, 0, 0].tolist()
        ((2, 2, 1, 5), [0.25, 0.25, 0.25, 0.25, 0.0])
    """
    packed = _packed("attention_weights_varlen", options)
    require_top_k(top_k)
    queries, keys = (
        _sequence_lengths(*pair) for pair in ((query, cu_query_lengths), (key, cu_key_lengths))
    )
    longest = int(queries.max(initial=0)), int(keys.max(initial=0))
    indices = None if rows is None else _rows_of_sequences(rows, queries)
    return _core.attention_weights_varlen(
        query, key, cu_query_lengths, cu_key_lengths, longest, indices, top_k, packed
    )


def _rows_of_sequences(rows: int | Ints | Table, queries: npt.NDArray[np.int64]) -> Any:
    """(batch, rows), of sequences with so many queries, from their first one."""
    if len(queries) == 0:
        return np.zeros((0, np.atleast_1d(rows).shape[-1]), np.int64)
    longest = int(queries.max())
    indices = rows_within(rows, longest, 2)
    if indices.ndim == 2 and len(indices) != len(queries):
        raise ValueError(
            f"rows: shape is {indices.shape}, must be (rows,) or ({len(queries)}, rows)"
        )
    from_end = queries[:, None] + indices
    absent = longest - 1  # who has fewer than −index queries lacks this one
    return np.where(indices >= 0, indices, np.where(from_end >= 0, from_end, absent))


def _sequence_lengths(tokens: Any, cumulative: Ints) -> npt.NDArray[np.int64]:
    """(batch,); none for what the core will refuse."""
    ends = np.asarray(cumulative)
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 3 or ends.ndim != 1:
        return np.zeros(0, np.int64)
    if ends.dtype.kind not in "iu":
        return np.zeros(0, np.int64)
    return np.diff(np.clip(ends, 0, len(tokens)).astype(np.int64)).clip(0)


def explain_varlen(
    query: Array,
    key: Array,
    value: Array,
    cu_query_lengths: Ints,
    cu_key_lengths: Ints,
    **options: Unpack[PackedOptions],
) -> Plan:
    """How `attention_varlen` would run with these arguments: as `explain`.

    Args:
        query: As `attention_varlen`, as are the other four and what is raised.
        key: Likewise.
        value: Likewise.
        cu_query_lengths: Likewise.
        cu_key_lengths: Likewise.
        options: Those of `attention_varlen`, but dropout_p, seed, out and return_lse.

    Returns:
        A `Plan`.

    Raises:
        ValueError: A shape or value does not fit; the message names the argument.
        TypeError: A type or dtype does not fit.
        MemoryError: There is no memory for the workspace.

    Example:
        >>> import numpy as np, attncore
        >>> x = np.zeros((300, 2, 64), np.float32)
        >>> attncore.explain_varlen(x, x, x, [0, 100, 300], [0, 100, 300], num_threads=1).threads
        1
    """
    packed = _packed("explain_varlen", options)
    plan = _core.explain_varlen(query, key, value, cu_query_lengths, cu_key_lengths, packed)
    return Plan(**plan)
