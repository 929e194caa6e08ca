"""AttentionState: Ctrl-C leaves it as it was; several threads, of which one may change it."""

from __future__ import annotations

import re
import threading
from typing import Any

import numpy as np
import pytest

import attncore
from kit import assert_same_bits, inputs
from threads_kit import at_once, check_ctrl_c

State: Any = attncore.AttentionState


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [((20_000, 30_000, 30_000), "float32"), ((20_000, 30_000, 30_000), "float64")],
)
def test_ctrl_c(tokens: tuple[int, ...], dtype: str) -> None:
    """In one stretch of keys, and between many."""
    setup = f"""
rng = np.random.default_rng(1)
q, k, v = (rng.standard_normal((1, 4, tokens, 64), dtype=np.float32) for tokens in {tokens})
state = attncore.AttentionState(q, dtype="{dtype}")
state.update(k[:, :, :100], v[:, :, :100])
before = state.result()
"""
    calls = "state.update(k, v, num_threads=2); before = state.result()"
    after = """
assert all((a == b).all() for a, b in zip(state.result(), before))
state.update(k[:, :, :100], v[:, :, :100])
"""
    check_ctrl_c(setup, calls, after, repeats=100)


def refusal(use: Any) -> str:
    try:
        use()
    except RuntimeError as error:
        return str(error)
    return ""


def test_several_threads(rng: np.random.Generator) -> None:
    """While one changes the state, any other use fails at once; what it changed is whole."""
    q, k, v = inputs(rng, 3000, 6000, heads=4)
    state, other, empty = State(q), State(q), State(q)
    small = tuple(array[:, :, :2] for array in (k, v))

    def work() -> None:
        while True:
            try:
                return state.update(k, v)
            except RuntimeError:  # the first looks of the other thread were earlier
                continue

    worker = threading.Thread(target=work)
    reads: dict[str, Any] = {
        "other": lambda: other.merge(state),
        "result": state.result,
        "next_key": lambda: state.next_key,
        "pickle": state.__getstate__,
    }
    writes = {"update": lambda: state.update(*small), "merge": lambda: state.merge(empty)}
    refused: set[str] = set()
    worker.start()
    while worker.is_alive():
        for name, use in {**reads, **(writes if refused else {})}.items():  # once it is at work
            message = refusal(use)
            assert re.match("(state|other): another thread is changing it|^$", message)
            refused |= {name} if message else set()
    worker.join()
    assert refused == {*reads, *writes}
    expected = attncore.attention(q, k, v)
    if state.next_key.tolist() == [6000]:  # no use came after the worker's end
        np.testing.assert_allclose(state.result()[0], expected, rtol=0, atol=1e-5)


def test_readers_go_together(rng: np.random.Generator) -> None:
    q, k, v = inputs(rng, 2000, 50)
    state = State(q)
    state.update(k, v)
    expected, results = state.result(), []

    def read(_: int) -> None:
        for _ in range(20):
            merged = State(q)
            merged.merge(state)
            results.append(merged.result())

    at_once(4, read)
    assert len(results) == 80
    for result in results:
        for ours, theirs in zip(result, expected, strict=True):
            assert_same_bits(ours, theirs)
