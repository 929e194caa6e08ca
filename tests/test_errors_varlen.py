"""Bad input: what attention_varlen and its backward raise; the message names the argument."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from kit import zeros
from test_errors import ints
from test_errors_dropout import SHARED
from varlen_kit import untyped

B, H, HK, T, TK, D, DV = 2, 4, 2, 8, 9, 8, 6
GOOD: dict[str, Any] = {
    "query": zeros(T, H, D),
    "key": zeros(TK, HK, D),
    "value": zeros(TK, HK, DV),
    "cu_query_lengths": [0, 5, 8],
    "cu_key_lengths": [0, 2, 9],
}
OUT, LSE = zeros(T, H, DV), zeros(H, T)
BACKWARD: dict[str, Any] = {**GOOD, "d_out": zeros(T, H, DV), "out": OUT, "lse": LSE}
QUERIES, KEYS = "cu_query_lengths", "cu_key_lengths"

# name: (what differs from a good call, exception, message); of attention_varlen and of its backward
CASES: dict[str, tuple[dict[str, Any], Any, str]] = {
    # cumulative lengths
    "first is not 0": ({QUERIES: [1, 5, 8]}, ValueError, f"{QUERIES}.*entry 0 is 1, must be 0"),
    "first is negative": ({KEYS: [-1, 2, 9]}, ValueError, f"{KEYS}.*entry 0 is -1, must be 0"),
    "falling": ({QUERIES: [0, 6, 5]}, ValueError, f"{QUERIES}.*entry 2 is 5, must be 6 … 8"),
    "negative in between": ({KEYS: [0, -3, 9]}, ValueError, f"{KEYS}.*entry 1 is -3.*0 … 9"),
    "more tokens than there are": ({QUERIES: [0, 5, 9]}, ValueError, f"{QUERIES}.*2 is 9.*5 … 8"),
    "far more": ({KEYS: [0, 2, 2**62]}, ValueError, f"{KEYS}.*entry 2 is {2**62}.*2 … 9"),
    "beyond int64": ({KEYS: np.array([0, 2, 2**63], np.uint64)}, ValueError, f"{KEYS}.*range"),
    "fewer tokens": ({QUERIES: [0, 5, 7]}, ValueError, f"{QUERIES}.*ends with 7.*tokens, 8"),
    "fewer key tokens": ({KEYS: [0, 2, 8]}, ValueError, f"{KEYS}.*ends with 8.*tokens, 9"),
    "of other batches": ({KEYS: [0, 2, 4, 9]}, ValueError, f"{KEYS}.*4.*3.*batch \\+ 1"),
    "empty": ({QUERIES: []}, ValueError, f"{QUERIES}.*empty, must begin with 0"),
    "empty of keys": ({KEYS: []}, ValueError, f"{KEYS}.*0,.*3,.*batch \\+ 1"),
    "a scalar": ({QUERIES: 8}, ValueError, f"{QUERIES}.*scalar.*batch \\+ 1"),
    "two axes": ({KEYS: ints(3, 1)}, ValueError, f"{KEYS}.*2 dimensions.*1"),
    "floats": ({QUERIES: zeros(3)}, TypeError, f"{QUERIES}.*float32.*integer"),
    "bools": ({KEYS: zeros(3, dtype=bool)}, TypeError, f"{KEYS}.*bool.*integer"),
    "text": ({KEYS: "029"}, TypeError, f"{KEYS}.*integer"),
    "None": ({QUERIES: None}, TypeError, f"{QUERIES}.*ints.*None"),
    "lengths, not their sums": ({QUERIES: [5, 3]}, ValueError, f"{QUERIES}.*entry 0 is 5"),
    # operands
    "4-D query": ({"query": zeros(1, T, H, D)}, ValueError, "query.*4 dim.*3.*token, head, dim"),
    "2-D query": ({"query": zeros(T, D)}, ValueError, "query.*2 dimensions.*3"),
    "4-D key": ({"key": zeros(1, TK, HK, D)}, ValueError, "key.*4 dimensions.*3"),
    "1-D value": ({"value": zeros(TK)}, ValueError, "value.*1 dimensions.*3"),
    "list as query": ({"query": [[[1.0]]]}, TypeError, "query.*array.*list"),
    "integer key": ({"key": ints(TK, HK, D)}, TypeError, "key.*int64.*float32"),
    "key of another dtype": ({"key": zeros(TK, HK, D, dtype=float)}, TypeError, "key.*float64.*32"),
    "key of another dim": ({"key": zeros(TK, HK, 9)}, ValueError, "key.*9.*8"),
    "value of other tokens": ({"value": zeros(8, HK, DV)}, ValueError, "value.*8.*9"),
    "value of other heads": ({"value": zeros(TK, 1, DV)}, ValueError, "value.*1.*2"),
    "heads no multiple": (
        {"key": zeros(TK, 3, D), "value": zeros(TK, 3, DV)},
        ValueError,
        "key.*3.*4.*multiple",
    ),
    # options
    "layout": ({"layout": "bshd"}, TypeError, r"varlen.*\(\).*'layout'"),
    "no option": ({"max_seqlen_q": 5}, TypeError, r"varlen.*\(\).*max_seqlen_q"),
    "mask of other entries": (
        {"mask": np.ones((3, 1, 5, 7), bool)},
        ValueError,
        r"mask.*\(3, 1, 5, 7\).*\(2, 4, 5, 7\)",
    ),
    "mask of all tokens": (
        {"mask": np.ones((T, TK), bool)},
        ValueError,
        r"mask.*8, 9\).*\(2, 4, 5, 7\)",
    ),
    "bias of other keys": ({"bias": zeros(5, 6)}, ValueError, r"bias.*5, 6\).*\(2, 4, 5, 7\)"),
    "too many offsets": ({"query_offset": ints(3)}, ValueError, "query_offset.*3.*2"),
    "alibi of other entries": ({"alibi": zeros(3, H)}, ValueError, "alibi.*3.*2"),
    "key length too large": (
        {"key_lengths": [3, 2]},
        ValueError,
        "key_lengths.*entry 0 is 3.*0 … 2",
    ),
    "query length too large": (
        {"query_lengths": [5, 4]},
        ValueError,
        "query_lengths.*entry 1 is 4.*0 … 3",
    ),
    "too few lengths": ({"key_lengths": [2]}, ValueError, "key_lengths.*1.*2"),
    "segments of the padded batch": (
        {"query_segments": ints(B, 5), "key_segments": ints(B, 7)},
        ValueError,
        r"query_segments.*\(2, 5\).*\(1, 8\)",
    ),
    "segments of other tokens": (
        {"query_segments": ints(T), "key_segments": ints(T)},
        ValueError,
        "key_segments.*8.*9",
    ),
    "only query_segments": ({"query_segments": ints(T)}, ValueError, "key_segments.*query_seg"),
    "negative window": ({"window": (-1, 0)}, ValueError, "window.*-1.*0"),
    "num_threads of 0": ({"num_threads": 0}, ValueError, "num_threads.*0.*1"),
}
FORWARD: dict[str, tuple[dict[str, Any], Any, str]] = {
    "out of a list": ({"out": [1.0]}, TypeError, "out.*list"),
    "out of another shape": ({"out": zeros(T, H, D)}, ValueError, "out.*8.*6"),
    "out of another rank": ({"out": zeros(1, T, H, DV)}, ValueError, "out.*4.*3"),
    "out of another dtype": ({"out": zeros(T, H, DV, dtype=float)}, TypeError, "out.*float64"),
    "out of attention": ({"out": zeros(H, T, DV)}, ValueError, "out"),
}
OF_BACKWARD: dict[str, tuple[dict[str, Any], Any, str]] = {
    "lse of tokens first": ({"lse": zeros(T, H)}, ValueError, "lse.*1, 8, 4.*1, 4, 8"),
    "lse of the padded batch": ({"lse": zeros(B, H, 5)}, ValueError, "lse.*3 dimensions.*2"),
    "lse of another dtype": ({"lse": zeros(H, T, dtype=float)}, TypeError, "lse.*float64.*float32"),
    "d_lse of other heads": ({"d_lse": zeros(HK, T)}, ValueError, "d_lse.*2, 8.*4, 8"),
    "out of other tokens": ({"out": zeros(TK, H, DV)}, ValueError, "out.*9.*8"),
    "d_out of another dim": ({"d_out": zeros(T, H, D)}, ValueError, "d_out.*8.*6"),
    "d_out of the padded batch": ({"d_out": zeros(B, H, 5, DV)}, ValueError, "d_out.*4.*3"),
    "unknown gradient": ({"wanted": ["mask"]}, ValueError, "wanted.*mask"),
    "into of query's tokens": (
        {"into": untyped.Gradients(key=zeros(T, HK, D))},
        ValueError,
        "(into|d_key).*8.*9",
    ),
    "into that overlaps": ({"into": untyped.Gradients(query=GOOD["query"])}, ValueError, "d_query"),
}


@pytest.mark.parametrize("case", [*SHARED, *CASES, *FORWARD])
def test_attention_varlen(case: str) -> None:
    change, exception, message = (SHARED | CASES | FORWARD)[case]
    out = np.full((T, H, DV), 7, np.float32)
    with pytest.raises(exception, match=message) as caught:
        untyped.attention_varlen(**{**GOOD, "out": out, **change})
    assert re.match(r"[a-z_]+(\(\)|:)", str(caught.value)), "the argument's name comes first"
    assert (out == 7).all(), "out= was touched before everything was checked"


@pytest.mark.parametrize("case", [*SHARED, *CASES, *OF_BACKWARD])
def test_attention_varlen_backward(case: str) -> None:
    change, exception, message = (SHARED | CASES | OF_BACKWARD)[case]
    target = np.full((T, H, D), 7, np.float32)
    into = None if "query" in change else untyped.Gradients(query=target)
    call = {**BACKWARD, "into": into, **change}
    with pytest.raises(exception, match=message) as caught:
        untyped.attention_varlen_backward(**call)
    assert re.match(r"[a-z_]+(\(\)|:)", str(caught.value)), "the argument's name comes first"
    assert (target == 7).all(), "into= was touched before everything was checked"


def test_good_calls_are_good() -> None:
    """What the tables change is what is wrong."""
    assert untyped.attention_varlen(**GOOD).shape == (T, H, DV)
    assert untyped.attention_varlen_backward(**BACKWARD).key.shape == (TK, HK, D)
    assert len(CASES) >= 15


def test_options_are_keywords() -> None:
    with pytest.raises(TypeError):
        untyped.attention_varlen(*GOOD.values(), True)
    with pytest.raises(TypeError, match="cu_key_lengths"):
        untyped.attention_varlen(*list(GOOD.values())[:4])


def test_results_over_the_cumulative_lengths() -> None:
    """They are read until the call's end."""
    memory = np.zeros((T, H, DV), np.float32)
    lengths = memory.view(np.int32).reshape(-1)[2:5]
    for name in (QUERIES, KEYS):
        lengths[:] = GOOD[name]
        with pytest.raises(ValueError, match=f"out: overlaps {name}"):
            untyped.attention_varlen(**{**GOOD, name: lengths, "out": memory})
        d_value = memory.reshape(-1)[: TK * HK * DV].reshape(TK, HK, DV)
        into = untyped.Gradients(value=d_value)
        with pytest.raises(ValueError, match=f"d_value: overlaps {name}"):
            untyped.attention_varlen_backward(**{**BACKWARD, name: lengths, "into": into})
        assert lengths.tolist() == GOOD[name]
