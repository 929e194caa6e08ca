"""Bad input: what attention raises; the message names the argument, what came, what is accepted."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import attncore
from kit import zeros
from reference import Array

B, H, HK, S, K, D, DV = 2, 4, 2, 5, 7, 8, 6


def ints(*shape: int, dtype: Any = np.int64) -> Array:
    return np.zeros(shape, dtype)


Q, KEY, VALUE = zeros(B, H, S, D), zeros(B, HK, K, D), zeros(B, HK, K, DV)
GOOD: dict[str, Any] = {"query": Q, "key": KEY, "value": VALUE}
FLOATS = "float32.*float64.*float16.*bfloat16"
NAN = float("nan")

# name: (what differs from a good call, exception, message)
ATTENTION: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    # dtypes and types
    "integer query": (
        {"query": ints(B, H, S, D, dtype=np.int32)},
        TypeError,
        f"query.*int32.*{FLOATS}",
    ),
    "bool query": ({"query": zeros(B, H, S, D, dtype=bool)}, TypeError, f"query.*bool.*{FLOATS}"),
    "complex query": (
        {"query": zeros(B, H, S, D, dtype=complex)},
        TypeError,
        "query.*complex128.*float32",
    ),
    "big-endian query": (
        {"query": zeros(B, H, S, D, dtype=">f4")},
        TypeError,
        "query.*(>f4|big-endian).*float32",
    ),
    "object query": (
        {"query": zeros(B, H, S, D, dtype=object)},
        TypeError,
        "query.*object.*float32",
    ),
    "list as query": ({"query": [[1.0]]}, TypeError, "query.*array.*list"),
    "None as key": ({"key": None}, TypeError, "key.*array.*None"),
    "key of another dtype": (
        {"key": zeros(B, HK, K, D, dtype=float)},
        TypeError,
        "key.*float64.*float32",
    ),
    "value of another dtype": (
        {"value": zeros(B, HK, K, DV, dtype=np.float64)},
        TypeError,
        "value.*float64.*float32",
    ),
    # shapes
    "scalar query": ({"query": zeros()}, ValueError, r"query.*(\(\)|0)"),
    "1-D query": ({"query": zeros(D)}, ValueError, r"query.*(1|\(8,\))"),
    "5-D query": ({"query": zeros(1, B, H, S, D)}, ValueError, r"query.*(5|\(1, 2, 4, 5, 8\))"),
    "3-D key": ({"key": zeros(HK, K, D)}, ValueError, "key.*(3|4)"),
    "2-D value": ({"value": zeros(K, DV)}, ValueError, "value.*(2|4)"),
    "key of another batch": (
        {"key": zeros(3, HK, K, D)},
        ValueError,
        r"key.*\(3, 2, 7, 8\).*\(2, 2, 7, 8\)",
    ),
    "key of another dim": (
        {"key": zeros(B, HK, K, 9)},
        ValueError,
        r"key.*\(2, 2, 7, 9\).*\(2, 2, 7, 8\)",
    ),
    "value of another batch": (
        {"value": zeros(1, HK, K, DV)},
        ValueError,
        r"value.*\(1, 2, 7, 6\)",
    ),
    "value of other heads": ({"value": zeros(B, 4, K, DV)}, ValueError, r"value.*\(2, 4, 7, 6\)"),
    "value of other tokens": ({"value": zeros(B, HK, 8, DV)}, ValueError, r"value.*\(2, 2, 8, 6\)"),
    "heads no multiple": (
        {"key": zeros(B, 3, K, D), "value": zeros(B, 3, K, DV)},
        ValueError,
        "key.*3.*4.*multiple",
    ),
    "more key heads": (
        {"key": zeros(B, 8, K, D), "value": zeros(B, 8, K, DV)},
        ValueError,
        "key.*8.*4",
    ),
    "no dim": ({"query": zeros(B, H, S, 0), "key": zeros(B, HK, K, 0)}, ValueError, "query.*0.*1"),
    "no value dim": ({"value": zeros(B, HK, K, 0)}, ValueError, "value.*0.*1"),
    # scalars
    "scale of NaN": ({"scale": NAN}, ValueError, "scale.*nan.*finite"),
    "infinite scale": ({"scale": float("inf")}, ValueError, "scale.*inf.*finite"),
    "scale of text": ({"scale": "1"}, TypeError, "scale.*str"),
    "softcap of 0": ({"softcap": 0.0}, ValueError, "softcap.*0.*greater than 0"),
    "negative softcap": ({"softcap": -2.0}, ValueError, "softcap.*-2.*greater than 0"),
    "softcap of NaN": ({"softcap": NAN}, ValueError, "softcap.*nan"),
    "infinite softcap": ({"softcap": float("inf")}, ValueError, "softcap.*inf"),
    "softcap of a list": ({"softcap": [1.0]}, TypeError, "softcap.*list"),
    "causal of text": ({"causal": "yes"}, TypeError, "causal.*bool.*str"),
    "layout": ({"layout": "sbhd"}, ValueError, "layout.*sbhd.*bhsd.*bshd"),
    "layout of a number": ({"layout": 3}, TypeError, "layout.*int"),
    "num_threads of 0": ({"num_threads": 0}, ValueError, "num_threads.*0.*1"),
    "negative num_threads": ({"num_threads": -1}, ValueError, "num_threads.*-1.*1"),
    "num_threads of a float": ({"num_threads": 1.5}, TypeError, "num_threads.*float"),
    # window and position
    "negative window": ({"window": (-1, 0)}, ValueError, "window.*-1.*0"),
    "negative right window": ({"window": (None, -3)}, ValueError, "window.*-3.*0"),
    "window of one": ({"window": (1,)}, ValueError, "window.*left, right"),
    "window of three": ({"window": (1, 2, 3)}, ValueError, "window.*left, right"),
    "window of an int": ({"window": 5}, TypeError, "window.*left, right.*int"),
    "window of floats": ({"window": (1.5, 0)}, TypeError, "window.*int.*float"),
    "offset of a float": ({"query_offset": 1.5}, TypeError, "query_offset.*float.*int"),
    "offset of floats": ({"query_offset": zeros(B)}, TypeError, "query_offset.*float32.*int"),
    "far offset": ({"query_offset": 2**60 + 1}, ValueError, "query_offset.*1152921504606846977"),
    "offset far before": (
        {"query_offset": [0, -(2**62)]},
        ValueError,
        "query_offset.*-4611686018427387904",
    ),
    "too many offsets": ({"query_offset": ints(3)}, ValueError, "query_offset.*3.*2"),
    # lengths
    "negative key length": ({"key_lengths": [3, -1]}, ValueError, "key_lengths.*-1.*0.*7"),
    "key length too large": ({"key_lengths": [8, 2]}, ValueError, "key_lengths.*8.*7"),
    "query length too large": ({"query_lengths": [0, 6]}, ValueError, "query_lengths.*6.*5"),
    "key lengths of floats": ({"key_lengths": zeros(B)}, TypeError, "key_lengths.*float32.*int"),
    "key lengths of bools": (
        {"key_lengths": zeros(B, dtype=bool)},
        TypeError,
        "key_lengths.*bool.*int",
    ),
    "too few key lengths": (
        {"key_lengths": [3]},
        ValueError,
        r"key_lengths.*\(1,\), must be \(2,\) \(batch\)",
    ),
    "query lengths of two axes": (
        {"query_lengths": ints(B, 1)},
        ValueError,
        r"query_lengths.*(2 dimensions|\(2, 1\))",
    ),
    # mask and bias
    "mask of floats": ({"mask": zeros(S, K)}, TypeError, "mask.*float32.*bool"),
    "mask of ints": ({"mask": ints(S, K)}, TypeError, "mask.*int64.*bool"),
    "mask of uint8": ({"mask": ints(S, K, dtype=np.uint8)}, TypeError, "mask.*uint8.*bool"),
    "mask of text": ({"mask": ["x"]}, TypeError, "mask.*bool"),
    "mask that does not broadcast": (
        {"mask": np.ones((S, K - 1), bool)},
        ValueError,
        r"mask.*5, 6\).*\(2, 4, 5, 7\)",
    ),
    "mask of key heads": (
        {"mask": np.ones((B, HK, S, K), bool)},
        ValueError,
        r"mask.*\(2, 2, 5, 7\).*\(2, 4, 5, 7\)",
    ),
    "mask of five axes": (
        {"mask": np.ones((1, 1, 1, 1, 1), bool)},
        ValueError,
        "mask.*(5|1, 1, 1, 1, 1)",
    ),
    "bias of ints": ({"bias": ints(S, K)}, TypeError, "bias.*int64, accepted is float32$"),
    "bias of bools": ({"bias": np.ones((S, K), bool)}, TypeError, "bias.*bool.*float32"),
    "bias of float64": ({"bias": zeros(S, K, dtype=float)}, TypeError, "bias.*float64.*float32"),
    "bias of float16": (
        {"bias": zeros(S, K, dtype=np.float16)},
        TypeError,
        "bias.*float16.*float32",
    ),
    "bias that does not broadcast": (
        {"bias": zeros(3, S, K)},
        ValueError,
        r"bias.*3, 5, 7\).*\(2, 4, 5, 7\)",
    ),
    "second bias": (
        {"bias": (zeros(S, K), zeros(S, 2))},
        ValueError,
        r"bias.*5, 2\).*\(2, 4, 5, 7\)",
    ),
    "nine biases": ({"bias": (zeros(1),) * 9}, ValueError, "bias.*9.*8"),
    "bias of text": ({"bias": "x"}, TypeError, "bias.*(str|U1)"),
    # parameters of heads and tokens
    "alibi of other heads": ({"alibi": zeros(3)}, ValueError, "alibi.*3.*4"),
    "alibi of other batch": ({"alibi": zeros(3, H)}, ValueError, "alibi.*3.*2"),
    "alibi of three axes": ({"alibi": zeros(1, B, H)}, ValueError, r"alibi.*(3|\(1, 2, 4\))"),
    "alibi of float64": ({"alibi": zeros(H, dtype=float)}, TypeError, "alibi.*float64.*float32"),
    "sinks of other heads": ({"sinks": zeros(HK)}, ValueError, "sinks.*2.*4"),
    "sinks of two axes": ({"sinks": zeros(B, H)}, ValueError, r"sinks.*(2 dimensions|\(2, 4\))"),
    "sinks of ints": ({"sinks": ints(H)}, TypeError, "sinks.*int64.*float32"),
    "only query_segments": (
        {"query_segments": ints(B, S)},
        ValueError,
        "key_segments.*query_segments",
    ),
    "only key_segments": ({"key_segments": ints(B, K)}, ValueError, "query_segments.*key_segments"),
    "segments of another shape": (
        {"query_segments": ints(B, S + 1), "key_segments": ints(B, K)},
        ValueError,
        "query_segments.*6.*5",
    ),
    "key segments of another shape": (
        {"query_segments": ints(B, S), "key_segments": ints(3, K)},
        ValueError,
        "key_segments.*3.*2",
    ),
    "segments of floats": (
        {"query_segments": zeros(B, S), "key_segments": ints(B, K)},
        TypeError,
        "query_segments.*float32.*int",
    ),
    # out
    "out of a list": ({"out": [1.0]}, TypeError, "out.*list"),
    "out of another dtype": (
        {"out": zeros(B, H, S, DV, dtype=float)},
        TypeError,
        "out.*float64.*float32",
    ),
    "out of another shape": (
        {"out": zeros(B, H, S, D)},
        ValueError,
        r"out.*\(2, 4, 5, 8\).*\(2, 4, 5, 6\)",
    ),
    "out of another rank": ({"out": zeros(H, S, DV)}, ValueError, "out.*(3|4)"),
    "no option": ({"dropout": 0.1}, TypeError, "dropout"),
}


@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case: str) -> None:
    change, exception, message = ATTENTION[case]
    out = np.full((B, H, S, DV), 7, np.float32)
    with pytest.raises(exception, match=message) as caught:
        attncore.attention(**{**GOOD, "out": out, **change})
    assert type(caught.value) is exception
    assert re.search(rf"\b{message.split('.*')[0]}\b", str(caught.value).split(",")[0])
    assert (out == 7).all(), "out= was touched before everything was checked"


@pytest.mark.parametrize("function", [attncore.attention_weights, attncore.explain])
@pytest.mark.parametrize(
    "case", [name for name, (change, *_) in ATTENTION.items() if not {"out", "value"} & {*change}]
)
def test_the_same_options_elsewhere(function: Any, case: str) -> None:
    change, exception, message = ATTENTION[case]
    call = {**GOOD, **change}
    if function is attncore.attention_weights:
        del call["value"]
    with pytest.raises(exception, match=message):
        function(**call)


def test_there_are_enough_rows() -> None:
    assert len(ATTENTION) >= 45


def test_options_are_keywords() -> None:
    with pytest.raises(TypeError):
        attncore.attention(Q, KEY, VALUE, True)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="value"):
        attncore.attention(Q, KEY)  # type: ignore[call-overload]
