"""Bad dtypes of stored keys and values, and bad scales: the message names the argument."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kit import zeros
from test_errors import FLOATS
from test_errors_paged import DV, HK, PAGES, SIZE, B, D, H, S, refuse

ml_dtypes = pytest.importorskip("ml_dtypes")

SCALE = np.ones((PAGES, SIZE, HK), np.float32)

# name: (what differs from a good call, exception, message)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    # storage
    "integer pages": (
        {"key_pages": zeros(PAGES, SIZE, HK, D, dtype=np.int32)},
        TypeError,
        f"key_pages.*int32.*{FLOATS}.*int8.*float8_e4m3fn.*uint8",
    ),
    "pages of bools": (
        {"value_pages": zeros(PAGES, SIZE, HK, DV, dtype=bool)},
        TypeError,
        "value_pages.*bool.*int8",
    ),
    "big-endian pages": (
        {"key_pages": zeros(PAGES, SIZE, HK, D, dtype=">f4")},
        TypeError,
        "key_pages.*>f4.*float32",
    ),
    "complex pages": (
        {"key_pages": zeros(PAGES, SIZE, HK, D, dtype=complex)},
        TypeError,
        "key_pages.*complex128",
    ),
    "another float8": (
        {"key_pages": zeros(PAGES, SIZE, HK, D, dtype=ml_dtypes.float8_e5m2)},
        TypeError,
        "key_pages.*float8_e5m2.*float8_e4m3fn",
    ),
    "ml_dtypes' int4": (
        {"key_pages": zeros(PAGES, SIZE, HK, D, dtype=ml_dtypes.int4)},
        TypeError,
        "key_pages.*int4.*uint8 for int4",
    ),
    "float64 pages": (
        {"key_pages": zeros(PAGES, SIZE, HK, D, dtype=float)},
        TypeError,
        "key_pages.*float64.*float32",
    ),
    "float64 queries and other pages": (
        {"query": zeros(B, H, S, D, dtype=float), "out": None},
        TypeError,
        "key_pages.*float32.*float64, as query's",
    ),
    "float64 queries and int8": (
        {
            "query": zeros(B, H, S, D, dtype=float),
            "out": None,
            "key_pages": zeros(PAGES, SIZE, HK, D, dtype=np.int8),
        },
        TypeError,
        "key_pages.*int8.*float64, as query's",
    ),
    "an odd dim of int4": (
        {"query": zeros(B, H, S, 7), "key_pages": zeros(PAGES, SIZE, HK, 4, dtype=np.uint8)},
        ValueError,
        r"key_pages.*\(5, 2, 4, 8\).*\(5, 2, 4, 7\)",
    ),
    "int4 with gaps": (
        {"value_pages": zeros(PAGES, SIZE, HK, 6, dtype=np.uint8)[..., ::2]},
        ValueError,
        "value_pages.*stride of 2.*int4.*without gaps",
    ),
    "int4 of two bytes with a gap": (
        {
            "query": zeros(B, H, S, 4),
            "key_pages": zeros(PAGES, SIZE, HK, 4, dtype=np.uint8)[..., ::2],
        },
        ValueError,
        "key_pages.*stride of 2.*int4.*without gaps",
    ),
    # scales
    "scales of another shape": (
        {"key_scale": SCALE[:, :3]},
        ValueError,
        r"key_scale.*\(5, 2, 3\).*\(5, 2, 4\)",
    ),
    "scales of two axes": (
        {"value_scale": SCALE[..., 0]},
        ValueError,
        "value_scale.*2 dimensions.*3: .page, slot, head",
    ),
    "scales of float64": (
        {"value_scale": SCALE.astype(float)},
        TypeError,
        "value_scale.*float64.*float32",
    ),
    "scales of ints": ({"key_scale": SCALE.astype(int)}, TypeError, "key_scale.*int64.*float32"),
    "a number as scale": ({"key_scale": 0.5}, TypeError, "key_scale.*array.*float"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    refuse(*BAD[case])
