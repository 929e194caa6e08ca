"""linear and linear_backward against float64 sums, torch, differences, and themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from attncore import LinearGradients
from kit import BFLOAT16, DTYPES, assert_same_bits, normal
from reference import Array, accumulation
from rule import assert_close_by_rule

# rows, in_features, out_features: few rows and many, depths of more than one block and more than
# one span, odd numbers of everything
SHAPES = [
    (1, 1, 1),
    (1, 300, 130),
    (3, 7, 5),
    (6, 257, 16),
    (7, 64, 129),
    (48, 31, 70),
    (49, 31, 70),
    (130, 530, 65),
    (200, 48, 650),
    (61, 2100, 40),
]


def product_by_rule(ours: Array, a: Array, b: Array, added: Array | None, what: str) -> None:
    """`ours` is a (rows, depth) times b (depth, columns), plus a row."""
    exact_type = np.longdouble if ours.dtype == np.float64 else np.float64

    def evaluate(number: Any) -> Array:
        product: Array = a.astype(number) @ b.astype(number)
        return product if added is None else product + added.astype(number)

    plainly = evaluate(accumulation(ours.dtype)).astype(ours.dtype)
    size = np.max(np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64)), initial=1.0)
    assert_close_by_rule(ours, evaluate(exact_type), plainly, float(size) / 16, what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(
    isa: str, dtype: Any, shape: tuple[int, int, int], rng: np.random.Generator
) -> None:
    rows, inner, outer = shape
    x, weight = normal(rng, rows, inner, dtype=dtype), normal(rng, outer, inner, dtype=dtype)
    bias = normal(rng, outer, dtype=dtype)
    y = attncore.linear(x, weight, bias)
    assert y.dtype == dtype
    product_by_rule(y, x, weight.T, bias, "y")
    product_by_rule(attncore.linear(x, weight), x, weight.T, None, "y without bias")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(
    isa: str, dtype: Any, shape: tuple[int, int, int], rng: np.random.Generator
) -> None:
    rows, inner, outer = shape
    x, weight = normal(rng, rows, inner, dtype=dtype), normal(rng, outer, inner, dtype=dtype)
    d_y = normal(rng, rows, outer, dtype=dtype)
    got = attncore.linear_backward(d_y, x, weight)
    assert got.x is not None
    assert got.weight is not None
    assert got.bias is not None
    product_by_rule(got.x, d_y, weight, None, "d_x")
    product_by_rule(got.weight, d_y.T, x, None, "d_weight")
    product_by_rule(got.bias[None], np.ones((1, rows), dtype), d_y, None, "d_bias")


@pytest.mark.slow
def test_many_rows_and_deep_sums(rng: np.random.Generator) -> None:
    """More rows than a span, of which the sums are kept over two spans of depth."""
    x, weight = (
        normal(rng, 2500, 4200),
        normal(rng, 530, 4200),
    )
    product_by_rule(attncore.linear(x, weight), x, weight.T, None, "y")


def test_central_differences(rng: np.random.Generator) -> None:
    x, weight, bias = (
        rng.standard_normal((5, 4)),
        rng.standard_normal((3, 4)),
        rng.standard_normal(3),
    )
    d_y = rng.standard_normal((5, 3))
    gradients = attncore.linear_backward(d_y, x, weight)
    step = 1e-6
    for argument, gradient in zip((x, weight, bias), gradients, strict=True):
        assert gradient is not None
        for at in np.ndindex(argument.shape):
            kept = argument[at]
            argument[at] = kept + step
            above = np.sum(d_y * attncore.linear(x, weight, bias))
            argument[at] = kept - step
            below = np.sum(d_y * attncore.linear(x, weight, bias))
            argument[at] = kept
            assert abs((above - below) / (2 * step) - gradient[at]) < 1e-8


@pytest.mark.parametrize("dtype", DTYPES)
def test_like_torch(dtype: Any, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")

    def tensor(array: Array) -> Any:
        if array.dtype == BFLOAT16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    x, weight = normal(rng, 2, 33, 70, dtype=dtype), normal(rng, 90, 70, dtype=dtype)
    bias, d_y = normal(rng, 90, dtype=dtype), normal(rng, 2, 33, 90, dtype=dtype)
    leaves = [tensor(a).clone().requires_grad_() for a in (x, weight, bias)]
    y = torch.nn.functional.linear(*leaves)
    y.backward(tensor(d_y))
    ours = attncore.linear(x, weight, bias)
    size = 10 * float(np.finfo(np.float32).eps if dtype != np.float64 else 1e-15)
    size = {np.dtype(np.float16): 2.0**-9}.get(dtype, 2.0**-6 if dtype == BFLOAT16 else size)
    gradients = attncore.linear_backward(d_y, x, weight)
    for got, want in zip((ours, *gradients), (y, *(leaf.grad for leaf in leaves)), strict=True):
        assert got is not None
        expected = want.detach().to(torch.float64).numpy()
        np.testing.assert_allclose(got.astype(np.float64), expected, rtol=size, atol=16 * size)


# ---- memory: strides, shapes, in place ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 40, 200])
def test_weights_that_lie_turned(isa: str, dtype: Any, rows: int, rng: np.random.Generator) -> None:
    """(in_features, out_features) in memory: the same bits."""
    x, weight = normal(rng, rows, 300, dtype=dtype), normal(rng, 77, 300, dtype=dtype)
    lies_turned = np.ascontiguousarray(weight.T).T
    for bias in (None, normal(rng, 77, dtype=dtype)):
        y = attncore.linear(x, lies_turned, bias, num_threads=2)
        assert_same_bits(y, attncore.linear(x, weight, bias))


def views(rng: np.random.Generator, dtype: Any) -> dict[str, Array]:
    """(…, 24) arrays whose rows lie in many ways."""
    bytes_ = np.zeros(5 * 24 * dtype.itemsize + 1, np.uint8)
    unaligned = bytes_[1:].view(dtype).reshape(5, 24)
    unaligned[:] = normal(rng, 5, 24, dtype=dtype)
    return {
        "one row": normal(rng, 24, dtype=dtype),
        "five axes": normal(rng, 2, 1, 3, 2, 24, dtype=dtype),
        "transposed": normal(rng, 24, 5, dtype=dtype).T,
        "negative": normal(rng, 3, 5, 24, dtype=dtype)[::-1, ::-1, ::-1],
        "every second": normal(rng, 6, 10, 48, dtype=dtype)[::2, ::2, ::2],
        "repeated": np.broadcast_to(normal(rng, 24, dtype=dtype), (3, 4, 24)),
        "swapped": normal(rng, 4, 3, 24, dtype=dtype).swapaxes(0, 1),
        "no two strides": normal(rng, 4, 3, 2, 24, dtype=dtype).transpose(2, 1, 0, 3),
        "unaligned": unaligned,
        "no rows": normal(rng, 3, 0, 24, dtype=dtype),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(views(np.random.default_rng(0), np.dtype(np.float32))))
def test_strides(isa: str, dtype: Any, name: str, rng: np.random.Generator) -> None:
    x = views(rng, dtype)[name]
    x.flags.writeable = False
    weight = normal(rng, 24, 40, dtype=dtype).T[::-1]
    bias, d_y = normal(rng, 80, dtype=dtype)[::-2], normal(rng, *x.shape[:-1], 40, dtype=dtype)
    plain = [np.ascontiguousarray(a) for a in (x, weight, bias, d_y)]
    expected = attncore.linear(*plain[:3])
    assert_same_bits(attncore.linear(x, weight, bias), expected)
    out = np.zeros((*x.shape[:-1], 80), dtype)[..., ::-2]
    assert attncore.linear(x, weight, bias, out=out) is out
    assert_same_bits(np.ascontiguousarray(out), expected)
    for got, want in zip(
        attncore.linear_backward(d_y, x, weight),
        attncore.linear_backward(plain[3], *plain[:2]),
        strict=True,
    ):
        assert got is not None
        assert want is not None
        assert_same_bits(got, want)


@pytest.mark.parametrize("rows", [0, 3, 60])
@pytest.mark.parametrize("features", [(0, 4), (4, 0), (0, 0)], ids=str)
def test_nothing(rows: int, features: tuple[int, int]) -> None:
    inner, outer = features
    x, weight = np.ones((rows, inner), np.float32), np.ones((outer, inner), np.float32)
    bias = np.arange(outer, dtype=np.float32)
    y = attncore.linear(x, weight, bias)
    assert (y == np.broadcast_to(bias, (rows, outer))).all()
    gradients = attncore.linear_backward(y, x, weight)
    assert [g.shape for g in gradients if g is not None] == [x.shape, weight.shape, (outer,)]
    assert all((g == 0).all() for g in gradients[:2] if g is not None)


def test_no_rows_have_zero_gradients() -> None:
    x, weight = np.ones((0, 5), np.float32), np.ones((4, 5), np.float32)
    gradients = attncore.linear_backward(np.ones((0, 4), np.float32), x, weight)
    assert all((g == 0).all() for g in gradients if g is not None)


def test_wanted_and_into(rng: np.random.Generator) -> None:
    x, weight, d_y = (
        rng.standard_normal((6, 5)),
        rng.standard_normal((4, 5)),
        rng.standard_normal((6, 4)),
    )
    whole = attncore.linear_backward(d_y, x, weight)
    some = attncore.linear_backward(d_y, x, weight, wanted={"weight"})
    assert some.x is None
    assert some.bias is None
    assert some.weight is not None
    assert whole.weight is not None
    assert_same_bits(some.weight, whole.weight)
    into = LinearGradients(np.empty((6, 5)), None, np.empty(8)[::2])
    filled = attncore.linear_backward(d_y, x, weight, into=into)
    assert filled.x is into.x
    assert filled.bias is into.bias
    for got, want in zip(filled, whole, strict=True):
        assert got is not None
        assert want is not None
        assert_same_bits(np.ascontiguousarray(got), want)


# ---- which bits are the same ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads_or_other_rows(
    isa: str, dtype: Any, rng: np.random.Generator
) -> None:
    x, weight = normal(rng, 150, 600, dtype=dtype), normal(rng, 200, 600, dtype=dtype)
    bias, d_y = normal(rng, 200, dtype=dtype), normal(rng, 150, 200, dtype=dtype)
    y = attncore.linear(x, weight, bias, num_threads=1)
    d_x = attncore.linear_backward(d_y, x, weight, num_threads=1).x
    assert d_x is not None
    for rows in (1, 2, 6, 7, 48, 49, 100):
        assert_same_bits(attncore.linear(x[-rows:], weight, bias), y[-rows:])
        part = attncore.linear_backward(d_y[-rows:], x[-rows:], weight, wanted=["x"]).x
        assert part is not None
        assert_same_bits(part, d_x[-rows:])
    alone = attncore.linear_backward(d_y, x, weight, num_threads=1)
    for threads in (2, 3, 5):
        assert_same_bits(attncore.linear(x, weight, bias, num_threads=threads), y)
        together = attncore.linear_backward(d_y, x, weight, num_threads=threads)
        for got, want in zip(together, alone, strict=True):
            assert got is not None
            assert want is not None
            assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", [DTYPES[0], DTYPES[-1]])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("rows", [5, 60])
def test_nan_and_inf_stay_in_their_row(
    isa: str, poison: float, rows: int, dtype: Any, rng: np.random.Generator
) -> None:
    x, weight = normal(rng, rows, 20, dtype=dtype), normal(rng, 10, 20, dtype=dtype)
    clean = attncore.linear(x, weight)
    x[3, 7] = poison
    y = attncore.linear(x, weight)
    others = np.arange(rows) != 3
    assert_same_bits(y[others], clean[others])
    assert not np.isfinite(y[3].astype(np.float64)).any()
