"""AttentionState: many pieces, merges, extreme scores, stretches of large pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import attncore
from kit import Inputs, assert_same_bits, compare_results, inputs
from reference import Array, plain, reference
from state_kit import in_pieces, make_state, sizes_to_cuts, updates
from test_properties import problems, some

LOWEST = np.finfo(np.float32).min
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


def hold_against_the_reference(
    inputs: Inputs, results: tuple[Array, Array], **options: Any
) -> None:
    compare_results(*results, reference(*inputs, **options), plain(*inputs, **options))


@dtypes
@pytest.mark.parametrize("scores", ["random", "rising slowly", "rising fast", "falling"])
def test_thousands_of_single_keys(dtype: str, scores: str, rng: np.random.Generator) -> None:
    """The error does not grow with the number of pieces, wherever the maximum is."""
    count = 6000
    q, k, v = inputs(rng, 2, count, heads=1, dim=8, value_dim=5, dtype=dtype)
    v += 1  # means that rounding may drift from
    slope = {"random": 0, "rising slowly": 1e-3, "rising fast": 10, "falling": -0.01}[scores]
    options = {"bias": (slope * np.arange(count, dtype=np.float32))[None]}
    results = in_pieces(q, k, v, sizes_to_cuts((1,), count), **options)
    hold_against_the_reference((q, k, v), results, **options)


@pytest.mark.parametrize("scores", ["random", "rising slowly"])
def test_sums_of_float64_are_kept_in_more(scores: str, rng: np.random.Generator) -> None:
    """20000 pieces in float64 cost less than a unit in the last place."""
    count = 20_000
    value = 1 + rng.random((1, 1, count, 2))
    one = np.ones((1, 1, 1, 1))
    key = np.zeros((1, 1, count, 1))
    if scores == "rising slowly":
        key[...] = np.linspace(0, 30, count)[:, None]
    state = attncore.AttentionState(one, value_dim=2, scale=1.0)
    for at in range(count):
        state.update(key[:, :, at : at + 1], value[:, :, at : at + 1])
    out, lse = state.result()
    weights = np.exp(key[0, 0].astype(np.longdouble))
    exact = (weights * value[0, 0]).sum(axis=0) / weights.sum()
    np.testing.assert_allclose(out[0, 0, 0], np.asarray(exact, float), rtol=4e-16)
    np.testing.assert_allclose(lse[0, 0, 0], float(np.log(weights.sum())), rtol=4e-16)


@dtypes
@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_huge_scores(isa: str, dtype: str, size: float, rng: np.random.Generator) -> None:
    q, k, v = inputs(rng, 7, 300, dtype=dtype)
    q *= size
    hold_against_the_reference((q, k, v), in_pieces(q, k, v, sizes_to_cuts((23, 1), 300)))


@dtypes
@pytest.mark.parametrize("lowest", [LOWEST, -1e30, 1e30])
def test_scores_without_digits_for_a_logarithm(
    isa: str, dtype: str, lowest: float, rng: np.random.Generator
) -> None:
    """Rows of finfo.min are uniform: lse cannot say how many keys it stands for, the sums can."""
    q, k, v = inputs(rng, 3, 70, dtype=dtype)
    bias = np.full((3, 70), lowest, np.float32)
    bias[1, 40:] = 0
    options = {"bias": bias, "scale": 0.0}
    results = in_pieces(q, k, v, sizes_to_cuts((60, 10), 70), **options)
    hold_against_the_reference((q, k, v), results, **options)


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("where", ["key", "value"])
def test_visible_infinities(isa: str, where: str, number: float, rng: np.random.Generator) -> None:
    """They go through in the rows that see them, and no further."""
    q, k, v = (np.abs(array) for array in inputs(rng, 4, 50, dtype=np.float64))
    (k if where == "key" else v)[0, 1, 20, 3] = number
    mask = np.ones((4, 50), bool)
    mask[1, 20] = False
    options = {"mask": mask}
    out, lse = in_pieces(q, k, v, sizes_to_cuts((9,), 50), **options)
    exact = reference(q, k, v, **options)
    np.testing.assert_allclose(out, exact.out.astype(float), rtol=0, atol=1e-13)
    np.testing.assert_allclose(lse, exact.lse.astype(float), rtol=0, atol=1e-13)
    assert np.isfinite(out[0, :, 1]).all()
    assert not np.isfinite(out[0, 1, 0]).all() or (where == "key" and number == -np.inf)


@dtypes
def test_values_near_the_largest(dtype: str, rng: np.random.Generator) -> None:
    q, k, v = inputs(rng, 3, 40, dtype=dtype)
    v[...] = np.finfo(dtype).max / 2**20
    out, _ = in_pieces(q, k, v, sizes_to_cuts((1,), 40))
    np.testing.assert_allclose(out / v[0, 0, 0, 0], 1, rtol=1e-6)


@some
@given(problem=problems(), data=st.data())
def test_any_partition_and_any_merge_tree(isa: str, problem: Inputs, data: Any) -> None:
    """Keys go piece by piece to some states, which are merged in any order."""
    q, k, v = problem
    keys = k.shape[2]
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    count = data.draw(st.integers(1, 5), "states")
    cuts = data.draw(st.lists(st.integers(0, keys), max_size=12).map(sorted), "cuts")
    options: dict[str, Any] = {
        "mask": rng.random((q.shape[2], keys)) < 0.7,
        "causal": True,
        "query_offset": data.draw(st.integers(-5, keys), "offset"),
        "sinks": rng.standard_normal(q.shape[1], dtype=np.float32),
    }
    states = [make_state(q, v, **options) for _ in range(count)]
    pieces = list(zip([0, *cuts], [*cuts, keys], strict=True))
    order = rng.permutation(len(pieces))
    parts = list(updates(k, v, pieces, **options))
    for number in order:
        arrays, own = parts[number]
        states[rng.integers(count)].update(*arrays, **own, first_key=pieces[number][0])
    while len(states) > 1:
        other = states.pop(rng.integers(len(states)))
        before = other.result()
        states[rng.integers(len(states))].merge(other)
        for ours, theirs in zip(other.result(), before, strict=True):
            assert_same_bits(ours, theirs)
    hold_against_the_reference((q, k, v), states[0].result(), **options)


def test_what_rounding_took_is_merged() -> None:
    """2000 weights of less than half a unit in the last place of the first one."""
    state, whole = (attncore.AttentionState(np.ones((1, 1)), scale=1.0) for _ in range(2))
    state.update(np.zeros((1, 1)), np.ones((1, 1)))
    for _ in range(2000):
        state.update(np.full((1, 1), -37.0), np.full((1, 1), 2.0))
    whole.merge(state)
    rest = 2000 * np.exp(-37.0)
    for out, lse in (state.result(), whole.result()):
        np.testing.assert_allclose(lse.item(), np.log1p(rest), rtol=0, atol=4e-16)
        np.testing.assert_allclose(out.item(), 1 + rest, rtol=0, atol=4e-16)


def test_the_order_of_merging_changes_only_rounding(rng: np.random.Generator) -> None:
    q, k, v = inputs(rng, 9, 600, dtype=np.float64)
    k[:, :, 200:] *= 30  # other maxima
    results = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        whole = attncore.AttentionState(q)
        for at in order:
            state = attncore.AttentionState(q)
            state.update(k[:, :, 200 * at : 200 * (at + 1)], v[:, :, 200 * at : 200 * (at + 1)])
            whole.merge(state)
        results.append(whole.result())
    for out, lse in results[1:]:
        np.testing.assert_allclose(out, results[0][0], rtol=0, atol=2e-15)
        np.testing.assert_allclose(lse, results[0][1], rtol=1e-15)


def large_options(rng: np.random.Generator, batch: int, keys: int) -> dict[str, Any]:
    """All that a stretch of keys must take its own part of."""
    return {
        "causal": True,
        "query_offset": rng.integers(keys // 2, keys, batch),
        "mask": rng.random((batch, 1, 1, keys)) < 0.8,
        "bias": (
            rng.standard_normal((1, 2, 1, keys)).astype(np.float32),
            rng.standard_normal((batch, 1, 3, 1)).astype(np.float32),
        ),
        "alibi": 1e-3 * rng.random((batch, 2)).astype(np.float32),
        "query_segments": rng.integers(0, 2, (batch, 3)),
        "key_segments": np.sort(rng.integers(0, 2, (batch, keys))),
        "query_lengths": rng.integers(2, 4, batch),
        "key_lengths": rng.integers(keys // 3, keys, batch),
    }


@pytest.mark.parametrize("batch", [1, 3])
def test_large_pieces_are_walked_in_stretches(
    isa: str, batch: int, rng: np.random.Generator
) -> None:
    """4 MB at a time where float32 becomes float64; batch entries apart from each other."""
    q, k, v = inputs(rng, 3, 9000, batch=batch, dim=33, value_dim=31)
    options = large_options(rng, batch, 9000)
    results = in_pieces(q, k, v, [(0, 9000)], dtype="float64", **options)
    exact = (q.astype(float), k.astype(float), v.astype(float))
    hold_against_the_reference(exact, results, **options)
    for entry in range(batch):  # its bits are its own
        own = {
            name: tuple(o[entry : entry + 1] if len(o) > 1 else o for o in option)
            if isinstance(option, tuple)
            else option
            if name == "causal"
            else option[entry : entry + 1]
            for name, option in options.items()
        }
        at = slice(entry, entry + 1)
        alone = in_pieces(q[at], k[at], v[at], [(0, 9000)], dtype="float64", **own)
        for ours, theirs in zip(results, alone, strict=True):
            assert_same_bits(ours[at], theirs)


def test_stretches_are_as_pieces(isa: str, rng: np.random.Generator) -> None:
    """A piece of 40 MB has the bits of its stretches, one after another."""
    q, k, v = inputs(rng, 2, 40_000, dim=64, heads=2)
    whole = in_pieces(q, k, v, [(0, 40_000)])
    stretch = 32 * 2**20 // (2 * 2 * 64 * 4) // 2048 * 2048
    for ours, theirs in zip(
        in_pieces(q, k, v, sizes_to_cuts((stretch,), 40_000)), whole, strict=True
    ):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_no_bit(isa: str, threads: int, rng: np.random.Generator) -> None:
    q, k, v = inputs(rng, 70, 900, batch=2, heads=4, kv_heads=2)
    results = []
    for number in (threads, 1):
        states = [attncore.AttentionState(q) for _ in range(2)]
        for state, at in zip(states, (slice(500), slice(500, None)), strict=True):
            state.update(k[:, :, at], v[:, :, at], num_threads=number)
        states[0].merge(states[1], num_threads=number)
        results.append(states[0].result(num_threads=number))
    for ours, theirs in zip(*results, strict=True):
        assert_same_bits(ours, theirs)
