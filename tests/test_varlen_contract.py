"""Contract of packed sequences: strides, poison, threads, trees, parts of the keys, memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits
from reference import Array
from test_contract_memory import measured, only_linux
from test_tree import random_tree
from test_varlen_backward import gradients, of_padded
from varlen_kit import (
    LENGTHS,
    Packed,
    as_padded,
    d_outputs,
    options_of_all_kinds,
    packed,
    unpadded,
    untyped,
)


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
    problem = packed(rng, [*LENGTHS, (210, 300), (3, 2500), (150, 520)], heads=4, kv_heads=2)
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


TREES = [(0, 3), (5, 9), (70, 150), (0, 0), (1, 1), (33, 300)]


def trees(rng: np.random.Generator, problem: Packed) -> Array:
    """One a sequence, whose queries count from 0."""
    counts = np.diff(problem.queries)
    return np.concatenate([random_tree(rng, int(n)) if n > 0 else counts[:0] for n in counts])


@pytest.mark.parametrize("dtype", DTYPES)
def test_trees(isa: str, dtype: Any, rng: Any) -> None:
    """tree_parents are packed too, and name queries of their own sequence."""
    problem = packed(rng, TREES, heads=4, kv_heads=2, dtype=dtype)
    parents = trees(rng, problem)
    options = {"tree_parents": parents, "key_lengths": [3, 8, 150, 0, 1, 200]}
    out, lse = problem.attend(**options)
    whole, its_lse = untyped.attention(
        *problem.padded(np.nan), return_lse=True, **as_padded(problem, options)
    )
    assert_same_bits(out, unpadded(whole, problem.queries))
    assert_same_bits(lse.T, unpadded(its_lse, problem.queries), "lse")
    d_out, d_lse = d_outputs(rng, problem)
    ours = gradients(d_out, problem, d_lse=d_lse, **options)
    for name, one in of_padded(d_out, d_lse, problem, options).items():
        assert_same_bits(ours[name], one, f"d_{name}")
    for entry, at in enumerate(problem.tokens(i)[0] for i in range(problem.batch)):
        tree = {"tree_parents": parents[at]} if at.stop > at.start else {}
        alone = untyped.attention(*problem.alone(entry), layout="bshd", **tree)
        assert_same_bits(problem.attend(tree_parents=parents)[0][at], alone, f"sequence {entry}")


@only_linux
def test_memory_of_trees() -> None:
    """A line of 4000 bits a token, of each of 4000 + 2000 · 3 tokens: 5 MiB.  By the longest it would be 4 GiB."""
    (grown,) = measured("""
ends = np.concatenate(([0], np.cumsum([4000] + [3] * 2000)))
q, k, v = (np.full((ends[-1], 2, 16), x, np.float32) for x in (0.1, 0.2, 0.3))
out, parents = np.zeros_like(q), np.full(ends[-1], -1)
print(growth(lambda: attncore.attention_varlen(q, k, v, ends, ends, out=out, tree_parents=parents)))
""")
    assert grown < 64


@only_linux
def test_many_sequences_of_one_token() -> None:
    """docs/semantics.md says how many bytes each costs the plan."""
    of_forward, of_backward = measured("""
count = 100_000
ends = np.arange(count + 1)
q, k, v = (np.full((count, 4, 4), x, np.float32) for x in (0.1, 0.2, 0.3))
out, into = np.zeros_like(q), attncore.Gradients(*(np.full_like(a, 7) for a in (q, k, v)))
lse = np.full((4, count), 0.01, np.float32)
print(growth(lambda: attncore.attention_varlen(q, k, v, ends, ends, out=out)))
print(growth(lambda: attncore.attention_varlen_backward(q, q, k, v, out, lse, ends, ends, into=into)))
""")
    assert of_forward < 4 * 0.1 * 400
    assert of_backward < 4 * 0.1 * 700
