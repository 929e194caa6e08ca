"""Bad input: what attention_backward raises; the message names the argument."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import attncore
from kit import BFLOAT16, zeros
from reference import Array
from test_errors import DV, GOOD, HK, KEY, VALUE, B, D, H, K, Q, S
from test_errors_dropout import SHARED, relative

untyped: Any = attncore  # what the type checker would not let through

OUT, LSE, LINE = zeros(B, H, S, DV), zeros(B, H, S), zeros(B * H * S * D)
GOOD_BACKWARD: dict[str, Any] = {**GOOD, "d_out": zeros(B, H, S, DV), "out": OUT, "lse": LSE}


def into(**arrays: Any) -> Any:
    return untyped.Gradients(**{**dict.fromkeys(untyped.Gradients._fields), **arrays})


def read_only(*shape: int) -> Array:
    array = zeros(*shape)
    array.flags.writeable = False
    return array


def strided(*shape: int) -> Array:
    """All items in one place."""
    return np.lib.stride_tricks.as_strided(zeros(1), shape, (0,) * len(shape))


# name: (what differs from a good call, exception, message)
BACKWARD: dict[str, tuple[dict[str, Any], Any, str]] = {
    # d_out, out
    "d_out of a list": ({"d_out": [1.0]}, TypeError, "d_out.*array.*list"),
    "no d_out": ({"d_out": None}, TypeError, "d_out.*array.*None"),
    "d_out of another dtype": (
        {"d_out": zeros(B, H, S, DV, dtype=float)},
        TypeError,
        "d_out.*float64.*float32",
    ),
    "d_out of another shape": (
        {"d_out": zeros(B, H, S, D)},
        ValueError,
        r"d_out.*\(2, 4, 5, 8\).*\(2, 4, 5, 6\)",
    ),
    "d_out that would broadcast": (
        {"d_out": zeros(1, 1, 1, 1)},
        ValueError,
        r"d_out.*\(1, 1, 1, 1\).*\(2, 4, 5, 6\)",
    ),
    "d_out of another rank": ({"d_out": zeros(H, S, DV)}, ValueError, "d_out.*3.*4"),
    "out of another shape": (
        {"out": zeros(B, H, S + 1, DV)},
        ValueError,
        r"out.*\(2, 4, 6, 6\).*\(2, 4, 5, 6\)",
    ),
    "out of another dtype": (
        {"out": zeros(B, H, S, DV, dtype=np.float16)},
        TypeError,
        "out.*float16.*float32",
    ),
    "no out": ({"out": None}, TypeError, "out.*array.*None"),
    # lse, d_lse
    "no lse": ({"lse": None}, TypeError, "lse.*array.*None"),
    "lse of another dtype": (
        {"lse": zeros(B, H, S, dtype=float)},
        TypeError,
        "lse.*float64.*float32",
    ),
    "lse of query's dtype": (
        {"lse": zeros(B, H, S, dtype=np.float16)},
        TypeError,
        "lse.*float16.*float32",
    ),
    "lse of another call's rows": (
        {"lse": zeros(B, H, S + 2)},
        ValueError,
        r"lse.*\(2, 4, 7.*\(2, 4, 5",
    ),
    "lse of another call's heads": ({"lse": zeros(B, HK, S)}, ValueError, r"lse.*2, 2, 5.*2, 4, 5"),
    "lse of another layout": ({"lse": zeros(B, S, H)}, ValueError, r"lse.*2, 5, 4.*2, 4, 5"),
    "lse of another rank": ({"lse": zeros(B, H, S, 1)}, ValueError, "lse.*4.*3"),
    "d_lse of another shape": (
        {"d_lse": zeros(B, H, S + 1)},
        ValueError,
        r"d_lse.*\(2, 4, 6.*\(2, 4, 5",
    ),
    "d_lse of another dtype": (
        {"d_lse": zeros(B, H, S, dtype=float)},
        TypeError,
        "d_lse.*float64.*float32",
    ),
    "d_lse of another rank": ({"d_lse": zeros(H, S)}, ValueError, "d_lse.*2.*3"),
    "d_lse of a list": ({"d_lse": [0.0]}, TypeError, "d_lse.*array.*list"),
    # wanted
    "wanted of text": ({"wanted": "query"}, TypeError, "wanted.*str"),
    "unknown gradient": ({"wanted": ["query", "mask"]}, ValueError, "wanted.*mask.*query"),
    "gradient of what is not given": ({"wanted": {"bias"}}, ValueError, "wanted.*bias.*not given"),
    "gradient of no table": (
        {"wanted": ["relative_bias"]},
        ValueError,
        "wanted.*relative_bias.*not given",
    ),
    "wanted of a number": ({"wanted": 3}, TypeError, "wanted.*int"),
    "wanted of numbers": ({"wanted": [3]}, (TypeError, ValueError), "wanted.*3|int"),
    # into
    "into of a tuple": ({"into": (None,) * 7}, TypeError, "into.*Gradients.*tuple"),
    "into of an array": ({"into": zeros(B, H, S, D)}, TypeError, "into.*Gradients.*ndarray"),
    "into of a list": ({"into": into(query=[1.0])}, TypeError, "(into|d_query).*array.*list"),
    "into of another shape": (
        {"into": into(query=zeros(B, H, S, DV))},
        ValueError,
        r"(into|d_query).*\(2, 4, 5, 6\).*\(2, 4, 5, 8\)",
    ),
    "into of query's heads": (
        {"into": into(key=zeros(B, H, K, D))},
        ValueError,
        r"(into|d_key).*\(2, 4, 7, 8\).*\(2, 2, 7, 8\)",
    ),
    "into of another dtype": (
        {"into": into(value=zeros(B, HK, K, DV, dtype=float))},
        TypeError,
        "(into|d_value).*float64.*float32",
    ),
    "into that is read-only": (
        {"into": into(key=read_only(B, HK, K, D))},
        ValueError,
        "(into|d_key).*(read-only|writ)",
    ),
    "into that overlaps an input": ({"into": into(query=Q)}, ValueError, "d_query.*overlaps query"),
    "into that overlaps out": (
        {"out": LINE[: OUT.size].reshape(OUT.shape), "into": into(query=LINE.reshape(Q.shape))},
        ValueError,
        "d_query.*overlaps out",
    ),
    "into that overlaps lse": (
        {"lse": LINE[: LSE.size].reshape(LSE.shape), "into": into(query=LINE.reshape(Q.shape))},
        ValueError,
        "d_query.*overlaps lse",
    ),
    "into that overlaps d_out": (
        {"d_out": LINE[: OUT.size].reshape(OUT.shape), "into": into(query=LINE.reshape(Q.shape))},
        ValueError,
        "d_query.*overlaps d_out",
    ),
    "into that overlaps d_lse": (
        {"d_lse": LINE[: LSE.size].reshape(LSE.shape), "into": into(query=LINE.reshape(Q.shape))},
        ValueError,
        "d_query.*overlaps d_lse",
    ),
    "into that overlaps a bias": (
        {"bias": LINE[: S * K].reshape(S, K), "into": into(query=LINE.reshape(Q.shape))},
        ValueError,
        "d_query.*overlaps bias",
    ),
    "into that overlaps itself": (
        {"into": into(query=strided(B, H, S, D))},
        ValueError,
        "(into|d_query).*overlap",
    ),
    "into twice the same": (
        {"into": into(query=LINE.reshape(Q.shape), key=LINE[: KEY.size].reshape(KEY.shape))},
        ValueError,
        "d_key.*overlaps d_query",
    ),
    "into for what is not given": (
        {"into": into(alibi=zeros(H))},
        ValueError,
        "(into|d_alibi).*not given",
    ),
    "into for what is not wanted": (
        {"into": into(key=zeros(B, HK, K, D)), "wanted": ["query"]},
        ValueError,
        "into.*key.*not.*wanted",
    ),
    "an array into a tuple of biases": (
        {"bias": (zeros(S, K),), "into": into(bias=zeros(S, K))},
        (TypeError, ValueError),
        "(into|d_bias).*tuple",
    ),
    "a tuple into one bias": (
        {"bias": zeros(S, K), "into": into(bias=(zeros(S, K),))},
        (TypeError, ValueError),
        "(into|d_bias).*(array|tuple)",
    ),
    "into of fewer biases": (
        {"bias": (zeros(S, K), zeros(K)), "into": into(bias=(zeros(S, K),))},
        ValueError,
        "(into|d_bias).*2",
    ),
    "into of an expanded bias": (
        {"bias": zeros(1, K), "into": into(bias=zeros(S, K))},
        ValueError,
        r"(into|d_bias).*5, 7.*1, 7",
    ),
    "into of a bias of another rank": (
        {"bias": zeros(S, K), "into": into(bias=zeros(1, S, K))},
        ValueError,
        r"(into|d_bias).*(3|1, 5, 7).*(2|5, 7)",
    ),
    "into of other slopes": (
        {"alibi": zeros(H), "into": into(alibi=zeros(B, H))},
        ValueError,
        r"(into|d_alibi).*2.*(1|4)",
    ),
    "into of other sinks": (
        {"sinks": zeros(H), "into": into(sinks=zeros(HK))},
        ValueError,
        "(into|d_sinks).*2.*4",
    ),
    "into of another table": (
        {"relative_bias": relative(H, 32), "into": into(relative_bias=zeros(H, 16))},
        ValueError,
        "(into|d_relative_bias).*16.*32",
    ),
    # what attention refuses too
    "key of another batch": (
        {"key": zeros(3, HK, K, D)},
        ValueError,
        r"key.*\(3, 2, 7, 8\).*\(2, 2, 7, 8\)",
    ),
    "unknown option": ({"dropout": 0.1}, TypeError, "dropout"),
    "out= of attention": ({"return_lse": True}, TypeError, "return_lse"),
    "negative window": ({"window": (-1, 0)}, ValueError, "window.*-1.*0"),
    "num_threads of 0": ({"num_threads": 0}, ValueError, "num_threads.*0.*1"),
}


@pytest.mark.parametrize("case", [*SHARED, *BACKWARD])
def test_attention_backward(case: str) -> None:
    change, exception, message = (SHARED | BACKWARD)[case]
    with pytest.raises(exception, match=message):
        untyped.attention_backward(**{**GOOD_BACKWARD, **change})


def test_good_calls_are_good() -> None:
    """What the tables change is what is wrong."""
    given: dict[str, Any] = {
        "relative_bias": relative(H, 32),
        "alibi": zeros(H),
        "bias": (zeros(S, K),),
        "dropout_p": 0.5,
        "seed": 2**64 - 1,
        "d_lse": zeros(B, H, S),
    }
    made = untyped.attention_backward(**GOOD_BACKWARD, **given)
    assert made.bias[0].shape == (S, K)
    assert len(SHARED) + len(BACKWARD) >= 25


def test_nothing_is_written_before_everything_is_checked() -> None:
    d_query, d_value = (np.full(a.shape, 7, np.float32) for a in (Q, VALUE))
    wrong = into(query=d_query, value=d_value, key=zeros(B, HK, K, DV))
    with pytest.raises(ValueError, match="key"):
        untyped.attention_backward(**GOOD_BACKWARD, into=wrong)
    for change in ({"lse": zeros(B, H, S + 1)}, {"dropout_p": 2.0}, {"window": (-1, 0)}):
        targets = into(query=d_query, value=d_value)
        with pytest.raises(ValueError, match=next(iter(change))):
            untyped.attention_backward(**{**GOOD_BACKWARD, "into": targets, **change})
    assert (d_query == 7).all()
    assert (d_value == 7).all()


@pytest.mark.skipif(BFLOAT16 is None, reason="bfloat16 needs the package ml_dtypes")
def test_lse_of_low_precision_is_float32() -> None:
    low: dict[str, Any] = {n: a.astype(BFLOAT16) for n, a in GOOD_BACKWARD.items() if n != "lse"}
    assert untyped.attention_backward(**low, lse=LSE).query.dtype == BFLOAT16
    with pytest.raises(TypeError, match=r"lse.*bfloat16.*float32"):
        untyped.attention_backward(**low, lse=LSE.astype(BFLOAT16))


def test_names_come_first() -> None:
    """A message begins with the argument."""
    for change, exception, message in [*SHARED.values(), *BACKWARD.values()]:
        with pytest.raises(exception) as caught:
            untyped.attention_backward(**{**GOOD_BACKWARD, **change})
        text = str(caught.value)
        assert re.match(r"[a-z_]+(\(\)|:)", text), f"{text} (wanted {message})"


def test_nothing_wanted() -> None:
    assert untyped.attention_backward(**GOOD_BACKWARD, wanted=[]) == into()
