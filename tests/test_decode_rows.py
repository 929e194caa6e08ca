"""1 … 17 query rows a KV head, in each form that reads keys and values where they lie, and past the last of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits, inputs
from kit_paged import into_pages
from kit_quantised import QUANTISED, STORED, make
from kit_quantised import check as check_stored

ROWS = range(1, 18)
SIZES = [(1, 1), (15, 33), (16, 16), (40, 9), (66, 130), (130, 64)]  # dim, value_dim


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "value_dim"), SIZES)
@pytest.mark.parametrize("page_size", [1, 16])
def test_floats(isa: str, dtype: Any, dim: int, value_dim: int, page_size: int, rng: Any) -> None:
    for rows in ROWS:
        keys = int(rng.integers(rows, 300)) + (256 if rows > 8 else 0)
        sizes = {"dim": dim, "value_dim": value_dim, "dtype": dtype}
        q, k, v = inputs(rng, 1, keys, heads=2 * rows, kv_heads=2, **sizes)
        paged = into_pages(rng, k, v, [keys], page_size)
        paged.check(q, scale=0.3, window=(keys // 2, 0), query_offset=keys - 2)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dtype", DTYPES[::3])
@pytest.mark.parametrize("page_size", [1, 16])
def test_stored(isa: str, stored: str, dtype: Any, page_size: int, rng: Any) -> None:
    for rows in ROWS:
        dim, value_dim = SIZES[rows % len(SIZES)]
        if stored == "int4":
            dim, value_dim = dim + dim % 2, value_dim + value_dim % 2
        sizes: dict[str, Any] = {"dim": dim, "value_dim": value_dim, "heads": 2 * rows}
        lengths = [int(rng.integers(1, 200)), 70 if rows < 9 else 270]
        made = make(rng, (stored, stored), 1, lengths=lengths, kv_heads=2, page_size=page_size,
                    dtype=dtype, **sizes)  # fmt: skip
        check_stored(*made, causal=True, window=(50, None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("most", [4, 8, 16])
def test_rows_do_not_depend_on_each_other(isa: str, most: int, dtype: Any, rng: Any) -> None:
    """A row has the same bits whatever the others hold, and NaN and Inf that it does not see."""
    for rows in range(most // 2 + 1, most + 1):
        q, k, v = inputs(rng, rows, 300, heads=1, dim=24, value_dim=40, dtype=dtype)
        expected = attncore.attention(q, k, v, causal=True, return_lse=True)
        kept = rows // 2
        changed = q.copy()
        changed[:, :, kept + 1 :] = 5
        bad_key, bad_value = k.copy(), v.copy()
        bad_key[:, :, 300 - rows + kept + 1 :] = np.nan
        bad_value[:, :, 300 - rows + kept + 1 :] = np.inf
        for made in ((changed, k, v), (q, bad_key, bad_value), (changed, bad_key, bad_value)):
            got = attncore.attention(*made, causal=True, return_lse=True)
            for of, to in zip(got, expected, strict=True):
                assert_same_bits(of[:, :, : kept + 1], to[:, :, : kept + 1])


@pytest.mark.parametrize("stored", ["float32", "bfloat16", *QUANTISED])
def test_strided_items(isa: str, stored: str, rng: Any) -> None:
    """Items that do not lie beside each other are copied first: the bits are the same."""
    for rows in (1, 4, 5, 9, 16):
        sizes: dict[str, Any] = {"dim": 48, "value_dim": 24, "heads": rows, "kv_heads": 1}
        query, paged, scales = make(rng, (stored, stored), 1, lengths=[300], **sizes)
        if stored == "int4":
            continue  # two in a byte: they always lie beside each other
        apart = paged.view(lambda pool: np.repeat(pool, 2, axis=3)[..., ::2])
        for got, expected in zip(
            apart.attend(query, **scales), paged.attend(query, **scales), strict=True
        ):
            assert_same_bits(got, expected)
