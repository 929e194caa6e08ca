"""Bad input: out= against its inputs, and the functions beside attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import zeros

untyped: Any = attncore  # what the type checker would not let through
from reference import Array
from test_errors import DV, GOOD, HK, KEY, VALUE, B, D, H, K, Q, S, ints


@pytest.mark.parametrize("name", ["query", "key", "value", "mask", "bias", "sinks", "alibi"])
def test_out_must_not_overlap_an_input(name: str) -> None:
    memory = np.zeros(4000, np.float32)
    shapes = {"query": Q.shape, "key": KEY.shape, "value": VALUE.shape}
    shapes |= {"bias": (S, K), "sinks": (H,), "alibi": (B, H)}
    count = int(np.prod(shapes.get(name, (1,))))
    given: Array = memory[100 : 100 + count].reshape(shapes.get(name, (1,)))
    if name == "mask":
        given = memory.view(bool)[400 : 400 + K]
    last = memory[100 + max(count, K // 4) - 1 :][: B * H * S * DV].reshape(B, H, S, DV)
    assert np.shares_memory(given, last)
    with pytest.raises(ValueError, match=f"out.*overlaps {name}"):
        attncore.attention(**{**GOOD, name: given, "out": last})
    beside = memory[100 + max(count, K) :][: B * H * S * DV].reshape(B, H, S, DV)
    attncore.attention(**{**GOOD, name: given, "out": beside})


INT_OPTIONS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "query_segments": ({"key_segments": ints(B, K)}, (B, S)),
    "key_segments": ({"query_segments": ints(B, S)}, (B, K)),
    "query_offset": ({}, (B,)),
    "query_lengths": ({}, (B,)),
    "key_lengths": ({}, (B,)),
    "tree_parents": ({}, (B, S)),
}


@pytest.mark.parametrize("name", INT_OPTIONS)
def test_out_must_not_overlap_ints(name: str) -> None:
    others, shape = INT_OPTIONS[name]
    memory = np.zeros((B, H, S, DV), np.float32)
    given = memory.view(np.int32).reshape(-1)[3 : 3 + int(np.prod(shape))].reshape(shape)
    given[...] = -1 if name == "tree_parents" else 1
    with pytest.raises(ValueError, match=f"out: overlaps {name}"):
        untyped.attention(**GOOD, **others, **{name: given}, out=memory)
    untyped.attention(**GOOD, **others, **{name: given.copy()}, out=memory)


def test_out_must_not_overlap_a_table() -> None:
    memory = np.zeros((B, H, S, DV), np.float32)
    table = memory.reshape(-1)[7 : 7 + 32 * H].reshape(H, 32)
    with pytest.raises(ValueError, match="out: overlaps relative_bias"):
        attncore.attention(**GOOD, relative_bias=attncore.RelativeBias(table), out=memory)


def test_out_must_be_writable_and_apart_from_itself() -> None:
    out = zeros(B, H, S, DV)
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"out.*(read-only|writ)"):
        attncore.attention(**GOOD, out=out)
    line = zeros(B, H, 1, DV)
    line = np.lib.stride_tricks.as_strided(line, (B, H, S, DV), (*line.strides[:2], 0, 4))
    with pytest.raises(ValueError, match=r"out.*overlap"):
        attncore.attention(**GOOD, out=line)


def test_out_interleaved_with_an_input_is_fine() -> None:
    """Neighbours in memory, not the same elements."""
    memory = np.random.default_rng(1).standard_normal((B, H, S, 2, D)).astype(np.float32)
    query, out = memory[..., 0, :], memory[..., 1, :]
    key, value = zeros(B, HK, K, D) + 1, zeros(B, HK, K, D) + 2
    attncore.attention(query, key, value, out=out)
    np.testing.assert_allclose(out, 2, rtol=1e-6)


CALLS: dict[str, tuple[Any, type[Exception], str]] = {
    "rows out of range": (
        lambda: untyped.attention_weights(Q, KEY, rows=[5]),
        ValueError,
        "rows.*5",
    ),
    "rows before the first": (
        lambda: untyped.attention_weights(Q, KEY, rows=[-6]),
        ValueError,
        "rows.*-6",
    ),
    "rows of floats": (
        lambda: untyped.attention_weights(Q, KEY, rows=[0.5]),
        TypeError,
        "rows.*float",
    ),
    "rows of two axes": (
        lambda: untyped.attention_weights(Q, KEY, rows=[[1]]),
        ValueError,
        "rows",
    ),
    "top_k of 0": (lambda: untyped.attention_weights(Q, KEY, top_k=0), ValueError, "top_k.*0.*1"),
    "top_k beyond": (
        lambda: untyped.attention_weights(Q, KEY, top_k=8),
        ValueError,
        "top_k.*8.*7",
    ),
    "top_k of a float": (
        lambda: untyped.attention_weights(Q, KEY, top_k=1.5),
        TypeError,
        "top_k.*float",
    ),
    "merge of nothing": (lambda: untyped.merge([], []), ValueError, "outs"),
    "merge of other counts": (lambda: untyped.merge([zeros(3, 2)], []), ValueError, "lses.*0.*1"),
    "merge of other shapes": (
        lambda: untyped.merge([zeros(3, 2), zeros(3, 4)], [zeros(3)] * 2),
        ValueError,
        r"outs.*\(3, 4\)",
    ),
    "merge of other lse": (
        lambda: untyped.merge([zeros(3, 2)], [zeros(2)]),
        ValueError,
        r"lses.*\(2,\)",
    ),
    "merge of another layout": (
        lambda: untyped.merge([zeros(3, 2)], [zeros(3)], layout="sbhd"),
        ValueError,
        "layout.*sbhd",
    ),
    "merge of too few axes": (
        lambda: untyped.merge([zeros(3, 2)], [zeros(3)], layout="bshd"),
        ValueError,
        "outs: has 2 dimensions, must have at least 3",
    ),
    "merge of tokens last": (
        lambda: untyped.merge([zeros(3, 4, 2)], [zeros(3, 4)], layout="bshd"),
        ValueError,
        r"lses: shape is \(3, 4\), must be \(4, 3\)",
    ),
    "merge of ints": (lambda: untyped.merge([ints(3, 2)], [zeros(3)]), TypeError, "outs.*int64"),
    "merge of masked arrays": (
        lambda: untyped.merge([np.ma.masked_array(zeros(3, 2))], [zeros(3)]),
        TypeError,
        "outs.*MaskedArray",
    ),
    "merge of dtypes": (
        lambda: untyped.merge([zeros(3, 2), zeros(3, 2, dtype=float)], [zeros(3)] * 2),
        TypeError,
        "outs.*float64",
    ),
    "unknown ISA": (lambda: untyped.use_isa("mmx"), ValueError, "mmx.*baseline"),
    "ISA of a number": (lambda: untyped.use_isa(3), TypeError, "int"),
    "no threads": (lambda: untyped.set_num_threads(0), ValueError, "0.*1"),
    "negative threads": (
        lambda: untyped.set_num_threads(-(2**40)),
        ValueError,
        "-1099511627776.*1",
    ),
    "threads of text": (lambda: untyped.set_num_threads("2"), TypeError, "str|incompatible"),
    "dropout": (
        lambda: untyped.scaled_dot_product_attention(Q, Q, Q, dropout_p=0.5),
        NotImplementedError,
        "dropout_p.*0.5",
    ),
    "mask and causal": (
        lambda: untyped.scaled_dot_product_attention(
            Q, Q, Q, attn_mask=np.ones((S, S), bool), is_causal=True
        ),
        ValueError,
        "attn_mask.*is_causal",
    ),
    "heads without enable_gqa": (
        lambda: untyped.scaled_dot_product_attention(Q, KEY, VALUE),
        ValueError,
        "enable_gqa",
    ),
    "leading axes that differ": (
        lambda: untyped.scaled_dot_product_attention(zeros(2, 1, 3, 4), *[zeros(3, 1, 3, 4)] * 2),
        ValueError,
        r"query, key, value.*\(2,\), \(3,\), \(3,\)",
    ),
    "mask of ints for sdpa": (
        lambda: untyped.scaled_dot_product_attention(Q, Q, Q, attn_mask=ints(S, S)),
        TypeError,
        "attn_mask.*int64.*bool",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_other_calls(case: str) -> None:
    call, exception, message = CALLS[case]
    with pytest.raises(exception, match=message):
        call()


def test_a_failed_call_leaves_the_settings() -> None:
    before = attncore.isa(), attncore.get_num_threads()
    for case in ("unknown ISA", "no threads"):
        with pytest.raises(ValueError, match=CALLS[case][2]):
            CALLS[case][0]()
    assert (attncore.isa(), attncore.get_num_threads()) == before
