"""attention_varlen_backward: the gradients of the padded batch, each sequence's with the bits that it has alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import attncore
from kit import DTYPES, assert_same_bits
from kit_backward import OPERANDS, Named, assert_same_gradients, named
from reference import Array
from reference_backward import plain_backward, reference_backward
from rule import assert_close_by_rule
from test_backward_options import BROADCASTS
from test_properties import some
from varlen_kit import (
    OPTIONS,
    SHORT,
    Packed,
    as_padded,
    d_outputs,
    options_of_all_kinds,
    packed,
    padded,
    unpadded,
    untyped,
)

ALONE = ("none", "causal", "window", "offset", "alibi", "relative bias", "sinks")


def gradients(
    d_out: Array, problem: Packed, *, d_lse: Array | None = None, **options: Any
) -> Named:
    of_call = {name: options.pop(name) for name in ("wanted", "into") if name in options}
    out, lse = problem.attend(**options)
    ends = problem.queries, problem.keys
    made = untyped.attention_varlen_backward(
        d_out, *problem.arrays, out, lse, *ends, d_lse=d_lse, **of_call, **options
    )
    assert isinstance(made, attncore.Gradients)
    return named(made)


def of_padded(d_out: Array, d_lse: Array, problem: Packed, options: Any) -> Named:
    """Those of the padded batch, whatever stands in the padding; the operands' packed again."""
    its = as_padded(problem, options)
    arrays = problem.padded(np.nan)
    out, lse = untyped.attention(*arrays, return_lse=True, **its)
    d_o = padded(d_out, problem.queries, np.nan)
    d_l = padded(d_lse.T, problem.queries)
    made = named(untyped.attention_backward(d_o, *arrays, out, lse, d_lse=d_l, **its))
    return made | pack_operands(made, problem)


def pack_operands(made: Any, problem: Packed) -> Named:
    ends = problem.queries, problem.keys, problem.keys
    return {name: unpadded(made[name], e) for name, e in zip(OPERANDS, ends, strict=True)}


def check_alone(d_out: Array, d_lse: Array, problem: Packed, **options: Any) -> None:
    """Each sequence against `attention_backward` on it; of options, sums over sequences."""
    ours = gradients(d_out, problem, d_lse=d_lse, **options)
    for name, array in zip(OPERANDS, problem.arrays, strict=True):
        assert ours[name].shape == array.shape
        assert ours[name].dtype == array.dtype
    sums: dict[str, Any] = {}
    for entry in range(problem.batch):
        arrays, places = problem.alone(entry), problem.tokens(entry)
        rows = places[0]
        out, lse = untyped.attention(*arrays, layout="bshd", return_lse=True, **options)
        alone = named(
            untyped.attention_backward(
                d_out[rows], *arrays, out, lse, d_lse=d_lse[:, rows], layout="bshd", **options
            )
        )
        for name, tokens in zip(OPERANDS, places, strict=True):
            assert_same_bits(ours[name][tokens], alone.pop(name), f"d_{name} of {entry}")
        for name, one in alone.items():
            sums[name] = sums.get(name, 0) + one.astype(np.float64)
    for name, total in sums.items():
        np.testing.assert_allclose(ours[name], total, rtol=1e-3, atol=1e-3 * np.abs(total).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("option", ALONE)
def test_a_sequence_has_the_bits_that_it_has_alone(
    isa: str, dtype: Any, group: int, option: str, rng: Any
) -> None:
    problem = packed(rng, heads=2 * group, kv_heads=2, dim=20, value_dim=12, dtype=dtype)
    options = options_of_all_kinds(rng, problem)[option]
    check_alone(*d_outputs(rng, problem), problem, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_the_padded_batch(isa: str, dtype: Any, option: str, rng: Any) -> None:
    """All gradients to the bit, those of biases and of other options too; 0 where no sequence reaches."""
    problem = packed(rng, heads=4, kv_heads=2, dtype=dtype)
    d_out, d_lse = d_outputs(rng, problem)
    options = options_of_all_kinds(rng, problem)[option]
    expected = of_padded(d_out, d_lse, problem, options)
    assert_same_gradients(gradients(d_out, problem, d_lse=d_lse, **options), expected, option)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_against_the_reference(isa: str, dtype: Any, option: str, rng: Any) -> None:
    problem = packed(rng, SHORT, heads=2, kv_heads=1, dim=24, value_dim=17, dtype=dtype)
    d_out, d_lse = d_outputs(rng, problem)
    options = options_of_all_kinds(rng, problem)[option]
    ours = gradients(d_out, problem, d_lse=d_lse, **options)
    exact, plainly = (
        evaluate(
            padded(d_out, problem.queries),
            *problem.padded(),
            d_lse=padded(d_lse.T, problem.queries),
            **as_padded(problem, options),
        )
        for evaluate in (reference_backward, plain_backward)
    )
    assert ours.keys() == exact.keys()
    ends = dict(zip(OPERANDS, (problem.queries, problem.keys, problem.keys), strict=True))
    for name, one in ours.items():
        wanted, rounded = exact[name], plainly[name]
        if name in ends:
            wanted, rounded = (
                replace(g, value=unpadded(g.value, ends[name])) for g in (wanted, rounded)
            )
        its = wanted.magnitude, f"d_{name}", wanted.noise
        assert_close_by_rule(one, wanted.value, rounded.value, *its)


@pytest.mark.parametrize("shape", BROADCASTS)
def test_every_broadcast_of_a_bias(isa: str, shape: tuple[int, ...], rng: Any) -> None:
    problem = packed(rng, [(0, 3), (21, 90), (150, 140), (7, 0), (0, 0)], heads=4, kv_heads=2)
    whole = (problem.batch, 4, *problem.longest)
    bias = np.float32(
        rng.standard_normal([1 if one == 1 else n for one, n in zip(shape, whole, strict=True)])
    )
    d_out, d_lse = d_outputs(rng, problem)
    options = {"bias": bias, "causal": shape[0] == 1}
    expected = of_padded(d_out, d_lse, problem, options)
    ours = gradients(d_out, problem, d_lse=d_lse, **options)
    assert_same_gradients(ours, expected)
    alone = gradients(d_out, problem, d_lse=d_lse, wanted=["bias"], **options)
    assert_same_gradients(alone, {"bias 0": expected["bias 0"]})
    if shape[0] > 1 and shape[2] > 1:
        assert (ours["bias 0"][0] == 0).all()
        assert (ours["bias 0"][1, :, 21:] == 0).all()
        assert (ours["bias 0"][3:] == 0).all()


@pytest.mark.parametrize(
    "lengths", [[], [(0, 0)], [(0, 0)] * 5, [(0, 9), (0, 4)], [(3, 0), (9, 0)], [(0, 2), (2, 0)]]
)
def test_nothing_to_see(isa: str, lengths: list[tuple[int, int]], rng: Any) -> None:
    """Zeros everywhere; what reaches a sink through d_lse does."""
    problem = packed(rng, lengths, heads=6, kv_heads=2)
    d_out, d_lse = d_outputs(rng, problem)
    table = attncore.RelativeBias(np.ones((6, 8), np.float32), False, 9)
    options: dict[str, Any] = {
        "bias": (
            np.zeros((problem.batch, 6, *problem.longest), np.float32),
            np.ones((1, 1), np.float32),
        ),
        "alibi": np.ones(6, np.float32),
        "relative_bias": table,
    }
    for name, one in gradients(d_out, problem, d_lse=d_lse, **options).items():
        assert (one == 0).all(), name
    sinks = np.zeros(6, np.float32)
    ours = gradients(d_out, problem, d_lse=d_lse, sinks=sinks, **options)
    np.testing.assert_allclose(ours.pop("sinks"), d_lse.sum(axis=1), rtol=0, atol=1e-5)
    for name, one in ours.items():
        assert (one == 0).all(), name


@some
@given(data=st.data())
def test_any_lengths(isa: str, data: st.DataObject) -> None:
    counts = st.one_of(st.integers(0, 3), st.integers(0, 150))
    lengths = data.draw(st.lists(st.tuples(counts, counts), max_size=9))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    kv_heads = data.draw(st.integers(1, 2))
    shape = {
        "heads": kv_heads * data.draw(st.sampled_from([1, 3])),
        "kv_heads": kv_heads,
        "dim": data.draw(st.integers(1, 30)),
        "value_dim": data.draw(st.integers(1, 30)),
        "dtype": data.draw(st.sampled_from([np.float32, np.float64])),
    }
    problem = packed(rng, lengths, **shape)
    d_out, d_lse = d_outputs(rng, problem)
    option = data.draw(st.sampled_from(OPTIONS))
    options = options_of_all_kinds(rng, problem)[option]
    expected = of_padded(d_out, d_lse, problem, options)
    threads = data.draw(st.sampled_from([1, 2, 3]))
    ours = gradients(d_out, problem, d_lse=d_lse, num_threads=threads, **options)
    assert_same_gradients(ours, expected, option)
