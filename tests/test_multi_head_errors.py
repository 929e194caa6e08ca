"""MultiHeadAttention: what bad input raises; the message names the argument, what came, what is accepted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import zeros

# name: (arguments beside embed_dim=16, num_heads=4), exception, message
SETTINGS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "embed_dim of 0": ({"embed_dim": 0}, ValueError, "embed_dim.*0.*1"),
    "negative num_heads": ({"num_heads": -4}, ValueError, "num_heads.*-4.*1"),
    "heads that do not divide": ({"num_heads": 3}, ValueError, "num_heads.*3.*embed_dim.*16"),
    "num_heads of a float": ({"num_heads": 2.0}, TypeError, "num_heads.*int.*float"),
    "kv heads that do not divide": (
        {"num_kv_heads": 3},
        ValueError,
        "num_kv_heads.*3.*num_heads.*4",
    ),
    "num_kv_heads of 0": ({"num_kv_heads": 0}, ValueError, "num_kv_heads.*0.*1"),
    "key_dim of 0": ({"key_dim": 0}, ValueError, "key_dim.*0.*1"),
    "value_dim of text": ({"value_dim": "9"}, TypeError, "value_dim.*int.*str"),
    "head_dim of 0": ({"head_dim": 0}, ValueError, "head_dim.*0.*1"),
    "far too wide": ({"head_dim": 2**40}, ValueError, "head_dim.*1099511627776.*16777216"),
    "far too wide together": ({"head_dim": 2**23}, ValueError, "head_dim.*33554432.*16777216"),
    "bias of an int": ({"bias": 1}, TypeError, "bias.*bool.*int"),
    "add_bias_kv of None": ({"add_bias_kv": None}, TypeError, "add_bias_kv.*bool.*None"),
    "rotary of a number": ({"rotary": 10000.0}, TypeError, "rotary.*Rotary.*float"),
    "rotary of odd dims": (
        {"rotary": attncore.Rotary(dims=3)},
        ValueError,
        "dims: is 3, must be even.*4",
    ),
    "rotary of many dims": (
        {"rotary": attncore.Rotary(dims=6)},
        ValueError,
        "dims: is 6.*at most 4",
    ),
    "rotary of an odd head": (
        {"rotary": True, "head_dim": 5},
        ValueError,
        "dims: is 5, all of a head's, must be even",
    ),
    "rotary of base 0": ({"rotary": attncore.Rotary(base=0.0)}, ValueError, "base: is 0"),
    "negative qk_norm": ({"qk_norm": -1.0}, ValueError, "qk_norm.*-1.*0"),
    "qk_norm of NaN": ({"qk_norm": float("nan")}, ValueError, "qk_norm.*nan.*finite"),
    "dtype of ints": ({"dtype": np.int32}, TypeError, "dtype.*int32.*float32"),
    "big-endian dtype": ({"dtype": ">f4"}, TypeError, "dtype.*>f4.*float32"),
    "negative seed": ({"seed": -1}, ValueError, "seed.*-1.*0"),
    "seed of a float": ({"seed": 0.5}, TypeError, "seed.*int.*float"),
    "batch_first of text": ({"batch_first": "no"}, TypeError, "batch_first.*bool.*str"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(case: str) -> None:
    given, exception, message = SETTINGS[case]
    with pytest.raises(exception, match=message):
        attncore.MultiHeadAttention(**({"embed_dim": 16, "num_heads": 4} | given))


X, CONTEXT = zeros(2, 5, 16), zeros(2, 7, 16)
PLAIN: dict[str, Any] = {}
NARROW = {"key_dim": 6, "value_dim": 9}
ROTARY = {"rotary": True}

# name: (settings, arguments of the call, exception, message)
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "list as x": (PLAIN, {"x": [[0.0]]}, TypeError, "x: .*array.*list"),
    "1-D x": (PLAIN, {"x": zeros(16)}, ValueError, "x: .*1.*2 or 3"),
    "4-D x": (PLAIN, {"x": zeros(1, 2, 5, 16)}, ValueError, "x: .*4.*2 or 3"),
    "x of float64": (PLAIN, {"x": zeros(2, 5, 16, dtype=float)}, TypeError, "x: .*float64.*32"),
    "x of ints": (PLAIN, {"x": zeros(2, 5, 16, dtype=np.int64)}, TypeError, "x: .*int64.*float32"),
    "x too wide": (PLAIN, {"x": zeros(2, 5, 17)}, ValueError, r"x: .*17\).*16\)"),
    "context of another rank": (PLAIN, {"context": zeros(7, 16)}, ValueError, "context: .*2.*3"),
    "context of another batch": (
        PLAIN,
        {"context": zeros(3, 7, 16)},
        ValueError,
        r"context: .*\(3, 7, 16\).*\(2, 7, 16\)",
    ),
    "context of another width": (
        PLAIN,
        {"context": zeros(2, 7, 6)},
        ValueError,
        r"context: .*\(2, 7, 6\).*\(2, 7, 16\)",
    ),
    "context of another dtype": (
        PLAIN,
        {"context": zeros(2, 7, 16, dtype=np.float16)},
        TypeError,
        "context: .*float16.*float32",
    ),
    "no context": (NARROW, {}, ValueError, "context: is not given.*6 and 9.*16"),
    "no value context": (
        NARROW,
        {"context": zeros(2, 7, 6)},
        ValueError,
        "value_context: is not given.*9.*6",
    ),
    "value context alone": (
        PLAIN,
        {"value_context": CONTEXT},
        ValueError,
        "value_context.*context",
    ),
    "value context of other tokens": (
        PLAIN,
        {"context": CONTEXT, "value_context": zeros(2, 8, 16)},
        ValueError,
        r"value_context: .*8, 16\).*7, 16\)",
    ),
    "positions without rotary": (PLAIN, {"positions": [0]}, ValueError, "positions.*rotary"),
    "positions of floats": (ROTARY, {"positions": zeros(5)}, TypeError, "positions.*float32.*int"),
    "too few positions": (
        ROTARY,
        {"positions": [0, 1]},
        ValueError,
        r"positions.*\(1, 2\).*\(1, 5\)",
    ),
    "key positions alone": (
        ROTARY,
        {"key_positions": [0] * 5},
        ValueError,
        "key_positions.*context",
    ),
    "mask of the context": (
        PLAIN,
        {"mask": np.ones((5, 7), bool)},
        ValueError,
        r"mask: .*5, 7\).*5, 5\)",
    ),
    "mask of floats": (PLAIN, {"mask": zeros(5, 5)}, TypeError, "mask: .*float32.*bool"),
    "bias of other heads": (
        PLAIN,
        {"bias": zeros(3, 5, 5)},
        ValueError,
        r"bias: .*3, 5, 5\).*4, 5",
    ),
    "key lengths": (PLAIN, {"key_lengths": [3, 6]}, ValueError, "key_lengths: .*6.*0.*5"),
    "dropout of 1": (PLAIN, {"dropout_p": 1.0}, ValueError, "dropout_p.*1"),
    "layout": (PLAIN, {"layout": "bshd"}, TypeError, "unexpected.*layout"),
    "no option": (PLAIN, {"is_causal": True}, TypeError, "unexpected.*is_causal"),
    "need_weights": (PLAIN, {"need_weights": "all"}, ValueError, "need_weights.*all.*average"),
    "num_threads": (PLAIN, {"num_threads": 0}, ValueError, "num_threads.*0.*1"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls(case: str) -> None:
    settings, given, exception, message = CALLS[case]
    layer = attncore.MultiHeadAttention(16, 4, **settings)
    with pytest.raises(exception, match=message):
        layer(**({"x": X} | given))


BACKWARD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "list as d_y": ({"d_y": [1.0]}, TypeError, "d_y: .*array.*list"),
    "d_y of another rank": ({"d_y": zeros(5, 16)}, ValueError, "d_y: .*2.*3"),
    "d_y of another shape": ({"d_y": zeros(2, 6, 16)}, ValueError, r"d_y: .*6, 16\).*5, 16\)"),
    "d_y of another dtype": ({"d_y": zeros(2, 5, 16, dtype=float)}, TypeError, "d_y: .*64.*32"),
    "wanted": ({"wanted": ["y"]}, ValueError, "wanted: .*'y'.*x, context, value_context"),
    "wanted that is not there": ({"wanted": ["bias"]}, ValueError, "wanted: .*'bias'"),
    "wanted of text": ({"wanted": "x"}, TypeError, "wanted: .*collection.*str"),
    "accumulate": ({"accumulate": 1}, TypeError, "accumulate: .*bool.*int"),
    "num_threads": ({"num_threads": -1}, ValueError, "num_threads: .*-1.*1"),
}


@pytest.mark.parametrize("case", BACKWARD)
def test_backward(case: str) -> None:
    """What is wrong is found before any work: gradients stay as they were."""
    given, exception, message = BACKWARD[case]
    layer = attncore.MultiHeadAttention(16, 4)
    layer(X, CONTEXT)
    for gradient in layer.gradients.values():
        gradient[...] = 3
    with pytest.raises(exception, match=message):
        layer.backward(**({"d_y": X} | given))
    assert all((gradient == 3).all() for gradient in layer.gradients.values())
