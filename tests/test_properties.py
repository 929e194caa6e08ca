"""What must hold for any problem: hypothesis chooses it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import attncore
from kit import Inputs, assert_same_bits, check, inputs
from reference import Array

# The fixture `isa` stays the same for all examples of a test: that is what it is for.
some = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def problems(draw: Any, dtypes: Any = (np.float32, np.float64)) -> Inputs:
    kv_heads = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return inputs(
        rng,
        draw(st.integers(1, 70)),
        draw(st.integers(1, 200)),
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * draw(st.sampled_from([1, 2, 3, 8])),
        kv_heads=kv_heads,
        dim=draw(st.integers(1, 70)),
        value_dim=draw(st.integers(1, 70)),
        dtype=draw(st.sampled_from(dtypes)),
    )


def close(ours: Array, theirs: Array, scale: float = 1.0) -> None:
    atol = (1e-12 if ours.dtype == np.float64 else 1e-5) * scale
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def run(q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Array]:
    out, lse = attncore.attention(q, k, v, return_lse=True, **options)
    return out, lse


@some
@given(problem=problems(), seed=st.integers(0, 2**32))
def test_permuting_the_keys_leaves_the_result(isa: str, problem: Inputs, seed: int) -> None:
    q, k, v = problem
    rng = np.random.default_rng(seed)
    order = rng.permutation(k.shape[2])
    mask = rng.random((q.shape[2], k.shape[2])) < 0.8
    out, lse = run(q, k, v, mask=mask)
    shuffled, its_lse = run(q, k[:, :, order], v[:, :, order], mask=mask[:, order])
    close(shuffled, out)
    close(its_lse, lse)


@some
@given(problem=problems(), constant=st.floats(-30, 30))
def test_a_constant_added_to_the_scores_leaves_the_result(
    isa: str, problem: Inputs, constant: float
) -> None:
    out, lse = run(*problem)
    bias = np.full((*problem[0].shape[2:3], 1), constant, np.float32)
    shifted, its_lse = run(*problem, bias=bias)
    close(shifted, out, 3)
    close(its_lse - bias[0, 0], lse, 3)


@some
@given(problem=problems(), data=st.data())
def test_splitting_the_keys_and_merging_gives_the_whole(
    isa: str, problem: Inputs, data: st.DataObject
) -> None:
    q, k, v = problem
    cuts = sorted(data.draw(st.lists(st.integers(0, k.shape[2]), max_size=4)))
    ends = [0, *cuts, k.shape[2]]
    parts = [run(q, k[:, :, a:b], v[:, :, a:b]) for a, b in pairwise(ends)]
    out, lse = attncore.merge([part[0] for part in parts], [part[1] for part in parts])
    whole, its_lse = run(q, k, v)
    close(out, whole)
    close(lse, its_lse)


@some
@given(problem=problems(), data=st.data())
def test_a_slice_of_the_batch_is_the_slice_of_the_result(
    isa: str, problem: Inputs, data: st.DataObject
) -> None:
    batch = problem[0].shape[0]
    first = data.draw(st.integers(0, batch))
    last = data.draw(st.integers(first, batch))
    causal = data.draw(st.booleans())
    out, lse = run(*problem, causal=causal)
    part, its_lse = run(*(a[first:last] for a in problem), causal=causal)
    assert_same_bits(part, out[first:last])
    assert_same_bits(its_lse, lse[first:last], "lse")


@some
@given(problem=problems(), factor=st.sampled_from([-2.0, 0.25, 1.0, 8.0]))
def test_scaling(isa: str, problem: Inputs, factor: float) -> None:
    """Powers of two are exact: on the values to the last bit, on the scores through scale."""
    q, k, v = problem
    out, lse = run(q, k, v)
    scaled, its_lse = run(q, k, v * v.dtype.type(factor))
    assert_same_bits(scaled, out * v.dtype.type(factor))
    assert_same_bits(its_lse, lse, "lse")
    stretched, _ = run(q * q.dtype.type(factor), k, v, scale=q.shape[3] ** -0.5 / factor)
    close(stretched, out)


@some
@given(problem=problems(), constant=st.floats(-4, 4))
def test_equal_values_come_out_unchanged(isa: str, problem: Inputs, constant: float) -> None:
    """The weights of a row sum to 1."""
    q, k, v = problem
    out, _ = run(q, k, np.full_like(v, constant))
    close(out, np.full_like(out, constant), 4)


@some
@given(problem=problems(), data=st.data())
def test_a_causal_row_ignores_what_follows(isa: str, problem: Inputs, data: st.DataObject) -> None:
    q, k, v = problem
    offset = data.draw(st.integers(0, 30))
    row = data.draw(st.integers(0, q.shape[2] - 1))
    count = min(row + offset + 1, k.shape[2])
    out, _ = run(q, k, v, causal=True, query_offset=offset)
    alone, _ = run(q[:, :, row : row + 1], k[:, :, :count], v[:, :, :count])
    close(out[:, :, row : row + 1], alone)


@some
@given(
    problem=problems((np.float32, np.float16)),
    causal=st.booleans(),
    softcap=st.one_of(st.none(), st.floats(0.1, 50)),
    scale=st.one_of(st.none(), st.floats(-2, 2)),
    window=st.tuples(st.one_of(st.none(), st.integers(0, 60)), st.integers(0, 60)),
    offset=st.one_of(st.none(), st.integers(-80, 220)),
)
def test_against_the_reference(isa: str, problem: Inputs, **options: Any) -> None:
    options["query_offset"] = options.pop("offset")
    check(*problem, **options)
