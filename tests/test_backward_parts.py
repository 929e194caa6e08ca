"""Gradients of attention over parts of the keys, with out and lse of all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kit import inputs
from kit_backward import attention_backward, d_outputs, differentiate

H, HK = 4, 2


@pytest.mark.parametrize("queries", [1, 37])
def test_parts_of_the_keys(isa: str, queries: int, rng: Any) -> None:
    """With out and lse of all keys, each part of them gives its share: attention over several machines."""
    q, k, v = inputs(rng, queries, 300, heads=H, kv_heads=HK, dtype=np.float64)
    d_out, d_lse = d_outputs(rng, q, v)
    made, out, lse = differentiate(d_out, (q, k, v), d_lse=d_lse)
    parts = [
        attention_backward(d_out, q, k[:, :, part], v[:, :, part], out, lse, d_lse=d_lse)
        for part in (slice(120), slice(120, None))
    ]
    np.testing.assert_allclose(parts[0].query + parts[1].query, made.query, rtol=0, atol=1e-13)
    for name in ("key", "value"):
        joined = np.concatenate([getattr(part, name) for part in parts], axis=2)
        np.testing.assert_allclose(joined, getattr(made, name), rtol=0, atol=1e-13)


def test_parts_of_the_keys_where_lse_is_large(isa: str, rng: Any) -> None:
    """lse of 70 lacks digits, but that of a part is another number: it counts as it is."""
    q, k, v = inputs(rng, 5, 300, heads=H, kv_heads=HK)
    d_out, _ = d_outputs(rng, q, v)
    bias = np.full((1, 300), 70, np.float32)
    made, out, lse = differentiate(d_out, (q, k, v), bias=bias)
    for part in (slice(120), slice(120, None)):
        share = attention_backward(
            d_out, q, k[:, :, part], v[:, :, part], out, lse, bias=bias[:, part]
        )
        np.testing.assert_allclose(share.value, made.value[:, :, part], rtol=0, atol=2e-5)
