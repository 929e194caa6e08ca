"""Contract of gradients: any strides, layouts and ranks, of what comes in and of `into`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits, inputs
from kit_backward import (
    Named,
    assert_same_gradients,
    attention_backward,
    check_backward,
    d_outputs,
    differentiate,
    gradients,
    named,
    owners,
)
from reference import Array
from test_contract_strides import (
    VIEWS,
    packed_records,
    read_only,
    reversed_everywhere,
    thinned,
    turned,
    unaligned,
)

SIZES: dict[str, Any] = {"batch": 2, "heads": 4, "kv_heads": 2, "dim": 40, "value_dim": 23}


def of_any_rank(view: Any) -> Any:
    """A view of four axes for arrays of fewer."""

    def seen(a: Array) -> Array:
        return view(a.reshape((1,) * (4 - a.ndim) + a.shape)).reshape(a.shape)

    return seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("queries", [1, 37])
def test_inputs(isa: str, dtype: Any, queries: int, view: Any, rng: Any) -> None:
    """Neither the memory's order nor its alignment shows, not even in the bits."""
    made = inputs(rng, queries, 91, dtype=dtype, **SIZES)
    d_out, d_lse = d_outputs(rng, made[0], made[2])
    found, out, lse = differentiate(d_out, made, d_lse=d_lse, causal=True)
    line = of_any_rank(view)
    if view in (thinned, packed_records):  # a view of a view's shape is a copy
        line = np.copy
    seen = [view(a) for a in (d_out, *made, out)]
    ours = attention_backward(*seen, line(lse), d_lse=line(d_lse), causal=True)
    assert_same_gradients(named(ours), named(found))


def test_lines_of_lse(isa: str, rng: Any) -> None:
    """lse and d_lse of any strides."""
    made = inputs(rng, 37, 91, **SIZES)
    d_out, d_lse = d_outputs(rng, made[0], made[2])
    found, out, lse = differentiate(d_out, made, d_lse=d_lse)

    def wide(a: Array) -> Array:
        return np.repeat(a, 3, axis=-1)[..., ::3]

    def backwards(a: Array) -> Array:
        return a[:, ::-1, ::-1].copy()[:, ::-1, ::-1]

    def odd(a: Array) -> Array:
        return unaligned(a[..., None])[..., 0]

    for view in (wide, backwards, odd, np.asfortranarray, read_only):
        ours = attention_backward(d_out, *made, out, view(lse), d_lse=view(d_lse))
        assert_same_gradients(named(ours), named(found))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_strides(isa: str, dtype: Any, rng: Any) -> None:
    """d_out of a sum is one number everywhere."""
    q, k, v = inputs(rng, 9, 30, batch=1, heads=1, dtype=dtype)
    one = np.ones((), dtype)
    wide = [np.broadcast_to(a, (3, 4, *a.shape[2:])) for a in (q, k, v)]
    d_out = np.broadcast_to(one, wide[0].shape)
    assert d_out.strides == (0, 0, 0, 0)
    expected = gradients(d_out.copy(), [a.copy() for a in wide])
    assert_same_gradients(gradients(d_out, wide), expected)
    bias = np.broadcast_to(np.float32(0.5), (4, 9, 30))
    ours = gradients(d_out, wide, bias=bias)
    assert_same_gradients(ours, gradients(d_out, wide, bias=bias.copy()))
    assert ours["bias 0"].shape == bias.shape


def all_options(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
    return {
        "bias": (
            np.float32(rng.standard_normal((4, 37, 91))),
            rng.standard_normal((2, 1, 1, 91)).astype(dtype),
        ),
        "alibi": np.float32(rng.random((2, 4))),
        "sinks": rng.standard_normal(4).astype(dtype),
        "relative_bias": attncore.RelativeBias(np.float32(rng.standard_normal((4, 32)))),
    }


def gathered(made: Named, bias: Any) -> Any:
    """Arrays by name as Gradients."""
    found: dict[str, Any] = {n: a for n, a in made.items() if not n.startswith("bias")}
    biases = tuple(a for n, a in made.items() if n.startswith("bias"))
    if biases:
        found["bias"] = biases if isinstance(bias, tuple) else biases[0]
    none = dict.fromkeys(attncore.Gradients._fields)
    return attncore.Gradients(**{**none, **found})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", [v for v in VIEWS if v is not read_only])
def test_into(isa: str, dtype: Any, view: Any, rng: Any) -> None:
    """Preallocated, of any strides, holding anything; what is returned is what was given."""
    made = inputs(rng, 37, 91, dtype=dtype, **SIZES)
    options = all_options(rng, dtype)
    d_out, _ = d_outputs(rng, made[0], made[2])
    expected = gradients(d_out, made, **options)
    seen = of_any_rank(view) if view is unaligned else view

    def poisoned(a: Array) -> Array:
        garbage = np.full(a.shape, np.nan, a.dtype)
        return seen(garbage) if a.ndim == 4 else garbage

    memory = {n: poisoned(a) for n, a in owners(made, options).items()}
    into = gathered(memory, options["bias"])
    found, *_ = differentiate(d_out, made, into=into, **options)
    assert_same_gradients(named(found), expected)
    for name, one in named(found).items():
        assert one is memory[name], name
    alone = gathered({"query": memory["query"]}, None)
    memory["query"][...] = np.nan
    found, *_ = differentiate(d_out, made, into=alone, **options)
    assert found.query is memory["query"]
    assert_same_gradients(named(found), expected, "half of them preallocated")


@pytest.mark.parametrize("view", [reversed_everywhere, turned])
def test_into_with_one_bias(isa: str, view: Any, rng: Any) -> None:
    made = inputs(rng, 37, 91, **SIZES)
    bias = np.float32(rng.standard_normal((1, 4, 37, 91)))
    d_out, _ = d_outputs(rng, made[0], made[2])
    into = gathered({"bias 0": view(np.full_like(bias, np.nan))}, bias)
    found, *_ = differentiate(d_out, made, bias=bias, into=into, wanted={"bias"})
    assert found.bias is into.bias
    assert_same_bits(found.bias, gradients(d_out, made, bias=bias)["bias 0"])
    assert named(found).keys() == {"bias 0"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_into_leaves_its_surroundings(isa: str, dtype: Any, rng: Any) -> None:
    for queries, dim in ((1, 7), (37, 40), (19, 1)):
        made = inputs(rng, queries, 91, heads=4, dim=dim, dtype=dtype)
        d_out, _ = d_outputs(rng, made[0], made[2])
        expected = gradients(d_out, made)
        memory = {
            name: np.full([n + 2 for n in a.shape], 7, a.dtype) for name, a in expected.items()
        }
        inner = {name: a[1:-1, 1:-1, 1:-1, 1:-1] for name, a in memory.items()}
        found, *_ = differentiate(d_out, made, into=gathered(inner, None))
        assert_same_gradients(named(found), expected)
        for name, a in memory.items():
            inner[name][...] = 7
            assert (a == 7).all(), name


def test_into_the_slots_of_one_buffer(isa: str, rng: Any) -> None:
    """As the gradient of one projection that is cut in three: they interleave, and so may the operands."""
    packed = rng.standard_normal((2, 9, 3, 4, 32)).astype(np.float32)
    q, k, v = (packed[:, :, i] for i in range(3))
    d_out, _ = d_outputs(rng, q, v, "bshd")
    d_packed = np.full_like(packed, np.nan)
    slots = dict(zip(("query", "key", "value"), (d_packed[:, :, i] for i in range(3)), strict=True))
    options: dict[str, Any] = {"layout": "bshd", "causal": True}
    found, *_ = differentiate(d_out, (q, k, v), into=gathered(slots, None), **options)
    expected = gradients(d_out, [q.copy(), k.copy(), v.copy()], **options)
    assert_same_gradients(named(found), expected)
    assert np.isfinite(d_packed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_ranks_and_layouts(isa: str, dtype: Any, layout: Any, rank: int, rng: Any) -> None:
    made = inputs(rng, 9, 30, heads=3, value_dim=5, dtype=dtype)
    d_out, d_lse = d_outputs(rng, made[0], made[2])
    options: dict[str, Any] = {"causal": True, "sinks": np.array([0.1, 0.2, 0.3], np.float32)}
    if rank == 2:
        options = {"causal": True}
        made = made[0][:, :1], made[1][:, :1], made[2][:, :1]
        d_out, d_lse = d_out[:, :1], d_lse[:, :1]
    whole = gradients(d_out, made, d_lse=d_lse, **options)

    def shaped(a: Array) -> Array:
        if rank > 2 and layout == "bshd":
            a = a.transpose(0, 2, 1, 3)
        return a[(0,) * (4 - rank)]

    arrays = [shaped(a) for a in made]
    its_d_lse = d_lse[(0,) * (4 - rank)]
    ours = check_backward(shaped(d_out), arrays, d_lse=its_d_lse, layout=layout, **options)
    expected = {n: shaped(a) if a.ndim == 4 else a for n, a in whole.items()}
    assert_same_gradients(ours, expected)


def test_strides_of_options(isa: str, rng: Any) -> None:
    made = inputs(rng, 37, 91, **SIZES)
    d_out, _ = d_outputs(rng, made[0], made[2])
    bias = np.float32(rng.standard_normal((2, 4, 37, 91)))
    mask = rng.random((2, 4, 37, 91)) < 0.8
    table = np.float32(rng.standard_normal((4, 16)))

    def options(view: Any, line: Any) -> dict[str, Any]:
        return {
            "bias": (view(bias), view(bias[:1])),
            "mask": view(mask),
            "alibi": line(bias[:, :, 0, 0]),
            "sinks": line(bias[0, :, 0, 1]),
            "relative_bias": attncore.RelativeBias(line(table), True, 20),
        }

    def line(a: Array) -> Array:
        """Backwards, with gaps."""
        wide = np.full((*a.shape[:-1], 2 * a.shape[-1]), np.nan, a.dtype)
        wide[..., ::-2] = a
        return wide[..., ::-2]

    expected = gradients(d_out, made, **options(np.copy, np.copy))
    for view in VIEWS:
        if view is not thinned:
            assert_same_gradients(gradients(d_out, made, **options(view, line)), expected)
