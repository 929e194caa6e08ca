"""Gradients of each option: central differences of the library itself, broadcasting, extreme scores, sinks."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

import attncore
import test_reference_backward as small
from kit import DTYPES, assert_same_bits, inputs
from kit_backward import (
    OPERANDS,
    check_backward,
    d_outputs,
    differentiate,
    gradients,
    named,
    owners,
)
from reference import Array
from test_contract_scores import NOTHING

B, H, HK, ROWS, KEYS = 2, 4, 2, 21, 90


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The small reference's options in the library's own types."""
    if "relative_bias" not in options:
        return options
    table = options["relative_bias"]
    return {
        **options,
        "relative_bias": attncore.RelativeBias(
            table.table, table.bidirectional, table.max_distance
        ),
    }


@pytest.mark.parametrize("name", small.OPTIONS)
def test_central_differences(isa: str, name: str, rng: Any) -> None:
    """Along a random direction of each leaf, in float64, by five points."""
    options = given(small.OPTIONS[name])
    sizes = {"batch": small.B, "heads": small.H, "kv_heads": small.HK}
    arrays = inputs(rng, small.ROWS, small.KEYS, dim=3, value_dim=2, dtype=float, **sizes)
    d_out, d_lse = d_outputs(rng, arrays[0], arrays[2])
    ours = gradients(d_out, arrays, d_lse=d_lse, **options)

    def loss(leaf: str, by: Array) -> float:
        changed = {n: a + by if n == leaf else a for n, a in owners(arrays, options).items()}
        operands = [changed[n] for n in OPERANDS]
        its = options if leaf in OPERANDS else small.moved(options, leaf, by)
        out, lse = attncore.attention(*operands, return_lse=True, **its)
        return float((out * d_out).sum() + (small.finite(lse) * d_lse).sum())

    step = 2.0**-9
    for leaf, array in owners(arrays, options).items():
        way = rng.standard_normal(array.shape) / np.sqrt(array.size)
        way = np.where(np.isfinite(array), way, 0)
        f = {n: loss(leaf, n * step * way) for n in (-2, -1, 1, 2)}
        expected = (8 * (f[1] - f[-1]) - (f[2] - f[-2])) / (12 * step)
        got = float((ours[leaf] * way).sum())
        assert abs(got - expected) < 2e-9, f"{leaf}: {got}, not {expected}"


BROADCASTS = [
    tuple(n if there else 1 for n, there in zip((B, H, ROWS, KEYS), axes, strict=True))
    for axes in product((False, True), repeat=4)
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", BROADCASTS)
def test_every_broadcast_of_a_bias(isa: str, dtype: Any, shape: tuple[int, ...], rng: Any) -> None:
    made = inputs(rng, ROWS, KEYS, batch=B, heads=H, kv_heads=HK, dim=16, dtype=dtype)
    bias = np.float32(rng.standard_normal(shape))
    d_out, _ = d_outputs(rng, made[0], made[2])
    check_backward(d_out, made, bias=bias, causal=shape[0] == 1)


@pytest.mark.parametrize("shape", [(KEYS,), (ROWS, 1), (ROWS, KEYS), (H, 1, 1), (1,), ()])
def test_biases_of_fewer_axes(isa: str, shape: tuple[int, ...], rng: Any) -> None:
    made = inputs(rng, ROWS, KEYS, batch=B, heads=H, kv_heads=HK, dim=16)
    d_out, _ = d_outputs(rng, made[0], made[2])
    bias = np.asarray(rng.standard_normal(shape), np.float32)
    assert check_backward(d_out, made, bias=bias)["bias 0"].shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_biases(isa: str, dtype: Any, rng: Any) -> None:
    """Both of Evoformer, and eight at once; a mask hides some of it."""
    made = inputs(rng, ROWS, KEYS, batch=B, heads=H, kv_heads=HK, dim=16, dtype=dtype)
    d_out, d_lse = d_outputs(rng, made[0], made[2])

    def normal(*shape: int, kind: Any = np.float32) -> Array:
        return rng.standard_normal(shape).astype(kind)

    check_backward(d_out, made, bias=(normal(B, 1, 1, KEYS), normal(1, H, ROWS, KEYS)))
    eight = [normal(*shape) for shape in BROADCASTS[::2]]
    eight[3] = normal(*eight[3].shape, kind=dtype)
    mask = rng.random((B, 1, ROWS, KEYS)) < 0.7
    check_backward(d_out, made, bias=tuple(eight), mask=mask, d_lse=d_lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(B, H, ROWS, KEYS), (H, ROWS, KEYS), (B, 1, 1, KEYS)])
def test_minus_infinity_in_a_bias_has_no_gradient(
    isa: str, dtype: Any, shape: tuple[int, ...], rng: Any
) -> None:
    made = inputs(rng, ROWS, KEYS, batch=B, heads=H, kv_heads=HK, dim=16, dtype=dtype)
    d_out, _ = d_outputs(rng, made[0], made[2])
    bias = rng.standard_normal(shape).astype(dtype)
    bias[rng.random(shape) < 0.4] = -np.inf
    other = np.float32(rng.standard_normal((ROWS, KEYS)))
    ours = check_backward(d_out, made, bias=(bias, other))
    assert (ours["bias 0"][bias == -np.inf] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_the_lowest_number_are_uniform(isa: str, dtype: Any, rng: Any) -> None:
    """finfo.min as a mask: a row of nothing else has weights 1/n, whose lse has no room for log n."""
    made = inputs(rng, ROWS, KEYS, batch=B, heads=H, kv_heads=HK, dim=16, dtype=dtype)
    d_out, d_lse = d_outputs(rng, made[0], made[2])
    lowest = np.finfo(np.float32).min
    bias = np.where(rng.random((ROWS, KEYS)) < 0.5, 0, lowest).astype(np.float32)
    bias[3] = bias[17] = lowest
    check_backward(d_out, made, bias=bias)
    check_backward(d_out, made, bias=np.full((1, 1), lowest, np.float32), d_lse=d_lse)
    check_backward(d_out, made, bias=np.full((1, 1), lowest, np.float32), causal=True)
    lone = np.zeros_like(d_out)
    lone[:, :, 3] = d_out[:, :, 3]
    d_value = gradients(lone, made, bias=bias)["value"].astype(np.float64)
    expected = lone[:, :, 3].astype(np.float64).reshape(B, HK, -1, 1, 16).sum(axis=2) / KEYS
    np.testing.assert_allclose(
        d_value, np.broadcast_to(expected, d_value.shape), rtol=1e-2, atol=1e-3
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constant", [1e4, -1e4, 3e7])
def test_a_huge_common_score(isa: str, dtype: Any, constant: float, rng: Any) -> None:
    made = inputs(rng, ROWS, KEYS, dim=64, dtype=dtype)
    d_out, d_lse = d_outputs(rng, made[0], made[2])
    check_backward(d_out, made, bias=np.full((1, 1), constant, np.float32))
    check_backward(d_out, made, bias=np.full((ROWS, 1), constant, np.float32), d_lse=d_lse)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_huge_scores(isa: str, dtype: Any, size: float, rng: Any) -> None:
    made = inputs(rng, ROWS, KEYS, dim=64, dtype=dtype)
    d_out, _ = d_outputs(rng, made[0], made[2])
    check_backward(d_out, made, scale=size / 8)
    check_backward(d_out, made, scale=-size / 8, causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-30])
def test_scale(isa: str, dtype: Any, scale: float, rng: Any) -> None:
    made = inputs(rng, ROWS, KEYS, dtype=dtype)
    ours = check_backward(d_outputs(rng, made[0], made[2])[0], made, scale=scale)
    if scale == 0:
        assert (ours["query"] == 0).all()
        assert (ours["key"] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.01, 1.0, 20.0, 1e4])
def test_softcap(isa: str, dtype: Any, softcap: float, rng: Any) -> None:
    made = inputs(rng, ROWS, KEYS, dtype=dtype)
    for scale in (0.2, 5.0):
        d_out, _ = d_outputs(rng, made[0], made[2])
        check_backward(d_out, made, softcap=softcap, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("offset", [None, -7, "each"])
def test_alibi(isa: str, dtype: Any, own: bool, offset: Any, rng: Any) -> None:
    made = inputs(rng, ROWS, KEYS, batch=B, heads=H, kv_heads=HK, dtype=dtype)
    d_out, _ = d_outputs(rng, made[0], made[2])
    slopes = rng.random((B, H)).astype(made[0].dtype if own else np.float32)
    offset = np.array([3, 50]) if offset == "each" else offset
    check_backward(d_out, made, alibi=slopes, query_offset=offset)
    check_backward(d_out, made, alibi=slopes[0], query_offset=offset, causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("sink", [0.0, 4.0, 40.0, -200.0])
def test_sinks(isa: str, dtype: Any, own: bool, sink: float, rng: Any) -> None:
    made = inputs(rng, ROWS, KEYS, batch=B, heads=H, kv_heads=HK, dtype=dtype)
    d_out, d_lse = d_outputs(rng, made[0], made[2])
    sinks = (sink + rng.standard_normal(H)).astype(made[0].dtype if own else np.float32)
    check_backward(d_out, made, sinks=sinks, d_lse=d_lse)
    check_backward(d_out, made, sinks=sinks, softcap=0.5, causal=True)


def test_a_sink_of_minus_infinity_has_no_gradient(isa: str, rng: Any) -> None:
    made = inputs(rng, 9, 40)
    d_out, d_lse = d_outputs(rng, made[0], made[2])
    sinks = np.array([-np.inf, 0.5], np.float32)
    for lengths in ([40], [0]):
        ours = check_backward(d_out, made, sinks=sinks, d_lse=d_lse, key_lengths=lengths)
        assert ours["sinks"][0] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_d_lse_alone(isa: str, dtype: Any, rng: Any) -> None:
    """lse is an output like any other: here nothing else is of interest."""
    made = inputs(rng, ROWS, KEYS, heads=H, kv_heads=HK, dtype=dtype)
    d_out, d_lse = d_outputs(rng, made[0], made[2])
    ours = check_backward(np.zeros_like(d_out), made, d_lse=d_lse)
    assert (ours["value"] == 0).all()
    without = gradients(d_out, made)
    zero = gradients(d_out, made, d_lse=np.zeros_like(d_lse))
    for name, one in without.items():
        np.testing.assert_array_equal(one, zero[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 37])
@pytest.mark.parametrize("kind", NOTHING)
def test_nothing_visible(isa: str, dtype: Any, queries: int, kind: str, rng: Any) -> None:
    """All gradients are 0, but d_lse reaches the sink: of rows that exist."""
    made = inputs(rng, queries, 300, heads=4, kv_heads=2, dtype=dtype)
    d_out, d_lse = d_outputs(rng, made[0], made[2])
    options = {"alibi": np.ones(4, np.float32), "bias": np.zeros(300, np.float32)}
    options |= NOTHING[kind]
    if kind == "segments":
        options["query_segments"] = options["query_segments"][:, :queries]
    for name, one in gradients(d_out, made, d_lse=d_lse, **options).items():
        assert (one == 0).all(), name
    sinks = np.array([1.5, -2.0, 0.0, 100.0], np.float32)
    ours = gradients(d_out, made, d_lse=d_lse, sinks=sinks, **options)
    for name, one in ours.items():
        assert name == "sinks" or (one == 0).all(), name
    expected = 0 * sinks if kind == "query_lengths" else d_lse.sum(axis=(0, 2))
    np.testing.assert_allclose(ours["sinks"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing_among_others(isa: str, dtype: Any, rng: Any) -> None:
    made = inputs(rng, 40, 300, dtype=dtype)
    mask = rng.random((40, 300)) < 0.5
    mask[::3] = False
    d_out, d_lse = d_outputs(rng, made[0], made[2])
    ours = check_backward(d_out, made, mask=mask, d_lse=d_lse, bias=np.zeros((40, 1), np.float32))
    assert (ours["query"][:, :, ::3] == 0).all()
    assert (ours["bias 0"][::3] == 0).all()
    late = np.zeros((40, 300), bool)
    late[:, 299] = True
    ours = check_backward(d_out, made, mask=late)
    assert (ours["value"][:, :, :299] == 0).all()


def test_lists_are_float32(isa: str, rng: Any) -> None:
    made = inputs(rng, 5, 9, dtype=np.float64)
    d_out, _ = d_outputs(rng, made[0], made[2])
    ours = gradients(d_out, made, sinks=[0.5, 1.0], alibi=[0.25, 0.125])
    arrays = {
        "sinks": np.array([0.5, 1.0], np.float32),
        "alibi": np.array([0.25, 0.125], np.float32),
    }
    for name, one in gradients(d_out, made, **arrays).items():
        assert_same_bits(ours[name], one, name)
    assert ours["sinks"].dtype == ours["alibi"].dtype == np.float32


def test_one_bias_or_a_tuple(isa: str, rng: Any) -> None:
    made = inputs(rng, 5, 9)
    d_out, _ = d_outputs(rng, made[0], made[2])
    bias = np.float32(rng.standard_normal((5, 9)))
    alone, *_ = differentiate(d_out, made, bias=bias)
    assert isinstance(alone.bias, np.ndarray)
    for several in ((bias,), [bias]):
        within, *_ = differentiate(d_out, made, bias=several)
        assert isinstance(within.bias, tuple)
        assert_same_bits(within.bias[0], alone.bias)
    none, *_ = differentiate(d_out, made)
    assert named(none).keys() == {"query", "key", "value"}
