"""The relative position bias of T5: its buckets, its sum with the scores, its table's gradient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits, inputs
from kit_backward import assert_same_gradients, check_backward, d_outputs, gradients
from reference import Array, relative_buckets

H, HK = 4, 2
# bidirectional, buckets, max_distance
KINDS = [
    (True, 32, 128),
    (False, 32, 128),
    (True, 64, 256),
    (False, 16, 1000),
    (True, 4, 2),
    (False, 2, 2),
    (True, 12, 4),
    (False, 7, 50),
    (True, 256, 300),
    (False, 32, 17),
]


def t5_buckets(distance: Array, bidirectional: bool, buckets: int, max_distance: int) -> Array:
    """T5Attention._relative_position_bucket of Hugging Face's transformers, in float32 as there."""
    found = np.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        found += (distance > 0) * buckets
        distance = np.abs(distance)
    else:
        distance = -np.minimum(distance, 0)
    exact = buckets // 2
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log(np.float32(distance) / np.float32(exact)) / np.float32(
            math.log(max_distance / exact)
        )
        large = np.where(distance < exact, 0, exact + ratio * np.float32(buckets - exact))
    large = np.minimum(large.astype(np.int64), buckets - 1)
    return found + np.where(distance < exact, distance, large)


def buckets_of(relative_bias: Any, queries: int, keys: int, offset: int) -> Array:
    """The library's own, from a table of buckets' numbers: a query that sees one key has its score as lse."""
    heads = relative_bias.table.shape[0]
    q, k = np.zeros((1, heads, queries, 8), np.float32), np.zeros((1, heads, 1, 8), np.float32)
    columns = [
        attncore.attention(
            q, k, k, relative_bias=relative_bias, query_offset=offset - key, return_lse=True
        )[1]
        for key in range(keys)
    ]
    return np.stack(columns, axis=-1)[0, 0].astype(int)


@pytest.mark.parametrize("kind", KINDS)
def test_buckets(isa: str, kind: tuple[bool, int, int]) -> None:
    """Of all distances up to twice the maximum and some beyond: a table that holds its buckets' numbers."""
    bidirectional, count, farthest = kind
    table = np.arange(count, dtype=np.float32)[None]
    relative_bias = attncore.RelativeBias(table, bidirectional, farthest)
    reach = 2 * farthest + 5
    for shift in (-reach, 0):
        ours = buckets_of(relative_bias, reach, 1, -shift)
        distance = -np.arange(reach)[:, None] + shift
        np.testing.assert_array_equal(ours, t5_buckets(distance, *kind))
        ahead = buckets_of(relative_bias, reach, 1, shift - reach)
        distance = reach - shift - np.arange(reach)[:, None]
        np.testing.assert_array_equal(ahead, t5_buckets(distance, *kind))
    for far in (10**6, 2**40, -(10**6), -(2**40)):
        ours = buckets_of(relative_bias, 2, 2, far)
        distance = np.arange(2) - np.arange(2)[:, None] - far
        np.testing.assert_array_equal(ours, t5_buckets(distance, *kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_has_the_same_buckets(kind: tuple[bool, int, int]) -> None:
    bidirectional, count, farthest = kind
    relative_bias = attncore.RelativeBias(np.zeros((1, count)), bidirectional, farthest)
    distance = np.arange(-5 * farthest, 5 * farthest)
    np.testing.assert_array_equal(
        relative_buckets(relative_bias, distance), t5_buckets(distance, *kind)
    )


def dense(relative_bias: Any, rows: int, keys: int, offset: Any) -> Array:
    """The same as an array over (batch, head, row, key)."""
    position = np.arange(rows)[:, None] + np.atleast_1d(offset)[:, None, None]
    chosen = relative_bias.table[:, relative_buckets(relative_bias, np.arange(keys) - position)]
    whole: Array = np.ascontiguousarray(chosen.swapaxes(0, 1))
    return whole


SHAPES: dict[str, dict[str, Any]] = {
    "prefill": {"queries": 70, "keys": 200, "dim": 24},
    "decode": {"queries": 1, "keys": 1300, "dim": 64},
    "few rows": {"queries": 3, "keys": 2100, "dim": 16},
    "tiny": {"queries": 5, "keys": 7, "dim": 5},
    "more rows": {"queries": 150, "keys": 70, "dim": 32},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "alone": {},
    "causal": {"causal": True},
    "window": {"window": (50, 20)},
    "offset": {"query_offset": 11},
    "far away": {"query_offset": -70000},
    "offsets": {"query_offset": np.array([-3, 60]), "causal": True},
    "softcap and alibi": {"softcap": 2.0, "alibi": np.array([0.01, 0.02, 0.1, 0], np.float32)},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "option"),
    [("prefill", option) for option in OPTIONS]
    + [
        (shape, option) for shape in SHAPES for option in ("alone", "offsets") if shape != "prefill"
    ],
)
def test_like_a_dense_bias(isa: str, dtype: Any, shape: str, option: str, rng: Any) -> None:
    """The same bits: the same number is added at the same place.  So have the gradients of the operands."""
    made = inputs(rng, batch=2, heads=H, kv_heads=HK, dtype=dtype, **SHAPES[shape])
    rows, keys = made[0].shape[2], made[1].shape[2]
    table = rng.standard_normal((H, 32)).astype(np.float32 if shape == "tiny" else dtype)
    relative_bias = attncore.RelativeBias(table, option != "causal")
    options = OPTIONS[option]
    bias = dense(relative_bias, rows, keys, options.get("query_offset", keys - rows))
    out, lse = attncore.attention(*made, relative_bias=relative_bias, return_lse=True, **options)
    expected, its_lse = attncore.attention(*made, bias=bias, return_lse=True, **options)
    assert_same_bits(out, expected)
    assert_same_bits(lse, its_lse, "lse")
    if shape != "few rows":
        d_out, _ = d_outputs(rng, made[0], made[2])
        operands = ("query", "key", "value")
        assert_same_gradients(
            gradients(d_out, made, relative_bias=relative_bias, wanted=operands, **options),
            gradients(d_out, made, bias=bias, wanted=operands, **options),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(isa: str, dtype: Any, kind: tuple[bool, int, int], rng: Any) -> None:
    bidirectional, count, farthest = kind
    made = inputs(rng, 37, 90, batch=2, heads=H, kv_heads=HK, dim=16, dtype=dtype)
    table = np.float32(rng.standard_normal((H, count)))
    relative_bias = attncore.RelativeBias(table, bidirectional, farthest)
    d_out, d_lse = d_outputs(rng, made[0], made[2])
    ours = check_backward(d_out, made, d_lse=d_lse, relative_bias=relative_bias)
    assert ours["relative_bias"].shape == (H, count)
    unused = np.setdiff1d(
        np.arange(count), t5_buckets(np.arange(90) - np.arange(53, 90)[:, None], *kind)
    )
    assert (ours["relative_bias"][:, unused] == 0).all()


COMBINED: dict[str, dict[str, Any]] = {
    "lengths": {"key_lengths": [90, 41], "query_lengths": [20, 37], "causal": True},
    "offsets": {"query_offset": np.array([-40, 60]), "window": (30, 4)},
    "biases": {"bias": (np.array([[0.5]], np.float32), np.ones((37, 1), np.float32))},
    "dropout": {"dropout_p": 0.3, "seed": 4, "causal": True},
    "sinks and softcap": {"sinks": np.array([0.1, 2, -1, 0], np.float32), "softcap": 2.0},
    "nothing visible": {"key_lengths": [0, 0]},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", COMBINED)
def test_with_other_options(isa: str, dtype: Any, own: bool, name: str, rng: Any) -> None:
    made = inputs(rng, 37, 90, batch=2, heads=H, kv_heads=HK, dim=16, dtype=dtype)
    table = rng.standard_normal((H, 32)).astype(made[0].dtype if own else np.float32)
    relative_bias = attncore.RelativeBias(table, max_distance=40)
    d_out, d_lse = d_outputs(rng, made[0], made[2])
    check_backward(d_out, made, d_lse=d_lse, relative_bias=relative_bias, **COMBINED[name])


@pytest.mark.parametrize("queries", [1, 4])
def test_split_keys(isa: str, queries: int, rng: Any) -> None:
    made = inputs(rng, queries, 2600, heads=H, kv_heads=HK)
    d_out, _ = d_outputs(rng, made[0], made[2])
    relative_bias = attncore.RelativeBias(np.float32(rng.standard_normal((H, 32))), False, 700)
    check_backward(d_out, made, relative_bias=relative_bias, causal=True)


def test_minus_infinity_in_a_table_hides(isa: str, rng: Any) -> None:
    """As in any bias; and has no gradient."""
    made = inputs(rng, 37, 90, heads=H, kv_heads=HK)
    d_out, _ = d_outputs(rng, made[0], made[2])
    table = np.float32(rng.standard_normal((H, 16)))
    table[:, 5:9] = -np.inf
    relative_bias = attncore.RelativeBias(table, True, 30)
    ours = check_backward(d_out, made, relative_bias=relative_bias)
    assert (ours["relative_bias"][:, 5:9] == 0).all()


def test_weights_have_it_too(isa: str, rng: Any) -> None:
    q, k, _ = inputs(rng, 37, 90, heads=H, kv_heads=HK)
    relative_bias = attncore.RelativeBias(np.float32(rng.standard_normal((H, 32))))
    bias = dense(relative_bias, 37, 90, 53)
    ours = attncore.attention_weights(q, k, relative_bias=relative_bias, rows=[3, -1])
    assert_same_bits(ours, attncore.attention_weights(q, k, bias=bias, rows=[3, -1]))
