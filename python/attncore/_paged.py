"""Attention to keys and values that lie in pages of the caller's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from attncore import _core
from attncore._inspect import _require_known
from attncore._spelled_out import spells_out
from attncore._types import (
    Array,
    Ints,
    Layout,
    PagedOptions,
    Plan,
    Precision,
    RelativeBias,
    Table,
    Window,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _attention_paged(
    query: Array,
    key_pages: Array,
    value_pages: Array,
    block_table: Table,
    key_lengths: int | Ints,
    *,
    key_scale: Array | None = None,
    value_scale: Array | None = None,
    cu_query_lengths: Ints | None = None,
    page_layout: Layout = "bshd",
    out: Array | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    options["key_lengths"] = key_lengths
    if cu_query_lengths is not None:
        options["layout"] = _packed_layout(options)
    pools = (key_pages, value_pages, key_scale, value_scale)
    return _core.attention_paged(
        query, pools, block_table, page_layout, cu_query_lengths, out, return_lse, options
    )


@spells_out(_attention_paged)
def attention_paged(
    query: Array,
    key_pages: Array,
    value_pages: Array,
    block_table: Table,
    key_lengths: int | Ints,
    *,
    key_scale: Array | None = None,
    value_scale: Array | None = None,
    cu_query_lengths: Ints | None = None,
    page_layout: Layout = "bshd",
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
    tree_parents: Ints | None = None,
    layout: Layout = "bhsd",
    dropout_p: float = 0.0,
    seed: int = 0,
    out: Array | None = None,
    return_lse: bool = False,
    precision: Precision = "highest",
    num_threads: int | None = None,
) -> Any:
    """`attention` to keys and values in pages (Kwon et al. 2023), read where they lie.

    Token t of batch entry b is slot ``t % page_size`` of page ``block_table[b, t // page_size]``.
    Entries may share pages, and an entry may have one twice.  Slots past an entry's length, and
    what the table holds past its pages, are never read.  For float pages the result is that of
    `attention` on the gathered keys and values, to the last bit.

    Args:
        query: (batch, heads, queries, dim) or what `attention` takes; with cu_query_lengths
            (tokens, heads, dim); float32, float64, float16 or bfloat16 (of ml_dtypes).
        key_pages: (pages, page_size, kv_heads, dim) with any strides: query's dtype; or, for
            queries that are not float64, each of float32, float16, bfloat16, int8, float8_e4m3fn
            (of ml_dtypes), and uint8 for int4: two numbers in a byte, the first in its low half,
            (pages, page_size, kv_heads, dim / 2) without gaps in the last axis.
        value_pages: (pages, page_size, kv_heads, value_dim), a dtype of its own likewise.
        block_table: Ints (batch, table_pages), of 0 … pages − 1.
        key_lengths: Ints (batch,), each at most table_pages · page_size.
        key_scale: float32 (pages, page_size, kv_heads): each key is what is stored times this.
        value_scale: The same of the values.
        cu_query_lengths: Ints (batch + 1,), from 0: queries cu[b] … cu[b + 1] − 1 are entry b's.
        page_layout: "bshd"; or "bhsd" for pages (pages, kv_heads, page_size, dim), and scales
            (pages, kv_heads, page_size).
        causal: As for `attention`, as are all options below, whose axes of keys have table_pages ·
            page_size items (those of masks and biases may end with the longest entry).  The default offset of an entry is its key_length − its queries.
        window: As for `attention`.
        query_offset: As for `attention`.
        mask: As for `attention`; queries count those of the longest entry if they are packed.
        bias: As mask.
        alibi: As for `attention`.
        relative_bias: As for `attention`.
        softcap: As for `attention`.
        sinks: As for `attention`.
        scale: As for `attention`.
        query_segments: As for `attention`; packed as the queries are.
        key_segments: Ints (batch, table_pages · page_size).
        query_lengths: As for `attention`.
        tree_parents: As for `attention`; packed as the queries are.
        layout: Of query and out; packed queries have none.
        dropout_p: As for `attention`.
        seed: As for `attention`.
        out: As for `attention`.
        return_lse: As for `attention`.
        precision: As for `attention`; where pages and queries are float32.
        num_threads: As for `attention`.

    Returns:
        out: Of query's shape but value_dim, in query's dtype; and if asked for
        lse: (batch, heads, queries), packed (heads, tokens), in float32 (float64 for float64).

    Raises:
        ValueError: A shape or value does not fit; the message names the argument.
        TypeError: A type or dtype does not fit.
        MemoryError: There is no memory for the workspace.

    Example:
        >>> import numpy as np, attncore
        >>> rng = np.random.default_rng(0)
        >>> key_pages, value_pages = rng.standard_normal((2, 10, 16, 1, 64), dtype=np.float32)
        >>> query = rng.standard_normal((2, 8, 1, 64), dtype=np.float32)
        >>> out = attncore.attention_paged(
        ...     query, key_pages, value_pages, [[3, 1, 4], [3, 5, 0]], key_lengths=[40, 19])
        >>> key, value = (p[[3, 5]].reshape(1, 32, 1, 64) for p in (key_pages, value_pages))
        >>> key, value = (a.swapaxes(1, 2)[:, :, :19] for a in (key, value))
        >>> bool((attncore.attention(query[1:], key, value) == out[1:]).all())
        True
    """


def explain_paged(
    query: Array,
    key_pages: Array,
    value_pages: Array,
    block_table: Table,
    key_lengths: int | Ints,
    *,
    key_scale: Array | None = None,
    value_scale: Array | None = None,
    cu_query_lengths: Ints | None = None,
    page_layout: Layout = "bshd",
    **options: Unpack[PagedOptions],
) -> Plan:
    """How `attention_paged` would run with these arguments: as `explain`.

    Takes what `attention_paged` takes, but dropout_p, seed, out and return_lse.

    Returns:
        A `Plan`.

    Raises:
        ValueError: A shape or value does not fit; the message names the argument.
        TypeError: A type or dtype does not fit.
        MemoryError: There is no memory for the workspace.

    Example:
        >>> import numpy as np, attncore
        >>> pages, query = np.zeros((10, 16, 1, 64), np.float32), np.zeros((2, 8, 1, 64), np.float32)
        >>> table = [[3, 1, 4], [3, 5, 0]]
        >>> attncore.explain_paged(query, pages, pages, table, [40, 19], num_threads=1).threads
        1
    """
    _require_known("explain_paged", options, PagedOptions)
    given: dict[str, Any] = {**options, "key_lengths": key_lengths}
    if cu_query_lengths is not None:
        given["layout"] = _packed_layout(options)
    pools = (key_pages, value_pages, key_scale, value_scale)
    plan = _core.explain_paged(query, pools, block_table, page_layout, cu_query_lengths, given)
    return Plan(**plan)


def _packed_layout(options: Mapping[str, Any]) -> Layout:
    """Packed queries are those of one batch entry in "bshd"."""
    layout = options.get("layout", "bhsd")
    if layout != "bhsd":
        raise ValueError(f"layout: is {layout!r}, packed queries are (token, head, dim)")
    return "bshd"


def append_paged(
    key: Array,
    value: Array | None,
    key_pages: Array,
    value_pages: Array | None,
    block_table: Table,
    key_lengths: int | Ints,
    *,
    lengths: int | Ints | None = None,
    key_scale: Array | None = None,
    value_scale: Array | None = None,
    cu_lengths: Ints | None = None,
    layout: Layout = "bhsd",
    page_layout: Layout = "bshd",
) -> None:
    """Writes new keys and values at the ends of sequences, into pages of the caller's.

    New token i of batch entry b becomes its token ``key_lengths[b] + i``, in the slot where
    `attention_paged` will look for it.  The lengths are the caller's to raise afterwards.

    Floats of any dtype are rounded to that of the pages (float64 through float32).  int8, uint8
    (int4) and float8_e4m3fn pages get x / scale, rounded to the nearest, ties to even, with
    scale = max|x| / 127, / 7 or / 448 over a token and head (1 if all are 0, and at least 2⁻¹²⁶),
    which is written too: the error is at most scale / 2 for int8 and int4, and the larger of
    |x| / 16 and scale / 1024 for float8.

    Args:
        key: (batch, kv_heads, tokens, dim), or without the batch axis one entry's; with
            cu_lengths (tokens, kv_heads, dim); float32, float64, float16 or bfloat16.
        value: (batch, kv_heads, tokens, value_dim) likewise; None if value_pages is: values that
            are a view of the keys need no writing.
        key_pages: As for `attention_paged`; written.
        value_pages: Likewise.
        block_table: Ints (batch, table_pages); what lies past the new tokens is not looked at.
        key_lengths: Ints (batch,): the tokens that are there already.
        lengths: Ints (batch,): tokens past them are not appended.  Default: all are.
        key_scale: float32 (pages, page_size, kv_heads), written; with int8, uint8 and
            float8_e4m3fn pages only.
        value_scale: The same of the values.
        cu_lengths: Ints (batch + 1,), from 0: tokens cu[b] … cu[b + 1] − 1 are entry b's.
        layout: "bhsd", or "bshd" for key and value as (batch, token, head, dim).
        page_layout: As for `attention_paged`.

    Raises:
        ValueError: A shape or value does not fit: among others a table that is too short, an
            entry that is no page, a page that two sequences would write, or where another one has
            tokens, memory that overlaps, NaN or infinities for int8, int4 and float8.  Nothing has
            been written then.
        TypeError: A type or dtype does not fit.
        MemoryError: There is no memory for a copy of some of the tokens.

    Example:
        >>> import numpy as np, attncore
        >>> key_pages, value_pages = np.zeros((2, 10, 16, 1, 64), np.float32)
        >>> table, lengths = np.array([[3, 1, 4], [5, 2, 0]]), np.array([0, 0])
        >>> for tokens in (20, 1, 1):  # a prompt, then token by token
        ...     key, value = np.ones((2, 2, 1, tokens, 64), np.float32)
        ...     attncore.append_paged(key, value, key_pages, value_pages, table, lengths)
        ...     lengths += tokens
        >>> query = np.ones((2, 8, 1, 64), np.float32)
        >>> attncore.attention_paged(query, key_pages, value_pages, table, lengths).shape
        (2, 8, 1, 64)
    """
    if cu_lengths is not None and layout != "bhsd":
        raise ValueError(f"layout: is {layout!r}, packed tokens are (token, head, dim)")
    _core.append_paged(
        (key, value),
        (key_pages, value_pages, key_scale, value_scale),
        block_table,
        key_lengths,
        lengths,
        cu_lengths,
        layout,
        page_layout,
    )
