"""explain of packed sequences and of pages: the plan of the call that the arguments are those of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits, inputs
from kit_paged import Paged, into_pages
from kit_quantised import stored_pages
from reference import Array
from varlen_kit import Packed, options_of_all_kinds, packed, untyped

LENGTHS = [(150, 140), (0, 3), (31, 0), (1, 4000), (97, 300)]
NAMES = ("none", "causal", "window", "mask", "segments", "lengths", "sinks")


ALONE: dict[str, Any] = {"num_threads": 1}  # a plan is soon made then


def explain_packed(problem: Packed, **options: Any) -> attncore.Plan:
    options = ALONE | options
    return untyped.explain_varlen(*problem.arrays, problem.queries, problem.keys, **options)


def explain_pages(paged: Paged, query: Array, **options: Any) -> attncore.Plan:
    options = ALONE | options
    return attncore.explain_paged(
        query,
        paged.key_pages,
        paged.value_pages,
        paged.block_table,
        paged.key_lengths,
        page_layout=paged.page_layout,  # type: ignore[arg-type]
        **options,
    )


def assert_same_work(ours: attncore.Plan, theirs: Sequence[attncore.Plan]) -> None:
    """The tiles of all of them, by the same kernel."""
    assert ours.flops == sum(plan.flops for plan in theirs)
    assert ours.tasks >= 1
    assert ours.key_splits == max(plan.key_splits for plan in theirs)
    for plan in theirs:
        assert (ours.isa, ours.kernel, ours.key_tile) == (plan.isa, plan.kernel, plan.key_tile)
    assert ours.isa in str(ours)
    assert ours.floor_seconds > 0
    assert ours.estimated_seconds > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", ["causal", "window"])
def test_packed_sequences(isa: str, dtype: Any, option: str, rng: np.random.Generator) -> None:
    """A sequence's tiles are those that it has alone."""
    problem = packed(rng, LENGTHS, heads=4, kv_heads=2, dtype=dtype)
    options = options_of_all_kinds(rng, problem)[option]
    plan = explain_packed(problem, **options)
    alone = [
        untyped.explain(*problem.alone(entry), layout="bshd", **options, **ALONE)
        for entry in range(problem.batch)
    ]
    assert_same_work(plan, alone)
    assert plan.threads == 1


@pytest.mark.parametrize("option", NAMES)
def test_options_of_packed_sequences(option: str, rng: np.random.Generator) -> None:
    """They are the call's; what it may not see is not counted, and nothing of the caller's changes."""
    problem = packed(rng, LENGTHS, heads=4, kv_heads=2)
    options = options_of_all_kinds(rng, problem)[option]
    before = [array.copy() for array in problem.arrays]
    plan, whole = explain_packed(problem, **options), explain_packed(problem)
    assert plan.flops < whole.flops or option in ("none", "mask", "segments", "sinks")
    assert plan.flops <= whole.flops
    for now, then in zip(problem.arrays, before, strict=True):
        assert_same_bits(now, then)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_pages(isa: str, dtype: Any, queries: int, layout: str, rng: np.random.Generator) -> None:
    """The tiles of attention on the gathered arrays."""
    q, k, v = inputs(rng, queries, 3000, batch=3, heads=6, kv_heads=2, dim=24, dtype=dtype)
    paged = into_pages(rng, k, v, [3000, 41, 0], 16).in_layout(layout)
    before = paged.key_pages.copy()
    plan = explain_pages(paged, q, causal=True)
    gathered = attncore.explain(
        q, paged.key, paged.value, causal=True, key_lengths=paged.key_lengths, **ALONE
    )
    assert_same_work(plan, [gathered])
    assert plan.workspace_bytes >= 0
    assert_same_bits(paged.key_pages, before)
    by_token = explain_pages(paged, q.swapaxes(1, 2), causal=True, layout="bshd")
    assert by_token.flops == plan.flops


def test_packed_queries_of_pages(isa: str, rng: np.random.Generator) -> None:
    q, k, v = inputs(rng, 40, 300, batch=3, heads=6, kv_heads=2)
    paged = into_pages(rng, k, v, [300, 41, 8], 16)
    counts = [40, 1, 5]
    line = np.concatenate([q[b, :, :n].swapaxes(0, 1) for b, n in enumerate(counts)])
    ends = np.cumsum([0, *counts])
    plan = explain_pages(paged, line, causal=True, cu_query_lengths=ends)
    assert plan.flops == explain_pages(paged, q, causal=True, query_lengths=counts).flops
    with pytest.raises(ValueError, match=r"layout: is 'bshd', packed queries are"):
        explain_pages(paged, line, cu_query_lengths=ends, layout="bshd")
    with pytest.raises(ValueError, match=r"query: has 4 dimensions, packed queries have 3"):
        explain_pages(paged, q, cu_query_lengths=ends)


@pytest.mark.parametrize("storage", ["int8", "int4", "float8_e4m3fn"])
def test_quantised_pages(isa: str, storage: str, rng: np.random.Generator) -> None:
    """Fewer bytes are read."""
    q, k, v = inputs(rng, 1, 2000, batch=2, heads=4, kv_heads=2, dim=64)
    paged = into_pages(rng, k, v, [2000, 500], 16, poison=0.0)
    smaller, scales = stored_pages(paged, (storage, storage))
    plan = explain_pages(smaller, q, **scales)
    plain = explain_pages(paged, q)
    assert plan.flops == plain.flops
    assert plan.bytes < plain.bytes / 3


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "out": ({"out": None}, TypeError, r"unexpected keyword argument 'out'"),
    "dropout": ({"dropout_p": 0.5}, TypeError, r"unexpected keyword argument 'dropout_p'"),
    "softcap": ({"softcap": 0.0}, ValueError, r"softcap: is 0"),
    "window": ({"window": (-1, None)}, ValueError, r"window: has the bound -1"),
    "threads": ({"num_threads": 0}, ValueError, r"num_threads: is 0"),
    "causal": ({"causal": 1}, TypeError, r"causal: must be a bool, is int"),
}


def test_threads(rng: np.random.Generator) -> None:
    """They share the tasks, which are the same."""
    q, k, v = inputs(rng, 600, 600, batch=2)
    paged, problem = into_pages(rng, k, v, [600, 500], 16), packed(rng, [(600, 600), (600, 500)])
    pages = [explain_pages(paged, q, num_threads=n) for n in (1, 2)]
    sequences = [explain_packed(problem, num_threads=n) for n in (1, 2)]
    for one, two in (pages, sequences):
        assert (one.threads, two.threads) == (1, 2)
        assert (one.flops, one.tasks) == (two.flops, two.tasks)


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str, rng: np.random.Generator) -> None:
    change, exception, message = ERRORS[case]
    q, k, v = inputs(rng, 4, 30, batch=2)
    with pytest.raises(exception, match=message):
        explain_pages(into_pages(rng, k, v, [30, 5], 4), q, **change)
    with pytest.raises(exception, match=message):
        explain_packed(packed(rng, [(3, 4), (1, 2)]), **change)


def test_errors_of_the_arrays(rng: np.random.Generator) -> None:
    q, k, v = inputs(rng, 4, 30, batch=2)
    pages = into_pages(rng, k, v, [30, 5], 4)
    arrays = pages.key_pages, pages.value_pages
    packed_rows: list[tuple[Any, Any, str]] = [
        ([0, 3, 5], [0, 4, 6], r"cu_query_lengths: .*5"),
        ([0, 3, 4], [0, 9, 6], r"cu_key_lengths: "),
        ([0, 3, 4], [0, 6], r"cu_key_lengths: "),
    ]
    problem = packed(rng, [(3, 4), (1, 2)])
    for queries, keys, message in packed_rows:
        with pytest.raises(ValueError, match=message):
            attncore.explain_varlen(*problem.arrays, queries, keys)
    with pytest.raises(TypeError, match=r"'layout'"):
        explain_packed(problem, layout="bshd")
    with pytest.raises(ValueError, match=r"block_table: entry \(0, 0\) is 99"):
        attncore.explain_paged(q, *arrays, [[99, 0], [1, 2]], [5, 5])
    with pytest.raises(ValueError, match=r"key_lengths: "):
        attncore.explain_paged(q, *arrays, pages.block_table, [30, 10**6])
    with pytest.raises(TypeError, match=r"block_table: must be an array, is NoneType"):
        attncore.explain_paged(q, *arrays, None, [30, 5])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"value_pages: .*"):
        attncore.explain_paged(q, arrays[0], None, pages.block_table, [30, 5])  # type: ignore[arg-type]
