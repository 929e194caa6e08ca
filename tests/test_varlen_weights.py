"""attention_weights_varlen: those of the padded batch, and of each sequence alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits, inputs
from reference import Array
from varlen_kit import SHORT, Packed, as_padded, options_of_all_kinds, packed, untyped

OPTIONS = [
    name
    for name in options_of_all_kinds(np.random.default_rng(0), packed(np.random.default_rng(0)))
    if name not in ("dropout", "all")
]


def weights(problem: Packed, **options: Any) -> Any:
    return attncore.attention_weights_varlen(
        problem.query, problem.key, problem.queries, problem.keys, **options
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_the_padded_batch(isa: str, dtype: Any, option: str, rng: np.random.Generator) -> None:
    """To the bit, whatever the padding would hold; what is not there is 0."""
    problem = packed(rng, SHORT, heads=4, kv_heads=2, dim=20, dtype=dtype)
    options = options_of_all_kinds(rng, problem)[option]
    query, key, _ = problem.padded(fill=np.nan)
    ours = weights(problem, **options)
    expected = attncore.attention_weights(query, key, **as_padded(problem, options))
    assert ours.shape == (problem.batch, 4, *problem.longest)
    assert_same_bits(ours, expected)
    for entry, (rows, keys) in enumerate(SHORT):
        assert not ours[entry, :, rows:].any()
        assert not ours[entry, :, :, keys:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_alone(isa: str, dtype: Any, rng: np.random.Generator) -> None:
    problem = packed(rng, SHORT, heads=4, kv_heads=2, dim=20, dtype=dtype)
    ours = weights(problem, causal=True)
    for entry, (rows, keys) in enumerate(SHORT):
        if rows == 0 or keys == 0:
            continue
        query, key, _ = problem.alone(entry)
        alone = attncore.attention_weights(query, key, layout="bshd", causal=True)
        assert_same_bits(np.ascontiguousarray(ours[entry, :, :rows, :keys]), alone)


@pytest.mark.parametrize("top_k", [None, 1, 5])
@pytest.mark.parametrize("rows", [0, -1, [3, -2, 3], (), np.array([12, 30], np.uint8), range(4)])
def test_rows(isa: str, rows: Any, top_k: int | None, rng: np.random.Generator) -> None:
    """Negative ones count from each sequence's own end."""
    problem = packed(rng, SHORT, heads=4, kv_heads=2, dim=20)
    whole = weights(problem, top_k=top_k, causal=True)
    ours = weights(problem, rows=rows, top_k=top_k, causal=True)
    if top_k is None:
        whole, ours = (whole,), (ours,)
    chosen = np.atleast_1d(np.asarray(rows if np.ndim(rows) == 0 else list(rows), np.int64))
    for ours_one, all_rows, nothing in zip(
        ours, whole, (0,) if top_k is None else (-1, 0), strict=True
    ):
        expected = np.full_like(ours_one, nothing)
        assert ours_one.shape[:3] == (problem.batch, 4, len(chosen))
        for entry, (queries, _) in enumerate(SHORT):
            for i, row in enumerate(chosen):
                at = row if row >= 0 else row + queries
                if 0 <= at < queries:
                    expected[entry, :, i] = all_rows[entry, :, at]
        assert_same_bits(ours_one, expected)


def test_rows_of_each_sequence(isa: str, rng: np.random.Generator) -> None:
    problem = packed(rng, SHORT, heads=2, dim=20)
    whole = weights(problem)
    rows = rng.integers(-37, 37, (problem.batch, 3))
    ours = weights(problem, rows=rows)
    for entry, (queries, _) in enumerate(SHORT):
        for i, row in enumerate(rows[entry]):
            at = row if row >= 0 else row + queries
            own = whole[entry, :, at] if 0 <= at < queries else np.zeros_like(whole[entry, :, 0])
            assert_same_bits(np.ascontiguousarray(ours[entry, :, i]), np.ascontiguousarray(own))


def test_they_are_what_attention_takes(isa: str, rng: np.random.Generator) -> None:
    """weights · values = out."""
    problem = packed(rng, SHORT, heads=4, kv_heads=4, dim=20, value_dim=12)
    ours = weights(problem, causal=True)
    out, _ = problem.attend(causal=True)
    ends = list(pairwise(problem.queries)), list(pairwise(problem.keys))
    for entry, ((first, end), (key, last)) in enumerate(zip(*ends, strict=True)):
        rows = ours[entry, :, : end - first, : last - key].astype(np.float64)
        mixed = rows @ problem.value[key:last].swapaxes(0, 1)
        np.testing.assert_allclose(out[first:end].swapaxes(0, 1), mixed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ends", [[0], [0, 0], [0, 0, 0]])
def test_nothing_at_all(ends: list[int]) -> None:
    empty = np.zeros((0, 2, 8), np.float32)
    batch = len(ends) - 1
    assert attncore.attention_weights_varlen(empty, empty, ends, ends).shape == (batch, 2, 0, 0)
    assert attncore.attention_weights_varlen(empty, empty, ends, ends, rows=[]).shape[2] == 0


def test_rows_in_memory_s_end(isa: str) -> None:
    """A query that the last sequence lacks would lie past the array: it is not read."""
    query: Array = np.full((12, 1, 4), np.nan, np.float32)
    query[:7] = 1
    key = np.ones((7, 1, 4), np.float32)
    ours = attncore.attention_weights_varlen(query[:7], key, [0, 5, 7], [0, 5, 7], rows=[4, 1])
    np.testing.assert_allclose(ours[0, 0], np.full((2, 5), 0.2), rtol=1e-6)
    np.testing.assert_array_equal(ours[1, 0], [[0] * 5, [0.5, 0.5, 0, 0, 0]])


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rows of floats": ({"rows": [0.5]}, TypeError, r"rows: dtype is float64, accepted is an int"),
    "rows past the longest": ({"rows": [0, 3]}, ValueError, r"rows: has the index 3, query has 3"),
    "rows before it": ({"rows": -4}, ValueError, r"rows: has the index -4, query has 3 rows"),
    "3-D rows": ({"rows": [[[0]]]}, ValueError, r"rows: has 3 dimensions, must have at most 2"),
    "rows of three": (
        {"rows": [[0], [1], [2]]},
        ValueError,
        r"rows: shape is \(3, 1\), must be \(rows,\) or \(2, rows\)",
    ),
    "no top": ({"top_k": 0}, ValueError, r"top_k: is 0, must be 1 … 4, the number of keys"),
    "too many": ({"top_k": 5}, ValueError, r"top_k: is 5, must be 1 … 4"),
    "top of a float": ({"top_k": 1.0}, TypeError, r"top_k: must be an int, is float"),
    "layout": ({"layout": "bshd"}, TypeError, r"unexpected keyword argument 'layout'"),
    "dropout": ({"dropout_p": 0.5}, TypeError, r"unexpected keyword argument 'dropout_p'"),
    "softcap": ({"softcap": -1.0}, ValueError, r"softcap: is -1"),
    "falling": ({"cu_query_lengths": [0, 5, 4]}, ValueError, r"cu_query_lengths: entry 1 is 5"),
    "too short": ({"cu_key_lengths": [0, 4]}, ValueError, r"cu_key_lengths: .*\(2.*\(3"),
    "ends early": ({"cu_key_lengths": [0, 4, 5]}, ValueError, r"cu_key_lengths: ends with 5"),
    "a scalar": ({"cu_query_lengths": 4}, ValueError, r"cu_query_lengths: is a scalar"),
    "no ints": ({"cu_query_lengths": [0.0, 3.0, 4.0]}, TypeError, r"cu_query_lengths: dtype is"),
    "None": ({"cu_key_lengths": None}, TypeError, r"cu_key_lengths: must be an array of ints"),
    "a list": ({"query": [[[1.0]]]}, TypeError, r"query: must be a NumPy array, is list"),
    "a batch": ({"key": np.zeros((1, 6, 2, 8), np.float32)}, ValueError, r"key: has 4 dimensions"),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("rows", [None, [0, -1]])
def test_errors(case: str, rows: Any, rng: np.random.Generator) -> None:
    change, exception, message = ERRORS[case]
    query, key, _ = (a[0].swapaxes(0, 1) for a in inputs(rng, 4, 6, heads=2, dim=8))
    arguments: dict[str, Any] = {
        "query": query,
        "key": key,
        "cu_query_lengths": [0, 3, 4],
        "cu_key_lengths": [0, 4, 6],
        "rows": rows,
    }
    with pytest.raises(exception, match=message):
        untyped.attention_weights_varlen(**(arguments | change))
