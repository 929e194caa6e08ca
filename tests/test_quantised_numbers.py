"""Every number that a storage dtype has is what it should be, as a key and as a value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import dtype_of
from kit_quantised import FLOAT8, STORED, restore
from reference import Array


def codes(name: str) -> Array:
    """Every number of a dtype, as it is stored: (numbers, 1), of int4 (bytes, 1)."""
    if name in ("float16", "bfloat16"):
        return np.arange(2**16, dtype=np.uint16).view(dtype_of(name))[:, None]
    every = np.arange(256, dtype=np.uint8)[:, None]
    return every if name == "int4" else every.view(FLOAT8 if name == "float8_e4m3fn" else np.int8)


@pytest.mark.parametrize("rows", [1, 2, 3, 9])
@pytest.mark.parametrize("name", STORED[1:])
def test_every_number_as_a_value(isa: str, name: str, rows: int, rng: Any) -> None:
    """The out of a single key is its value."""
    for dim in (1, 64):
        stored = codes(name).reshape(-1, 1, 1, dim)
        expected = restore(stored) if name == "int4" else stored.astype(np.float32)
        pages = len(stored)
        query = rng.standard_normal((pages, 1, rows, 2)).astype(np.float32)
        key = rng.standard_normal((pages, 1, 1, 2)).astype(np.float32)
        table = np.arange(pages)[:, None]
        out = attncore.attention_paged(query, key, stored, table, np.ones(pages, int))
        expected = np.broadcast_to(expected, out.shape)
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(out, expected)
        assert not np.signbit(out[out == 0]).any()  # the sign of a zero is not kept


@pytest.mark.parametrize("rows", [1, 2, 3, 9])
@pytest.mark.parametrize("name", STORED[1:])
def test_every_number_as_a_key(isa: str, name: str, rows: int, rng: Any) -> None:
    """The lse of a single key is its score."""
    for dim in (1, 64):
        stored = codes(name).reshape(-1, 1, 1, dim)
        whole = restore(stored)
        pages, width = len(stored), whole.shape[3]
        value = np.zeros((pages, 1, 1, 1), np.float32)
        table, lengths = np.arange(pages)[:, None], np.ones(pages, int)
        for at in range(width):
            query = np.zeros((pages, 1, rows, width), np.float32)
            query[..., at] = 1
            _, lse = attncore.attention_paged(
                query, stored, value, table, lengths, scale=1, return_lse=True
            )
            expected = np.broadcast_to(whole[:, :, 0, at, None], lse.shape)
            clean = np.all(np.isfinite(whole), axis=(1, 2, 3))  # 0 · NaN is NaN
            np.testing.assert_array_equal(lse[clean], expected[clean])
