"""Bad input: dropout and relative biases, of attention and by themselves; the message names the argument."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import zeros
from test_errors import DV, GOOD, HK, NAN, B, H, S

untyped: Any = attncore  # what the type checker would not let through


def relative(*shape: int, dtype: Any = np.float32, **others: Any) -> Any:
    return untyped.RelativeBias(zeros(*shape, dtype=dtype), **others)


# name: (what differs from a good call, exception, message), of attention and of attention_backward
SHARED: dict[str, tuple[dict[str, Any], Any, str]] = {
    "dropout of 1": ({"dropout_p": 1.0}, ValueError, "dropout_p.*1.*less than 1"),
    "dropout beyond 1": ({"dropout_p": 1.5}, ValueError, "dropout_p.*1.5.*less than 1"),
    "negative dropout": ({"dropout_p": -0.1}, ValueError, "dropout_p.*-0.1.*0"),
    "dropout of NaN": ({"dropout_p": NAN}, ValueError, "dropout_p.*nan"),
    "dropout of text": ({"dropout_p": "0.1"}, TypeError, "dropout_p.*str"),
    "dropout of a list": ({"dropout_p": [0.1]}, TypeError, "dropout_p.*list"),
    "negative seed": ({"dropout_p": 0.1, "seed": -1}, ValueError, "seed.*-1.*0"),
    "seed too large": (
        {"dropout_p": 0.1, "seed": 2**64},
        ValueError,
        r"seed.*18446744073709551616",
    ),
    "seed of a float": ({"dropout_p": 0.1, "seed": 1.5}, TypeError, "seed.*int.*float"),
    "seed of None": ({"dropout_p": 0.1, "seed": None}, TypeError, "seed.*int.*None"),
    "bad seed without dropout": ({"seed": -3}, ValueError, "seed.*-3"),
    "relative bias of an array": ({"relative_bias": zeros(H, 8)}, TypeError, "relative_bias"),
    "table of other heads": (
        {"relative_bias": relative(HK, 32)},
        ValueError,
        r"relative_bias.*2.*4",
    ),
    "table of one axis": ({"relative_bias": relative(32)}, ValueError, "relative_bias.*1.*2"),
    "table of three axes": (
        {"relative_bias": relative(1, H, 32)},
        ValueError,
        "relative_bias.*3.*2",
    ),
    "table of ints": (
        {"relative_bias": relative(H, 32, dtype=np.int64)},
        TypeError,
        "relative_bias.*int64.*float32",
    ),
    "table of float64": (
        {"relative_bias": relative(H, 32, dtype=float)},
        TypeError,
        "relative_bias.*float64.*float32",
    ),
    "no buckets": ({"relative_bias": relative(H, 0)}, ValueError, "relative_bias.*0"),
    "one bucket": (
        {"relative_bias": relative(H, 1, bidirectional=False)},
        ValueError,
        "relative_bias.*1.*2",
    ),
    "two buckets both ways": ({"relative_bias": relative(H, 2)}, ValueError, "relative_bias.*2.*4"),
    "max_distance within single buckets": (
        {"relative_bias": relative(H, 32, max_distance=8)},
        ValueError,
        "max_distance.*8.*9",
    ),
    "max_distance of the past": (
        {"relative_bias": relative(H, 32, bidirectional=False, max_distance=16)},
        ValueError,
        "max_distance.*16.*17",
    ),
    "negative max_distance": (
        {"relative_bias": relative(H, 32, max_distance=-5)},
        ValueError,
        "max_distance.*-5",
    ),
    "max_distance of a float": (
        {"relative_bias": relative(H, 32, max_distance=40.5)},
        TypeError,
        "max_distance.*float",
    ),
    "enormous max_distance": (
        {"relative_bias": relative(H, 32, max_distance=2**62)},
        ValueError,
        "max_distance.*4611686018427387904",
    ),
    "bidirectional of text": (
        {"relative_bias": relative(H, 32, bidirectional="no")},
        TypeError,
        "bidirectional.*bool.*str",
    ),
}


@pytest.mark.parametrize("case", SHARED)
def test_attention(case: str) -> None:
    change, exception, message = SHARED[case]
    out = np.full((B, H, S, DV), 7, np.float32)
    with pytest.raises(exception, match=message) as caught:
        attncore.attention(**{**GOOD, "out": out, **change})
    assert type(caught.value) is exception
    assert (out == 7).all(), "out= was touched before everything was checked"


SHAPE = (1, 2, 3, 4)
MASKS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "p of 1": ({"p": 1.0}, ValueError, r"\bp\b.*1.*less than 1"),
    "negative p": ({"p": -0.5}, ValueError, r"\bp\b.*-0.5"),
    "p of NaN": ({"p": NAN}, ValueError, r"\bp\b.*nan"),
    "p of text": ({"p": "x"}, TypeError, r"\bp\b.*str"),
    "p of a bool": ({"p": False}, TypeError, r"\bp\b.*bool"),
    "negative seed": ({"seed": -1}, ValueError, "seed.*-1"),
    "seed too large": ({"seed": 2**64}, ValueError, "seed.*18446744073709551616"),
    "seed of a float": ({"seed": 0.5}, TypeError, "seed.*float"),
    "three axes": ({"shape": (2, 3, 4)}, ValueError, r"shape.*\(2, 3, 4\).*batch, heads"),
    "five axes": ({"shape": (1, 1, 1, 1, 1)}, ValueError, "shape.*batch, heads"),
    "negative axis": ({"shape": (1, 2, -3, 4)}, ValueError, "shape.*-3"),
    "shape of floats": ({"shape": (1, 2, 3.5, 4)}, (TypeError, ValueError), "shape.*3.5"),
    "shape of an int": ({"shape": 5}, TypeError, "shape.*int"),
    "rows of floats": ({"rows": [0.5]}, TypeError, "rows.*float"),
    "rows out of range": ({"rows": [3]}, ValueError, "rows.*3"),
    "rows before the first": ({"rows": [-4]}, ValueError, "rows.*-4"),
    "rows of two axes": ({"rows": [[1]]}, ValueError, "rows"),
}


@pytest.mark.parametrize("case", MASKS)
def test_dropout_mask(case: str) -> None:
    change, exception, message = MASKS[case]
    call = {"seed": 1, "p": 0.5, "shape": SHAPE, **change}
    with pytest.raises(exception, match=message):
        untyped.dropout_mask(**call)
