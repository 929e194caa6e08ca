"""Contract of packed sequences' gradients: threads, poison, targets, dtypes, memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits
from kit_backward import OPERANDS, assert_same_gradients, owners
from test_contract_memory import measured, only_linux
from test_varlen_backward import check_alone, gradients
from varlen_kit import LENGTHS, d_outputs, options_of_all_kinds, packed


@pytest.mark.parametrize("option", ["none", "causal", "alibis", "all"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_threads(isa: str, option: str, kv_heads: int, rng: Any) -> None:
    """With one KV head the longest has two passes, others one owner."""
    problem = packed(rng, [*LENGTHS, (290, 310), (3, 900), (120, 130)], heads=4, kv_heads=kv_heads)
    d_out, d_lse = d_outputs(rng, problem)
    options = options_of_all_kinds(rng, problem)[option]
    expected = gradients(d_out, problem, d_lse=d_lse, num_threads=1, **options)
    for threads in (2, 3, 2, 5):
        ours = gradients(d_out, problem, d_lse=d_lse, num_threads=threads, **options)
        assert_same_gradients(ours, expected, f"of {threads} threads")


def test_sequences_that_are_too_long_for_one_owner(isa: str, rng: Any) -> None:
    """Sums of d_query of more than 16 MiB: that sequence has two passes, its neighbours do not."""
    problem = packed(rng, [(40, 50), (5000, 130), (9, 9)], heads=8, kv_heads=1, dim=128)
    d_out, d_lse = d_outputs(rng, problem)
    check_alone(d_out, d_lse, problem, window=(40, 20))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_neighbours_and_what_does_not_exist(isa: str, dtype: Any, poison: float, rng: Any) -> None:
    """A sequence's poison stays its own; tokens past the lengths get 0, and neither they nor their d_out are read."""
    problem = packed(rng, [(7, 7), (90, 200), (1, 150), (40, 3), (2, 0)], heads=4, dtype=dtype)
    lengths = {"query_lengths": [7, 60, 1, 40, 1], "key_lengths": [5, 131, 150, 3, 0]}
    d_out, d_lse = d_outputs(rng, problem)
    expected = gradients(d_out, problem, d_lse=d_lse, **lengths)
    ends = problem.queries, problem.keys, problem.keys
    past = [
        np.concatenate([np.arange(n) >= length for n, length in zip(np.diff(e), its, strict=True)])
        for e, its in zip(
            ends, [lengths["query_lengths"], *[lengths["key_lengths"]] * 2], strict=True
        )
    ]
    for name, gone in zip(OPERANDS, past, strict=True):
        assert (expected[name][gone] == 0).all(), name
    arrays = [a.copy() for a in problem.arrays]
    for a, gone in zip([d_out, *arrays], [past[0], *past], strict=True):
        a[gone] = poison
    poisoned = problem.of(arrays)
    assert_same_gradients(gradients(d_out, poisoned, d_lse=d_lse, **lengths), expected)
    for entry in (1, 3):
        arrays = [a.copy() for a in problem.arrays]
        for a, tokens in zip(arrays, problem.tokens(entry), strict=True):
            a[tokens] = poison
        poisoned = problem.of(arrays)
        ours = gradients(d_out, poisoned, d_lse=d_lse, **lengths)
        for name, tokens in zip(OPERANDS, problem.tokens(entry), strict=True):
            others = np.delete(np.arange(len(ours[name])), tokens)
            assert_same_bits(ours[name][others], expected[name][others], f"d_{name}")


def test_wanted_and_into(isa: str, rng: Any) -> None:
    """Any choice has the bits that all have; targets of any strides."""
    problem = packed(rng, heads=4, kv_heads=2)
    d_out, d_lse = d_outputs(rng, problem)
    options = options_of_all_kinds(rng, problem)["all"]
    every = gradients(d_out, problem, d_lse=d_lse, **options)
    for wanted in (["query"], ["key"], {"value", "query"}, ("bias",), ("alibi", "sinks"), ()):
        ours = gradients(d_out, problem, d_lse=d_lse, wanted=wanted, **options)
        names = {n for n in every if n.split()[0] in wanted}
        assert_same_gradients(ours, {n: every[n] for n in every if n in names}, f"of {wanted}")
    fused = np.full((3, 32, *problem.key.shape[:2]), 7, np.float32).transpose(0, 2, 3, 1)
    into = attncore.Gradients(key=fused[0], value=fused[2])
    ours = gradients(d_out, problem, d_lse=d_lse, into=into, **options)
    assert ours["key"] is fused[0] or np.shares_memory(ours["key"], fused)
    assert (fused[1] == 7).all()
    assert_same_gradients({n: a.copy() for n, a in ours.items()}, every)


def test_dtypes_of_options(isa: str, rng: Any) -> None:
    """Each gradient is like its argument."""
    problem = packed(rng, heads=4, kv_heads=2, dtype=np.float16)
    options = options_of_all_kinds(rng, problem)["all"]
    options["sinks"] = options["sinks"].astype(np.float16)
    d_out, d_lse = d_outputs(rng, problem)
    ours = gradients(d_out, problem, d_lse=d_lse, **options)
    for name, one in owners(problem.arrays, options).items():
        assert ours[name].dtype == np.asarray(one).dtype
        assert ours[name].shape == np.shape(one)


@only_linux
@pytest.mark.parametrize(
    "options", ["{}", "dict(alibi=slopes, sinks=slopes, relative_bias=table, dropout_p=0.1)"]
)
def test_memory(options: str) -> None:
    """2000 short sequences beside one of 20000 tokens: what goes by the longest would be 2000 times as much."""
    (grown,) = measured(f"""
ends = np.concatenate(([0], np.cumsum([20000] + [7] * 2000)))
q, k, v, d_out, out = (np.full((ends[-1], 2, 32), x, np.float32) for x in (0.1, 0.2, 0.3, 0.4, 0))
slopes = np.full(2, 0.01, np.float32)
table = attncore.RelativeBias(np.zeros((2, 32), np.float32))
options = {options}
into = attncore.Gradients(*(np.full_like(a, 7) for a in (q, k, v)))
some = {{**options, "window": (500, 0), "num_threads": 2}}

def run():
    _, lse = attncore.attention_varlen(q, k, v, ends, ends, out=out, return_lse=True, **some)
    attncore.attention_varlen_backward(d_out, q, k, v, out, lse, ends, ends, into=into, **some)

print(growth(run))
""")
    assert grown < 64
