"""scaled_dot_product_attention with more axes than batch, heads, tokens and dim: none are copied for it."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits, normal, zeros
from reference import Array

HEADS, QUERIES, KEYS, DIM = 2, 5, 7, 8
LEADS = [(3, 4), (1, 4, 1), (2, 1, 3), (2, 3, 2), (0, 3), (3, 0, 2), (1, 1)]


def one_by_one(q: Array, k: Array, v: Array, mask: Array | None, **options: Any) -> Array:
    """An attention for each entry of the leading axes."""
    lead = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    q, k, v = (np.broadcast_to(x, (*lead, *x.shape[-3:])) for x in (q, k, v))
    out = np.empty((*lead, *q.shape[-3:-1], v.shape[-1]), q.dtype)
    scores = None if mask is None else np.broadcast_to(mask, (*lead, HEADS, QUERIES, KEYS))
    for at in np.ndindex(lead):
        given: dict[str, Any] = {}
        if scores is not None:
            given["mask" if scores.dtype == np.bool_ else "bias"] = scores[at][None]
        out[at] = attncore.attention(q[at][None], k[at][None], v[at][None], **given, **options)[0]
    return out


def made(rng: Any, *leads: tuple[int, ...], dtype: Any = np.float32) -> list[Array]:
    tokens = (QUERIES, KEYS, KEYS)
    return [
        normal(rng, *lead, HEADS, n, DIM, dtype=dtype)
        for lead, n in zip(leads, tokens, strict=True)
    ]


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_axes(lead: tuple[int, ...], dtype: Any, rng: Any) -> None:
    sdpa = attncore.scaled_dot_product_attention
    q, k, v = made(rng, lead, lead, lead, dtype=dtype)
    assert_same_bits(sdpa(q, k, v), one_by_one(q, k, v, None))
    causal = one_by_one(q, k, v, None, causal=True, query_offset=0)
    assert_same_bits(sdpa(q, k, v, is_causal=True), causal)
    turned = [np.moveaxis(np.moveaxis(x, 0, -1).copy(), -1, 0) for x in (q, k, v)]
    assert_same_bits(sdpa(*turned), one_by_one(q, k, v, None))


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_some_axes(lead: tuple[int, ...], kind: str, rng: Any) -> None:
    """Which broadcast over any of the axes, or lack the first ones."""
    q, k, v = made(rng, lead, lead, lead)
    whole = (*lead, HEADS, QUERIES, KEYS)
    for ones in range(2 ** len(whole)):
        shape = [1 if ones >> axis & 1 else n for axis, n in enumerate(whole)]
        mask = rng.random(shape) < 0.7 if kind == "bool" else normal(rng, *shape)
        for given in (mask, mask[0], mask[0, 0]) if mask.size and len(lead) == 2 else (mask,):
            got = attncore.scaled_dot_product_attention(q, k, v, given)
            assert_same_bits(got, one_by_one(q, k, v, given))


@pytest.mark.parametrize(
    "leads",
    [((2, 3), (2, 1), (1, 3)), ((3,), (2, 3), (2, 3)), ((2, 3), (3,), ()), ((), (2, 3), (3,))],
)
def test_operands_broadcast(leads: Any, rng: Any) -> None:
    """Fewer axes too: the first ones are missing."""
    q, k, v = made(rng, *leads)
    mask = rng.random((2, 1, HEADS, 1, KEYS)) < 0.7
    for given in (None, mask, mask[0]):
        got = attncore.scaled_dot_product_attention(q, k, v, given)
        wanted = one_by_one(q, k, v, given)
        assert_same_bits(got, wanted)


def test_nothing_is_copied(rng: Any) -> None:
    """Neither what entries share nor axes whose strides are not one."""
    pairs, rows, n = 3, 40, 256
    q = normal(rng, rows, pairs, 1, n, 4).swapaxes(0, 1)
    bias = normal(rng, pairs, 1, 1, n, n)
    attncore.scaled_dot_product_attention(q, q, q, bias)
    tracemalloc.start()
    attncore.scaled_dot_product_attention(q, q, q, bias)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < q.nbytes + 100_000  # the result


def test_messages() -> None:
    x = zeros(2, 3, HEADS, QUERIES, DIM)
    with pytest.raises(ValueError, match=r"leading axes \(2, 3\), \(2, 2\), \(2, 3\) do not broad"):
        attncore.scaled_dot_product_attention(x, x[:, :2], x)
    with pytest.raises(ValueError, match=r"attn_mask: shape is \(3, 1, 1, 1, 1\)"):
        attncore.scaled_dot_product_attention(x, x, x, np.ones((3, 1, 1, 1, 1), np.bool_))
    for lead in (x, x[:0], x[:, :0]):
        with pytest.raises((TypeError, ValueError), match="value: "):
            attncore.scaled_dot_product_attention(lead, lead, lead.astype(np.int32))
