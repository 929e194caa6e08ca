"""What is particular to avx512_bf16, amx and amx_f32: bfloat16 two by two, weights rounded to bfloat16."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest

import attncore
from kit import assert_same_bits, dtype_of
from kit_backward import attention_backward
from reference import Array


@pytest.fixture(autouse=True, params=["avx512_bf16", "amx", "amx_f32"])
def pairs(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param not in attncore.available_isas():
        pytest.skip(f"a CPU without {request.param}")
    with attncore.use_isa(request.param):
        yield


def draw(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(dtype_of("bfloat16"))


def assert_same_arrays(got: Iterable[Any], expected: Iterable[Any]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("queries", [1, 3, 50])
@pytest.mark.parametrize("keys", [1, 2, 31, 129, 3000])
def test_equal_values_are_the_result(queries: int, keys: int, rng: np.random.Generator) -> None:
    """Weights are divided by the sum of what they were rounded to: the error of a weighted mean of equal numbers is
    that of the float32 sums, so that rounding to bfloat16 finds the number again."""
    q, k = draw(rng, 1, 2, queries, 40), draw(rng, 1, 2, keys, 40)
    values = np.broadcast_to(draw(rng, 1, 2, 1, 24), (1, 2, keys, 24))
    out = attncore.attention(q, k, values)
    np.testing.assert_array_equal(out, np.broadcast_to(values[:, :, :1], out.shape))


@pytest.mark.parametrize("queries", [1, 50])
@pytest.mark.parametrize("keys", [2, 31, 3000])
def test_lse_is_as_exact_as_elsewhere(queries: int, keys: int, rng: np.random.Generator) -> None:
    """It is of the weights before they are rounded, which would cost up to 2⁻⁸."""
    arrays = draw(rng, 1, 2, queries, 40), draw(rng, 1, 2, keys, 40), draw(rng, 1, 2, keys, 24)
    _, lse = attncore.attention(*arrays, return_lse=True)
    with attncore.use_isa("baseline"):
        _, expected = attncore.attention(*arrays, return_lse=True)
    np.testing.assert_allclose(lse, expected, rtol=4e-7, atol=4e-7)


def test_other_dtypes_take_the_kernels_of_avx512(rng: np.random.Generator) -> None:
    """Bit by bit, and so does bfloat16 where not all three arrays are."""
    q, k, v = (draw(rng, 1, 2, 20, 33).astype(np.float32) for _ in range(3))
    mixed = (q, k.astype(dtype_of("bfloat16")), v), (q.astype("f2"), k, v)
    for arrays in mixed if attncore.isa() == "amx_f32" else (*mixed, (q, k, v)):
        out = attncore.attention(*arrays)
        with attncore.use_isa("avx512"):
            expected = attncore.attention(*arrays)
        assert_same_bits(out, expected)


def test_explain_says_so(rng: np.random.Generator) -> None:
    bf16 = draw(rng, 1, 2, 20, 32)
    assert "pairs" in attncore.explain(bf16, bf16, bf16).kernel
    wide = bf16.astype(np.float32)
    assert "pairs" not in attncore.explain(wide, wide, wide).kernel


def test_gradients_of_other_dtypes_are_those_of_avx512(rng: np.random.Generator) -> None:
    """Bit by bit; amx takes bfloat16's from there too."""
    dtypes = ["float32", "float16"] + (["bfloat16"] if attncore.isa() != "avx512_bf16" else [])
    for name in dtypes:
        arrays = [draw(rng, 1, 2, 50, 33).astype(dtype_of(name)) for _ in range(4)]
        with attncore.use_isa("avx512"):
            out, lse = attncore.attention(*arrays[1:], return_lse=True)
            expected = attention_backward(*arrays, out, lse)
        got = attention_backward(*arrays, out, lse)
        assert_same_arrays(got[:3], expected[:3])


@pytest.mark.parametrize("rows", [3, 60])
def test_layers_of_amx_are_those_of_avx512_bf16(rows: int, rng: np.random.Generator) -> None:
    x, weight, d_y = draw(rng, rows, 75), draw(rng, 130, 75), draw(rng, rows, 130)
    got = attncore.linear(x, weight), *attncore.linear_backward(d_y, x, weight)
    with attncore.use_isa("avx512_bf16"):
        expected = attncore.linear(x, weight), *attncore.linear_backward(d_y, x, weight)
    assert_same_arrays(got, expected)
