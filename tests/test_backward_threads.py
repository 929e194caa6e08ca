"""Contract of gradients: Python threads, fork, Ctrl-C."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, inputs, run_child
from kit_backward import Named, assert_same_gradients, d_outputs, gradients
from test_contract_threads import AFTER
from threads_kit import FORKS, THREADED_CALL, at_once, check_ctrl_c, turns_during


@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_python_threads(isa: str, dtype: Any) -> None:
    """Each has its own problem and gets the bits that it gets alone."""
    sizes = [(1, 2000), (200, 300), (16, 16), (33, 700), (64, 64), (7, 500), (100, 100), (1, 50)]
    rng = np.random.default_rng(3)
    problems = [inputs(rng, rows, keys, heads=4, dtype=dtype) for rows, keys in sizes]
    d_outs = [d_outputs(rng, made[0], made[2])[0] for made in problems]
    bias = np.float32(rng.standard_normal((4, 1, 1)))

    def run(i: int, threads: int | None) -> Named:
        return gradients(d_outs[i], problems[i], causal=True, bias=bias, num_threads=threads)

    expected = [run(i, 1) for i in range(len(sizes))]
    got: list[list[Named]] = [[] for _ in sizes]

    def work(i: int) -> None:
        got[i].extend(run(i, (None, 1, 2, 3)[turn % 4]) for turn in range(6))

    at_once(len(sizes), work)
    for i, results in enumerate(got):
        assert len(results) == 6
        for ours in results:
            assert_same_gradients(ours, expected[i], f"of problem {i}")


def test_the_gil_is_released(isa: str) -> None:
    rng = np.random.default_rng(3)
    made = inputs(rng, 1500, 3000, heads=4, dim=64)
    out, lse = attncore.attention(*made, return_lse=True)
    call = partial(attncore.attention_backward, out, *made, out, lse, num_threads=1)
    assert turns_during(call) > 5


BACKWARD_TOO = """
out, lse = attncore.attention(q, k, v, return_lse=True)
first = attncore.attention_backward(out, q, k, v, out, lse, num_threads=2)

def same():
    return all(
        (ours == theirs).all()
        for threads in (2, 1, None, 3)
        for ours, theirs in zip(
            attncore.attention_backward(out, q, k, v, out, lse, num_threads=threads)[:3], first
        )
    )
"""


def test_fork_after_a_threaded_call() -> None:
    """A child, its own child, and the parent afterwards all go on, with the same bits."""
    assert run_child(THREADED_CALL + BACKWARD_TOO + FORKS).split() == ["0", "0", "True"]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("heads", "queries", "calls", "options"),
    [
        (8, 40_000, 1, ""),
        (1, 60_000, 1, "causal=True, softcap=5.0, dropout_p=0.1"),
        (1, 60_000, 1, "bias=np.zeros((1, queries), np.float32), wanted=('bias',)"),
        (1, 30, 100_000, ""),
    ],
)
def test_ctrl_c(threads: int, heads: int, queries: int, calls: int, options: str) -> None:
    setup = f"""
queries = {queries}
q, k, v = (np.full((1, {heads}, queries, 64), x, np.float32) for x in (0.1, 0.2, 0.3))
lse = np.full((1, {heads}, queries), 11.0, np.float32)
small = [a[:, :1, :100] for a in (q, k, v)]
expected = attncore.attention(*small)
"""
    call = f"attncore.attention_backward(v, q, k, v, v, lse, num_threads={threads}, {options})"
    check_ctrl_c(setup, call, AFTER, repeats=calls)
