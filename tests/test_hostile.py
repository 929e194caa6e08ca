"""What callers should not do, or do by accident: nothing of it may crash, hang or go unnoticed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import FrameType
from typing import Any

import numpy as np
import pytest

import attncore
from kit import normal
from reference import Array

SMALL = np.ones((1, 1, 3, 8), np.float32)


def test_signal_handler_calls_attention_during_a_call(rng: np.random.Generator) -> None:
    """The inner call must not use the outer call's workspace."""
    inner = normal(rng, 1, 4, 700, 32)
    want_inner = attncore.attention(inner, inner, inner)
    seen: list[bool] = []

    def handler(number: int, frame: FrameType | None) -> None:
        seen.append(np.array_equal(attncore.attention(inner, inner, inner), want_inner))

    query = normal(rng, 1, 4, 3000, 64)
    want = attncore.attention(query, query, query)
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.05)
        outs = [attncore.attention(query, query, query) for _ in range(5)]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert all(np.array_equal(out, want) for out in outs)
    assert all(seen)


def test_bias_list_that_makes_its_arrays_as_it_is_read() -> None:
    def fresh(self: Any, index: Any) -> Array:
        return np.full((1, 1, 3, 3), 0.5, np.float32)

    made: Any = type("Fresh", (list,), {"__getitem__": fresh})
    out = attncore.attention(SMALL, SMALL, SMALL, bias=made([0, 0]))
    np.testing.assert_array_equal(out, attncore.attention(SMALL, SMALL, SMALL))


@pytest.mark.parametrize("threads", ["0", "-3", "4294967296", "99999999999999999999", "2,1", "x"])
def test_any_omp_num_threads(threads: str) -> None:
    code = "import attncore, numpy as n; x = n.ones((1, 2, 300, 8)); attncore.attention(x, x, x)"
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "ATTNCORE_ISA": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == 0


def test_masked_array() -> None:
    masked = np.ma.masked_array(SMALL, mask=SMALL > 0)
    with pytest.raises(TypeError, match=r"key.*masked"):
        attncore.attention(SMALL, masked, SMALL)  # a subclass: as far as types go, it is welcome


def test_python_numbers() -> None:
    """Lists of numbers are float32, whatever query is."""
    for dtype in (np.float32, np.float64):
        x = SMALL.astype(dtype)
        want = attncore.attention(x, x, x, sinks=np.array([0.5], np.float32))
        np.testing.assert_array_equal(attncore.attention(x, x, x, sinks=[0.5]), want)
        one = attncore.attention(x, x, x, sinks=np.array([1], np.float32))
        np.testing.assert_array_equal(attncore.attention(x, x, x, sinks=[1]), one)


def test_spelled_out_native_byte_order() -> None:
    x = SMALL.view("<f4" if sys.byteorder == "little" else ">f4")
    assert attncore.attention(x, x, x).shape == x.shape


@pytest.mark.parametrize("option", ["query_offset", "key_lengths", "query_lengths"])
def test_unsigned_beyond_int64(option: str) -> None:
    options: dict[str, Any] = {option: np.array([2**63 + 3], np.uint64)}
    with pytest.raises(ValueError, match=rf"{option}.*9223372036854775811"):
        attncore.attention(SMALL, SMALL, SMALL, **options)


def test_what_is_not_read_may_be_any_integer() -> None:
    """Padding of −1 in uint64: of tables past a length, of a tree past the queries."""
    padding = 2**64 - 1
    table = np.array([[0, padding]], np.uint64)
    query, pages = np.ones((1, 1, 2, 8), np.float32), np.ones((2, 4, 1, 8), np.float32)
    attncore.attention_paged(query, pages, pages.copy(), table, [3])
    attncore.append_paged(query, query, pages, pages.copy(), table, [0])
    tree = np.array([[padding, 0, 7]], np.uint64)
    attncore.attention(SMALL, SMALL, SMALL, tree_parents=tree, query_lengths=[2])
    with pytest.raises(ValueError, match="block_table"):
        attncore.attention_paged(query, pages, pages.copy(), table, [5])


@pytest.mark.parametrize("option", ["query_offset", "key_lengths", "query_lengths"])
def test_ints_that_no_dtype_has(option: str) -> None:
    for number in (2**70, [-(2**63) - 1], [1, 2**64]):
        options: dict[str, Any] = {option: number}
        with pytest.raises(ValueError, match=rf"{option}.*out of range"):
            attncore.attention(SMALL, SMALL, SMALL, **options)


@pytest.mark.parametrize(
    "given", [True, np.True_, 0.5 + 1j, np.complex128(2), np.array("1.5"), "2"]
)
@pytest.mark.parametrize("option", ["scale", "softcap", "dropout_p"])
def test_what_is_no_number(option: str, given: Any) -> None:
    options: dict[str, Any] = {option: given}
    with pytest.raises(TypeError, match=f"{option}: must be a number"):
        attncore.attention(SMALL, SMALL, SMALL, **options)


def test_counts_are_no_floats() -> None:
    call: Any = attncore.attention_weights
    for count in (np.array(2.5), 2.0, True, np.array([1, 2])):
        with pytest.raises(TypeError, match="top_k"):
            call(SMALL, SMALL, top_k=count)
        with pytest.raises(TypeError, match="num_threads"):
            attncore.set_num_threads(count)  # type: ignore[arg-type]


NEWER_DTYPE = """
import numpy as np, attncore
kind = np._core._multiarray_umath._get_sfloat_dtype()  # NumPy's own, for its tests
x = np.ones((1, 2, 5, 8)).view(kind(1.0))
for call in (lambda: attncore.attention(x, x, x), lambda: attncore.linear(x[0, 0], x[0, 1])):
    try:
        call()
    except TypeError as error:
        print(error)
"""


def test_dtypes_of_a_newer_kind() -> None:
    """They have no number, as bfloat16 has before it was met."""
    done = subprocess.run(
        [sys.executable, "-c", NEWER_DTYPE], capture_output=True, text=True, check=False
    )
    if "_get_sfloat_dtype" in done.stderr or "_core" in done.stderr:
        pytest.skip("this NumPy has no such dtype")
    assert done.stdout.count("dtype is") == 2, done.stdout + done.stderr


def test_numbers_beyond_the_accumulation_type() -> None:
    plain = attncore.attention(SMALL, SMALL, SMALL)
    np.testing.assert_array_equal(attncore.attention(SMALL, SMALL, SMALL, softcap=1e300), plain)
    for option, value in (("softcap", 1e-50), ("scale", 1e39), ("scale", 10**400)):
        options: dict[str, Any] = {option: value}
        with pytest.raises(ValueError, match=option):
            attncore.attention(SMALL, SMALL, SMALL, **options)


def test_torch_like_with_no_tokens_and_many_axes() -> None:
    x = np.ones((2, 3, 4, 0, 8), np.float32)
    assert attncore.scaled_dot_product_attention(x, x, x).shape == x.shape


def test_huge_dim_without_memory() -> None:
    x = np.lib.stride_tricks.as_strided(SMALL, (1, 1, 3, 2**50), (0, 0, 0, 0))
    with pytest.raises(ValueError, match=r"query.*dim must be"):
        attncore.attention(x, x, SMALL)


def test_a_state_of_more_bytes_than_can_be_counted() -> None:
    """Of (2**30, 1, 2**30, 2) float64 keeps 2**64, which wrap around to 0."""
    x = np.lib.stride_tricks.as_strided(np.ones(8, np.float16), (2**30, 1, 2**30, 2), (0, 0, 0, 0))
    with pytest.raises(MemoryError):
        attncore.AttentionState(x, dtype=np.float64)


def test_a_large_batch_of_nothing_plans_nothing() -> None:
    """Ctrl-C could not end it: it is 2**40 entries."""
    x = np.lib.stride_tricks.as_strided(SMALL, (2**40, 1, 0, 8), (0, 0, 0, 4))
    out, lse = attncore.attention(x, x, x, return_lse=True)
    assert out.shape == x.shape
    assert lse.shape == x.shape[:3]


def test_all_of_many_keys_as_top_k(isa: str, rng: np.random.Generator) -> None:
    """As many as there are: a sort, in no more than n log n steps."""
    query, key = normal(rng, 1, 1, 2, 8), normal(rng, 1, 1, 20000, 8)
    indices, probabilities = attncore.attention_weights(query, key, top_k=20000)
    full = attncore.attention_weights(query, key)
    order = np.argsort(-full, axis=-1, kind="stable")
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(probabilities, np.take_along_axis(full, order, -1))


def test_sums_over_very_many_keys(isa: str) -> None:
    """Nearly equal weights and values of one sign: rounding errors add up, but not along all keys."""
    rng = np.random.default_rng(1)
    query = (0.01 * rng.standard_normal((1, 1, 40, 8))).astype(np.float32)
    key = rng.standard_normal((1, 1, 100_000, 8), dtype=np.float32)
    value = 1 + rng.random((1, 1, 100_000, 8), dtype=np.float32)
    scores = (query.astype(np.float64) @ key.swapaxes(-1, -2).astype(np.float64)) / np.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = weights @ value.astype(np.float64) / weights.sum(-1, keepdims=True)

    plain = (query @ key.swapaxes(-1, -2)) / np.float32(np.sqrt(8))
    plain = np.exp(plain - plain.max(-1, keepdims=True))
    plain = plain @ value / plain.sum(-1, keepdims=True)
    error = np.abs(attncore.attention(query, key, value) - want).max()
    ulp = np.spacing(np.float32(want.max()))
    assert error <= 2 * np.abs(plain - want).max() + 2 * ulp
