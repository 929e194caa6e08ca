"""attention_varlen: packed sequences are the padded batch, and each has the bits that it has alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit import DTYPES, assert_same_bits, compare_results, inputs
from reference import Result, plain, reference
from test_peers import near, torch_sdpa
from test_properties import some
from varlen_kit import (
    OPTIONS,
    SHORT,
    Packed,
    as_padded,
    options_of_all_kinds,
    packed,
    padded,
    unpadded,
    untyped,
)

ALONE = ("none", "causal", "window", "offset", "alibi", "relative bias", "sinks")


def check_alone(problem: Packed, **options: Any) -> None:
    """Each sequence against `attention` on it."""
    out, lse = problem.attend(**options)
    assert out.dtype == problem.query.dtype
    assert lse.dtype == (np.float64 if out.dtype == np.float64 else np.float32)
    for entry in range(problem.batch):
        alone, its_lse = untyped.attention(
            *problem.alone(entry), layout="bshd", return_lse=True, **options
        )
        tokens = problem.tokens(entry)[0]
        assert_same_bits(out[tokens], alone, f"sequence {entry}")
        assert_same_bits(lse[:, tokens], its_lse, f"lse of sequence {entry}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("option", ALONE)
def test_a_sequence_has_the_bits_that_it_has_alone(
    isa: str, dtype: Any, group: int, option: str, rng: Any
) -> None:
    problem = packed(rng, heads=2 * group, kv_heads=2, dim=40, value_dim=24, dtype=dtype)
    check_alone(problem, **options_of_all_kinds(rng, problem)[option])


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sequences_beside_short_ones(isa: str, dtype: Any, rng: Any) -> None:
    """Splits, super-blocks and folded sums go by the sequence, not by the longest one."""
    lengths = [(3, 1100), (1, 5000), (700, 2100), (4, 2048), (2048, 40), (33, 2049), (1, 1)]
    for dim in (16, 70):
        problem = packed(rng, lengths, heads=4, kv_heads=2, dim=dim, dtype=dtype)
        check_alone(problem)
        check_alone(problem, causal=True)


def test_wide_heads(isa: str, rng: Any) -> None:
    """State of so many dims leaves room for few parts of the keys, where the longest folds its sums for fewer still."""
    lengths = [(2, 2000), (1, 2300), (3, 1100)]
    check_alone(packed(rng, lengths, heads=1, dim=8, value_dim=3000, dtype=np.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_the_padded_batch(isa: str, dtype: Any, option: str, rng: Any) -> None:
    """Whatever the padding holds; masks and biases are the batch's own, dropout's coins too."""
    problem = packed(rng, heads=4, kv_heads=2, dtype=dtype)
    options = options_of_all_kinds(rng, problem)[option]
    out, lse = problem.attend(**options)
    whole, its_lse = untyped.attention(
        *problem.padded(np.nan), return_lse=True, **as_padded(problem, options)
    )
    assert_same_bits(out, unpadded(whole, problem.queries))
    assert_same_bits(lse.T, unpadded(its_lse, problem.queries), "lse")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_against_the_reference(isa: str, dtype: Any, option: str, rng: Any) -> None:
    problem = packed(rng, SHORT, heads=2, kv_heads=1, dim=24, value_dim=17, dtype=dtype)
    options = options_of_all_kinds(rng, problem)[option]
    batch = as_padded(problem, options)

    def result(evaluate: Any) -> Result:
        made = evaluate(*problem.padded(), **batch)
        out, lse = (unpadded(a, problem.queries) for a in (made.out, made.lse))
        return Result(out, lse.T, np.empty(0), made.magnitude, made.score_magnitude)

    compare_results(*problem.attend(**options), result(reference), result(plain))


def test_only_out(isa: str, rng: Any) -> None:
    problem = packed(rng)
    out, lse = problem.attend()
    alone = untyped.attention_varlen(*problem.arrays, problem.queries, problem.keys)
    assert isinstance(alone, np.ndarray)
    assert_same_bits(alone, out)
    assert out.shape == (problem.queries[-1], 2, 32)
    assert lse.shape == (2, problem.queries[-1])


def test_lse(isa: str, rng: Any) -> None:
    """(head, token), natural logarithm; -inf, or the sink, where a query sees nothing."""
    problem = packed(rng, [(3, 5), (4, 0), (2, 7)], heads=4, kv_heads=2, dtype=float)
    _, lse = problem.attend()
    q, k, _ = problem.alone(2)
    scores = np.einsum("ihd,jhd->hij", q, np.repeat(k, 2, axis=1)) / np.sqrt(32)
    np.testing.assert_allclose(lse[:, 7:], np.log(np.exp(scores).sum(axis=2)), rtol=1e-13)
    assert (lse[:, 3:7] == -np.inf).all()
    sinks = np.float32(rng.standard_normal(4))
    out, lse = problem.attend(sinks=sinks)
    assert (out[3:7] == 0).all()
    np.testing.assert_array_equal(lse[:, 3:7], np.float64(sinks)[:, None].repeat(4, axis=1))


@pytest.mark.parametrize(
    "lengths", [[], [(0, 0)], [(0, 0)] * 5, [(0, 9), (0, 4)], [(3, 0), (9, 0)], [(0, 2), (2, 0)]]
)
def test_nothing_to_see(isa: str, lengths: list[tuple[int, int]], rng: Any) -> None:
    problem = packed(rng, lengths, heads=6, kv_heads=2)
    for threads in (1, 2):
        out, lse = problem.attend(num_threads=threads, causal=True)
        assert out.shape == problem.query.shape
        assert lse.shape == (6, len(out))
        assert (out == 0).all()
        assert (lse == -np.inf).all()


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 3000), (200, 200), (96, 7)])
def test_one_sequence_is_attention(isa: str, queries: int, keys: int, rng: Any) -> None:
    check_alone(packed(rng, [(queries, keys)], heads=3), causal=True)


def as_uint8(ends: Any) -> Any:
    return ends.astype(np.uint8)


@pytest.mark.parametrize(
    "convert",
    [list, tuple, np.int32, np.int64, as_uint8, np.uint64, lambda e: np.repeat(e, 2)[::2]],
)
def test_kinds_of_cumulative_lengths(isa: str, convert: Any, rng: Any) -> None:
    problem = packed(rng, [(3, 5), (0, 4), (60, 70)])
    expected, _ = problem.attend()
    ends = convert(problem.queries), convert(problem.keys)
    assert_same_bits(untyped.attention_varlen(*problem.arrays, *ends), expected)


@some
@given(data=st.data())
def test_any_lengths(isa: str, data: st.DataObject) -> None:
    counts = st.one_of(st.integers(0, 3), st.integers(0, 150))
    lengths = data.draw(st.lists(st.tuples(counts, counts), max_size=12))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    kv_heads = data.draw(st.integers(1, 2))
    shape = {
        "heads": kv_heads * data.draw(st.sampled_from([1, 2, 3, 8])),
        "kv_heads": kv_heads,
        "dim": data.draw(st.integers(1, 40)),
        "value_dim": data.draw(st.integers(1, 40)),
        "dtype": data.draw(st.sampled_from([np.float32, np.float64, np.float16])),
    }
    problem = packed(rng, lengths, **shape)
    check_alone(
        problem,
        causal=data.draw(st.booleans()),
        window=data.draw(st.sampled_from([None, (9, None), (60, 3)])),
        query_offset=data.draw(st.sampled_from([None, 0, -5, 40])),
        num_threads=data.draw(st.sampled_from([1, 2, 3])),
    )
    option = data.draw(st.sampled_from(OPTIONS))
    options = options_of_all_kinds(rng, problem)[option]
    out, _ = problem.attend(**options)
    whole = untyped.attention(*problem.padded(np.nan), **as_padded(problem, options))
    assert_same_bits(out, unpadded(whole, problem.queries), option)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("causal", [False, True])
def test_torch(isa: str, dtype: str, causal: bool, rng: Any) -> None:
    """torch's sdpa on each sequence; its is_causal is top-left."""
    lengths = [(5, 9), (0, 4), (64, 64), (1, 200), (130, 77)]
    problem = packed(rng, lengths, heads=4, kv_heads=2, dim=40, dtype=dtype)
    options = {"causal": True, "query_offset": 0} if causal else {}
    out, _ = problem.attend(**options)
    for entry, (queries, _) in enumerate(lengths):
        if queries == 0:
            continue
        arrays = [a.swapaxes(0, 1)[None] for a in problem.alone(entry)]
        theirs = torch_sdpa(arrays, is_causal=causal, enable_gqa=True)
        near(out[problem.tokens(entry)[0]], theirs[0].swapaxes(0, 1))


def test_padded_is_what_the_kit_says(rng: Any) -> None:
    array = inputs(rng, 7, 1, heads=2)[0][0].swapaxes(0, 1)
    ends = np.array([0, 3, 3, 7])
    assert padded(array, ends).shape == (3, 2, 4, 32)
    assert_same_bits(unpadded(padded(array, ends), ends), np.ascontiguousarray(array))
