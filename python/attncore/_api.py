"""Attention on NumPy arrays.  docs/semantics.md is the contract of the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt

from attncore import _core
from attncore._spelled_out import spells_out
from attncore._types import (
    Array,
    Floats,
    Ints,
    Layout,
    Precision,
    RelativeBias,
    ScoreOptions,
    Window,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    out: Array | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    return _core.attention(query, key, value, out, return_lse, options)


@overload
def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    dropout_p: float = ...,
    seed: int = ...,
    out: Array | None = ...,
    return_lse: Literal[False] = ...,
    **options: Unpack[ScoreOptions],
) -> Array: ...
@overload
def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    dropout_p: float = ...,
    seed: int = ...,
    out: Array | None = ...,
    return_lse: Literal[True],
    **options: Unpack[ScoreOptions],
) -> tuple[Array, Floats]: ...
@spells_out(_attention)
def attention(  # type: ignore[empty-body]
    query: Array,
    key: Array,
    value: Array,
    *,
    causal: bool = False,
    window: Window | None = None,
    query_offset: int | Ints | None = None,
    mask: npt.NDArray[np.bool_] | None = None,
    bias: Array | Sequence[Array] | None = None,
    alibi: Array | Sequence[float] | None = None,
    relative_bias: RelativeBias | None = None,
    softcap: float | None = None,
    sinks: Array | Sequence[float] | None = None,
    scale: float | None = None,
    query_segments: Ints | None = None,
    key_segments: Ints | None = None,
    query_lengths: int | Ints | None = None,
    key_lengths: int | Ints | None = None,
    tree_parents: Ints | None = None,
    layout: Layout = "bhsd",
    dropout_p: float = 0.0,
    seed: int = 0,
    out: Array | None = None,
    return_lse: bool = False,
    precision: Precision = "highest",
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
        key: (batch, kv_heads, keys, dim); heads is a multiple of kv_heads (Ainslie et al. 2023).
            Of query's dtype; or, for queries that are not float64, any of float32, float16 and
            bfloat16.
        value: (batch, kv_heads, keys, value_dim), a dtype of its own likewise.
        causal: A query sees the keys up to its own position.
        window: (left, right): position − left ≤ key ≤ position + right; None is unbounded
            (Beltagy et al. 2020).
        query_offset: Position of query 0 among the keys, an int or one a batch entry.  The
            default, keys − queries (an entry's own lengths, where they are given), lets the last
            query see the last key; 0 is torch's way.  Whole sequences, padded, need both lengths,
            or an offset of 0.
        mask: bool, broadcasts to (batch, heads, queries, keys); True lets attend.  Padding of keys,
            (batch, keys), is ``mask=~padding[:, None, None]``.
        bias: float32 or query's dtype, added to the scores; broadcasts likewise; or a tuple of
            up to 8 such arrays.  −inf masks.
        alibi: Slopes, (heads,) or (batch, heads): + slope · −|position − key|
            (Press et al. 2022).
        relative_bias: T5's: + table[head, bucket(key − position)], see `RelativeBias`.
        softcap: c > 0: scores become c · tanh(score / c), before bias and masks (Gemma Team 2024).
        sinks: Logits, (heads,): a term of the softmax's denominator (Xiao et al. 2024).
        scale: Default 1/√dim; any finite number.
        query_segments: Ints (batch, queries); with key_segments: attend where equal.
        key_segments: Ints (batch, keys).
        query_lengths: Ints (batch,): queries past them see nothing.
        key_lengths: Ints (batch,): keys past them do not exist.  The default query_offset moves
            with them.
        tree_parents: Ints (batch, queries) or (queries,): new tokens that form a tree (Miao et al.
            2024), whose own keys are the last ones.  The parent of each query among the queries
            before it, or −1: a query sees the keys before the new ones, its ancestors and itself.
        layout: "bhsd", or "bshd" for query, key, value and out as (batch, token, head, dim), or
            (token, head, dim).
        dropout_p: Each weight is dropped with this probability (to 2⁻¹⁶), else divided by
            1 − dropout_p (Srivastava et al. 2014); lse knows nothing of it.
        seed: 0 … 2⁶⁴ − 1, a new one for each call in training: what is dropped depends on (seed,
            batch, head, query, key) alone.  `dropout_mask` shows it.
        out: Where to write the result; must not overlap an input.
        return_lse: Return (out, lse), with lse the logarithm of the softmax's denominator.
        precision: Of products of float32, by torch's names: "highest" is float32's own; "medium"
            allows to round queries, keys, values and weights to bfloat16, for speed, where the
            instruction set multiplies that (out has 2 to 3 digits then); "high" allows two
            bfloat16 parts each (amx: out has 4 to 5 digits; elsewhere it is float32's own).
            `explain` says what is taken.
            Of other dtypes, and for few query rows a KV head (up to 4, 8 from 24 keys on, 16 from 256 on), it
            changes nothing.
        num_threads: For this call.

    Returns:
        out: (batch, heads, queries, value_dim) in query's dtype and rank, and if asked for
        lse: (batch, heads, queries) in float32 (float64 for float64).

    Raises:
        ValueError: A shape or value does not fit; the message names the argument.
        TypeError: A type or dtype does not fit.
        MemoryError: There is no memory for the workspace.
        KeyboardInterrupt: Ctrl-C; out is unspecified then.

    Example:
        >>> import numpy as np, attncore
        >>> rng = np.random.default_rng(0)
        >>> query = rng.standard_normal((1, 8, 5, 64), dtype=np.float32)
        >>> key, value = rng.standard_normal((2, 1, 2, 9, 64), dtype=np.float32)
        >>> out, lse = attncore.attention(query, key, value, causal=True, return_lse=True)
        >>> out.shape, lse.shape
        ((1, 8, 5, 64), (1, 8, 5))
    """
