"""attention_varlen: packed sequences are the padded batch, and each has the bits that it has alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import attncore
from kit import DTYPES, assert_same_bits, compare_results, inputs
from reference import Result, plain, reference
from test_contract_memory import measured, only_linux
from test_peers import near, torch_sdpa
from test_properties import some
from varlen_kit import (
    LENGTHS,
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


def test_strides(isa: str, rng: Any) -> None:
    """Query, key and value in one buffer (token, 3, head, dim); tokens backwards; (head, token, dim)."""
    problem = packed(rng, [(n, n) for n in (5, 0, 130, 17)], heads=3)
    expected, its_lse = problem.attend(causal=True)
    ends = problem.queries, problem.keys
    buffer = np.stack(problem.arrays, axis=1)
    views = {
        "one buffer": buffer.swapaxes(0, 1),
        "backwards": [a[::-1].copy()[::-1] for a in problem.arrays],
        "head first": [a.swapaxes(0, 1).copy().swapaxes(0, 1) for a in problem.arrays],
        "every second dim": [np.repeat(a, 2, axis=2)[:, :, ::2] for a in problem.arrays],
    }
    for name, view in views.items():
        target = np.full((3, len(expected), 32), 7, np.float32).swapaxes(0, 1)
        out, lse = untyped.attention_varlen(*view, *ends, causal=True, out=target, return_lse=True)
        assert out is target
        assert_same_bits(out.copy(), expected, name)
        assert_same_bits(lse, its_lse, name)
    buffer.flags.writeable = False
    assert_same_bits(untyped.attention_varlen(*buffer.swapaxes(0, 1), *ends, causal=True), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_neighbours_do_not_matter(isa: str, dtype: Any, poison: float, rng: Any) -> None:
    """Whatever a sequence holds, and tokens past the lengths hold, others keep their bits."""
    problem = packed(rng, [(7, 7), (90, 200), (1, 150), (40, 3), (2, 0)], heads=4, dtype=dtype)
    lengths = {"query_lengths": [7, 60, 1, 40, 1], "key_lengths": [5, 131, 150, 3, 0]}
    expected, its_lse = problem.attend(**lengths)
    for entry in range(problem.batch):
        arrays = [a.copy() for a in problem.arrays]
        for a, tokens in zip(arrays, problem.tokens(entry), strict=True):
            a[tokens] = poison
        out, lse = problem.of(arrays).attend(**lengths)
        others = np.delete(np.arange(len(out)), problem.tokens(entry)[0])
        assert_same_bits(out[others], expected[others])
        assert_same_bits(lse[:, others], its_lse[:, others], "lse")
    arrays = [a.copy() for a in problem.arrays]
    for a, name in zip(arrays, ("query", "key", "key"), strict=True):
        ends = problem.queries if name == "query" else problem.keys
        for begin, end, length in zip(ends, ends[1:], lengths[f"{name}_lengths"], strict=False):
            a[begin + length : end] = poison
    out, lse = problem.of(arrays).attend(**lengths)
    assert_same_bits(out, expected)
    assert_same_bits(lse, its_lse, "lse")


@pytest.mark.parametrize("option", ["none", "causal", "all"])
def test_threads(isa: str, option: str, rng: Any) -> None:
    """Many times, since threads that reuse each other's memory too early do so seldom."""
    problem = packed(rng, [*LENGTHS, (600, 700), (3, 2500), (400, 900)], heads=4, kv_heads=2)
    options = options_of_all_kinds(rng, problem)[option]
    expected, its_lse = problem.attend(num_threads=1, **options)
    for turn in range(8):
        out, lse = problem.attend(num_threads=2 + turn % 2, **options)
        assert_same_bits(out, expected, f"turn {turn}")
        assert_same_bits(lse, its_lse, f"lse in turn {turn}")


def test_lengths_that_change_meanwhile_are_read_once(isa: str, rng: Any) -> None:
    """The arrays of lengths may be out's neighbours: nothing is read from them once work has begun."""
    problem = packed(rng, [(3, 5), (20, 30)])
    expected, _ = problem.attend()
    room = np.zeros(expected.size + 6, np.float32)
    ends = room[:6].view(np.int64)
    ends[...] = problem.queries
    out = room[6:].reshape(expected.shape)
    untyped.attention_varlen(*problem.arrays, ends, problem.keys, out=out)
    assert_same_bits(out, expected)


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


def test_parts_of_the_keys_merge(isa: str, rng: Any) -> None:
    """merge has heads before tokens, as lse has."""
    problem = packed(rng, [(9, 40), (30, 70)], heads=2, dtype=float)
    split = np.array([0, 15, 35])  # 15 keys of the first, 20 of the second
    chosen = np.r_[0:15, 40:60]
    rest = np.setdiff1d(np.arange(110), chosen)
    parts = [
        untyped.attention_varlen(
            problem.query,
            problem.key[at],
            problem.value[at],
            problem.queries,
            ends,
            return_lse=True,
        )
        for at, ends in ((chosen, split), (rest, problem.keys - split))
    ]
    out, lse = attncore.merge([out.swapaxes(0, 1) for out, _ in parts], [lse for _, lse in parts])
    whole, its_lse = problem.attend()
    np.testing.assert_allclose(out.swapaxes(0, 1), whole, rtol=0, atol=1e-14)
    np.testing.assert_allclose(lse, its_lse, rtol=0, atol=1e-13)


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


@only_linux
def test_memory() -> None:
    """2000 short sequences beside one of 20000 tokens: padding to it would be 2000 times as much (10 GiB)."""
    (grown,) = measured("""
ends = np.concatenate(([0], np.cumsum([20000] + [7] * 2000)))
q, k, v = (np.full((ends[-1], 2, 64), x, np.float32) for x in (0.1, 0.2, 0.3))
out, lse = np.zeros_like(q), None
run = lambda: attncore.attention_varlen(q, k, v, ends, ends, out=out, causal=True, num_threads=2, return_lse=True)
print(growth(run))
""")
    assert grown < 64


@only_linux
def test_memory_of_strided_keys() -> None:
    """128 MiB of keys and of values that are not copied."""
    (grown,) = measured("""
k, v = (np.full((2, 256, 65536), x, np.float32).transpose(2, 0, 1) for x in (0.1, 0.2))
q = np.full((40, 4, 256), 0.1, np.float32)
ends = [0, 1, 30, 40], [0, 500, 65000, 65536]
print(growth(lambda: attncore.attention_varlen(q, k, v, *ends)))
""")
    assert grown < 64


def test_padded_is_what_the_kit_says(rng: Any) -> None:
    array = inputs(rng, 7, 1, heads=2)[0][0].swapaxes(0, 1)
    ends = np.array([0, 3, 3, 7])
    assert padded(array, ends).shape == (3, 2, 4, 32)
    assert_same_bits(unpadded(padded(array, ends), ends), np.ascontiguousarray(array))
