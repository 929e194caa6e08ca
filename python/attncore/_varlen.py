"""Attention over sequences of different lengths, packed one after another."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from attncore import _core
from attncore._backward import _given, _in_order, _targets, _wanted
from attncore._inspect import _require_known
from attncore._types import Array, Floats, Gradients, Ints, PackedOptions, ScoreOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def attention_varlen(
    query: Array,
    key: Array,
    value: Array,
    cu_query_lengths: Ints,
    cu_key_lengths: Ints,
    *,
    dropout_p: float = ...,
    seed: int = ...,
    out: Array | None = ...,
    return_lse: Literal[False] = ...,
    **options: Unpack[PackedOptions],
) -> Array: ...
@overload
def attention_varlen(
    query: Array,
    key: Array,
    value: Array,
    cu_query_lengths: Ints,
    cu_key_lengths: Ints,
    *,
    dropout_p: float = ...,
    seed: int = ...,
    out: Array | None = ...,
    return_lse: Literal[True],
    **options: Unpack[PackedOptions],
) -> tuple[Array, Floats]: ...
def attention_varlen(
    query: Array,
    key: Array,
    value: Array,
    cu_query_lengths: Ints,
    cu_key_lengths: Ints,
    *,
    dropout_p: float = 0.0,
    seed: int = 0,
    out: Array | None = None,
    return_lse: bool = False,
    **options: Unpack[PackedOptions],
) -> Array | tuple[Array, Floats]:
    """`attention` over sequences of different lengths, packed one after another without padding.

    Sequence b is the tokens cu_query_lengths[b] … cu_query_lengths[b + 1] − 1 of query and out,
    and cu_key_lengths[b] … cu_key_lengths[b + 1] − 1 of key and value; either may be empty.  It is
    entry b of the batch: everything is as for the padded batch, and its bits are those of
    `attention` on this sequence alone.  The names and axes are those of flash-attention's varlen
    functions (Dao 2023).

    Args:
        query: (tokens, heads, dim), all sequences; float32, float64, float16 or bfloat16 (of
            ml_dtypes), any strides.
        key: (key tokens, kv_heads, dim); heads is a multiple of kv_heads.  Its dtype and value's
            as for `attention`.
        value: (key tokens, kv_heads, value_dim).
        cu_query_lengths: Ints (batch + 1,), where sequences begin and end: from 0 to the number of
            query's tokens, never falling.
        cu_key_lengths: Ints (batch + 1,), the same of key and value.
        dropout_p: Each weight is dropped with this probability (to 2⁻¹⁶), else divided by
            1 − dropout_p (Srivastava et al. 2014).
        seed: 0 … 2⁶⁴ − 1.  What is dropped depends on (seed, sequence, head, query, key) alone,
            the last two counted within the sequence.
        out: Where to write the result; must not overlap an input.
        return_lse: Return (out, lse).
        options: Those of `attention` but layout: causal, window, query_offset, mask, bias, alibi,
            relative_bias, softcap, sinks, scale, query_segments, key_segments, query_lengths,
            key_lengths, tree_parents, precision, num_threads.  mask and bias broadcast to (batch,
            heads, longest queries, longest keys), and each sequence has its upper left corner of
            that.
            Segments and tree_parents are packed: (tokens,) and (key tokens,); parents count from
            their sequence's first query.  query_offset is an int or (batch,).  query_lengths and
            key_lengths (batch,) shorten sequences: tokens past them do not exist, and queries past
            them get 0.

    Returns:
        out: (tokens, heads, value_dim) in query's dtype, and if asked for
        lse: (heads, tokens) in float32 (float64 for float64).

    Raises:
        ValueError: A shape or value does not fit; the message names the argument.
        TypeError: A type or dtype does not fit.
        MemoryError: There is no memory for the workspace.

    Example:
        >>> import numpy as np, attncore
        >>> query, key, value = np.random.default_rng(0).standard_normal((3, 9, 2, 16))
        >>> ends = [0, 4, 4, 9]  # three sequences, of 4, 0 and 5 tokens
        >>> out, lse = attncore.attention_varlen(
        ...     query, key, value, ends, ends, causal=True, return_lse=True)
        >>> out.shape, lse.shape
        ((9, 2, 16), (2, 9))
        >>> last = [a[4:].swapaxes(0, 1) for a in (query, key, value)]
        >>> alone = attncore.attention(*last, causal=True)
        >>> bool((out[4:] == alone.swapaxes(0, 1)).all())
        True
    """
    return _core.attention_varlen(
        query,
        key,
        value,
        cu_query_lengths,
        cu_key_lengths,
        out,
        return_lse,
        _packed("attention_varlen", options, dropout_p=dropout_p, seed=seed),
    )


def attention_varlen_backward(
    d_out: Array,
    query: Array,
    key: Array,
    value: Array,
    out: Array,
    lse: Array,
    cu_query_lengths: Ints,
    cu_key_lengths: Ints,
    *,
    d_lse: Array | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    wanted: Collection[str] | None = None,
    into: Gradients | None = None,
    **options: Unpack[PackedOptions],
) -> Gradients:
    """The gradients of a loss that depends on ``out, lse = attention_varlen(query, key, value, …)``.

    As `attention_backward`, with memory for the tokens that are there, not for a padded batch.  The
    bits of a sequence's gradients are those of `attention_backward` on this sequence alone.

    Args:
        d_out: The loss's gradient with respect to out, like out.
        query: As it was given to `attention_varlen`, as are key, value, both cumulative lengths
            and all options.
        key: Likewise, but of query's dtype, as is value.
        value: Likewise.
        out: What `attention_varlen` returned, (tokens, heads, value_dim).
        lse: Likewise, by return_lse=True: (heads, tokens).
        cu_query_lengths: Ints (batch + 1,).
        cu_key_lengths: Ints (batch + 1,).
        d_lse: The loss's gradient with respect to lse, like lse.
        dropout_p: As for `attention_varlen`.
        seed: As for `attention_varlen`.
        wanted: Names of the gradients to compute, of `Gradients`' fields.  Default: those of all
            arrays that are given.
        into: Arrays to write to, of the shapes and dtypes of the inputs, any strides; None: a new
            one.
        options: Those of `attention_varlen`, but out and return_lse.

    Returns:
        `Gradients` (query, key, value, bias, alibi, sinks, relative_bias), each of the shape and
        dtype of its argument, summed over what broadcasting repeats; 0 in the corners of a bias
        that no sequence reaches.  None for what is not given or not wanted.

    Raises:
        ValueError: A shape or value does not fit; the message names the argument.
        TypeError: A type or dtype does not fit.
        MemoryError: There is no memory for the workspace.

    Example:
        >>> import numpy as np, attncore
        >>> query, key, value = np.random.default_rng(0).standard_normal((3, 9, 2, 16))
        >>> ends = [0, 4, 9]
        >>> out, lse = attncore.attention_varlen(query, key, value, ends, ends, return_lse=True)
        >>> d = attncore.attention_varlen_backward(
        ...     np.ones_like(out), query, key, value, out, lse, ends, ends)
        >>> d.query.shape, d.key.shape, d.bias is None
        ((9, 2, 16), (9, 2, 16), True)
    """
    packed = _packed("attention_varlen_backward", options, dropout_p=dropout_p, seed=seed)
    given = _given(query, key, value, cast("ScoreOptions", options))
    targets = _targets(given, _wanted(wanted, given), into)
    _core.attention_varlen_backward(
        query,
        key,
        value,
        cu_query_lengths,
        cu_key_lengths,
        out,
        lse,
        d_out,
        d_lse,
        _in_order(targets),
        packed,
    )
    return targets


def _packed(function: str, options: PackedOptions, **dropout: float) -> dict[str, Any]:
    """The options as the core takes them; (token, head, dim) is "bshd" of one batch entry."""
    _require_known(function, options, PackedOptions)
    return {**options, "layout": "bshd", **dropout}
