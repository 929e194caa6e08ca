"""Bad input: what linear and linear_backward raise."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import attncore
from attncore import LinearGradients

X, W, BIAS = np.zeros((6, 5), np.float32), np.zeros((4, 5), np.float32), np.zeros(4, np.float32)
READ_ONLY = np.zeros((6, 4), np.float32)
READ_ONLY.flags.writeable = False
SHARED = np.zeros((6, 9), np.float32)
FLOATS = "float32.*float64.*float16.*bfloat16"

# name: (what differs from a good call, exception, message)
LINEAR: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "list as x": ({"x": [[1.0]]}, TypeError, "x.*array.*list"),
    "integer x": ({"x": X.astype(int)}, TypeError, f"x.*int64.*{FLOATS}"),
    "big-endian x": ({"x": X.astype(">f4")}, TypeError, "x.*>f4.*float32"),
    "scalar x": ({"x": np.zeros((), np.float32)}, ValueError, "x.*scalar"),
    "x of other features": ({"x": X[:, :3]}, ValueError, r"weight.*\(4, 5\).*\(4, 3\)"),
    "masked x": ({"x": np.ma.masked_array(X, X == 0)}, TypeError, "x.*masked"),
    "1-D weight": ({"weight": W[0]}, ValueError, "weight.*1 dim.*2"),
    "3-D weight": ({"weight": W[None]}, ValueError, "weight.*3 dim.*2"),
    "weight of another dtype": ({"weight": W.astype(float)}, TypeError, "weight.*float64.*float32"),
    "None as weight": ({"weight": None}, TypeError, "weight.*array.*None"),
    "bias of another length": ({"bias": BIAS[:3]}, ValueError, r"bias.*\(3,\).*\(4,\)"),
    "bias of another dtype": ({"bias": BIAS.astype(float)}, TypeError, "bias.*float64.*float32"),
    "2-D bias": ({"bias": BIAS[None]}, ValueError, "bias.*2 dim.*1"),
    "out of another shape": ({"out": np.zeros((6, 5), np.float32)}, ValueError, r"out.*5.*4"),
    "out of other rows": (
        {"out": np.zeros((7, 4), np.float32)},
        ValueError,
        r"out.*\(7, 4\).*\(6, 5\)",
    ),
    "out of another dtype": ({"out": np.zeros((6, 4))}, TypeError, "out.*float64.*float32"),
    "read-only out": ({"out": READ_ONLY}, ValueError, "out.*read-only"),
    "out overlaps x": ({"x": SHARED[:, :5], "out": SHARED[:, 4:8]}, ValueError, "out.*overlaps x"),
    "out overlaps itself": (
        {"out": np.lib.stride_tricks.as_strided(np.zeros(9, np.float32), (6, 4), (4, 4))},
        ValueError,
        "out.*overlap",
    ),
    "no threads": ({"num_threads": 0}, ValueError, "num_threads.*0.*1"),
    "half a thread": ({"num_threads": 0.5}, TypeError, "num_threads.*float"),
}


@pytest.mark.parametrize("name", list(LINEAR))
def test_bad_linear(name: str) -> None:
    changes, kind, message = LINEAR[name]
    good = {"x": X, "weight": W, "bias": BIAS}
    with pytest.raises(kind, match=re.compile(message, re.DOTALL)):
        attncore.linear(**{**good, **changes})


D_Y = np.zeros((6, 4), np.float32)
NONE = LinearGradients(None, None, None)
BACKWARD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "d_y of other features": ({"d_y": D_Y[:, :3]}, ValueError, "d_y.*3.*4"),
    "d_y of other rows": ({"d_y": D_Y[:5]}, ValueError, r"d_y.*\(5, 4\).*\(6, 5\)"),
    "d_y of another rank": ({"d_y": D_Y[None]}, ValueError, r"d_y.*\(1, 6, 4\).*\(6, 5\)"),
    "d_y of another dtype": ({"d_y": D_Y.astype(float)}, TypeError, "d_y.*float64.*float32"),
    "wanted is unknown": ({"wanted": ["query"]}, ValueError, "wanted.*query.*x, weight, bias"),
    "into is a tuple": ({"into": (None, None, None)}, TypeError, "into.*LinearGradients.*tuple"),
    "into what is not wanted": (
        {"wanted": ["x"], "into": NONE._replace(bias=BIAS)},
        ValueError,
        "into.*bias.*not wanted",
    ),
    "into of another shape": (
        {"into": NONE._replace(weight=np.zeros((5, 4), np.float32))},
        ValueError,
        r"d_weight.*5, 4\).*4, 5\)",
    ),
    "into overlaps x": ({"into": NONE._replace(x=X)}, ValueError, "d_x.*overlaps x"),
    "into overlaps into": (
        {"into": LinearGradients(None, SHARED.reshape(-1)[:20].reshape(4, 5), SHARED[2, :4])},
        ValueError,
        "d_bias.*overlaps d_weight",
    ),
}


@pytest.mark.parametrize("name", list(BACKWARD))
def test_bad_backward(name: str) -> None:
    changes, kind, message = BACKWARD[name]
    good = {"d_y": D_Y, "x": X, "weight": W}
    with pytest.raises(kind, match=re.compile(message, re.DOTALL)):
        attncore.linear_backward(**{**good, **changes})


def test_an_out_that_needs_three_strides() -> None:
    x = np.zeros((2, 3, 4, 5), np.float32)
    out = np.zeros((4, 3, 2, 4), np.float32).transpose(2, 1, 0, 3)
    with pytest.raises(ValueError, match="out: its leading axes"):
        attncore.linear(x, W, out=out)
