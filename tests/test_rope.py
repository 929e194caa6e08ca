"""rope against exact angles, torch, its own algebra, and bad input."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import attncore
from kit import DTYPES, assert_same_bits, normal
from reference import Array, accumulation
from rule import assert_close_by_rule
from test_properties import some

PI = Decimal(
    "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862"
)


def powers(base: float, dims: int) -> list[float]:
    """The frequencies of a base, float64."""
    return [base ** (-2.0 * i / dims) for i in range(dims // 2)]


def exact_angles(positions: Array, frequencies: Sequence[float]) -> Array:
    """position · frequency modulo 2π, (…, pairs)."""
    with localcontext() as context:
        context.prec = 80
        turns = [
            [float((Decimal(int(p)) * Decimal(f)) % (2 * PI)) for f in frequencies]
            for p in positions.reshape(-1)
        ]
    return np.array(turns).reshape(*positions.shape, len(frequencies))


def rotate(x: Array, angles: Array, interleaved: bool, number: Any, factor: float = 1.0) -> Array:
    """x (…, token, dim) turned by angles (…, token, pairs), in `number`."""
    pairs = angles.shape[-1]
    cosine, sine = ((factor * f(angles)).astype(number) for f in (np.cos, np.sin))
    out = x.astype(number)
    first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    if interleaved:
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    a, b = x[..., first].astype(number), x[..., second].astype(number)
    out[..., first] = a * cosine - b * sine
    out[..., second] = b * cosine + a * sine
    return out


def check(x: Array, positions: Array | None, **options: Any) -> Array:
    """x is (batch, head, token, dim)."""
    got = attncore.rope(x, positions, **options)
    at = np.arange(x.shape[2]) if positions is None else np.asarray(positions)
    dims = options.get("dims") or x.shape[3]
    angles = exact_angles(np.atleast_2d(at), powers(options.get("base", 10000.0), dims))[:, None]
    angles = -angles if options.get("inverse") else angles
    interleaved = options.get("interleaved", False)
    exact = rotate(x, angles, interleaved, np.float64)
    plainly = rotate(x, angles, interleaved, accumulation(x.dtype)).astype(x.dtype)
    assert got.dtype == x.dtype
    assert_close_by_rule(got, exact, plainly, float(np.max(np.abs(exact), initial=0.0)))
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("dim", "dims"), [(2, None), (6, 4), (20, None), (64, None), (80, 32), (37, 34)]
)
def test_rope(
    isa: str, dtype: Any, interleaved: bool, dim: int, dims: int | None, rng: np.random.Generator
) -> None:
    x = normal(rng, 2, 3, 21, dim, dtype=dtype)
    got = check(x, None, dims=dims, interleaved=interleaved)
    check(x, None, dims=dims, interleaved=interleaved, inverse=True, base=500.0)
    rest = slice(dims or dim, None)
    assert_same_bits(got[..., rest], x[..., rest])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [0, -5, 1000, 2**31 - 4, 2**40, -(2**40), 2**52])
@pytest.mark.parametrize("tokens", [1, 40])
def test_positions(isa: str, dtype: Any, start: int, tokens: int, rng: np.random.Generator) -> None:
    x = normal(rng, 2, 2, tokens, 16, dtype=dtype)
    check(x, start + np.arange(tokens))
    by_entry = start + rng.integers(-9, 9, (2, tokens))
    whole = check(x, by_entry, interleaved=True)
    alone = attncore.rope(x[1:], by_entry[1], interleaved=True)
    assert_same_bits(whole[1:], alone)


@pytest.mark.parametrize("kind", [np.int8, np.int32, np.uint32, np.int64, ">i8"])
def test_position_dtypes(kind: Any, rng: np.random.Generator) -> None:
    x = normal(rng, 2, 5, 8)
    expected = attncore.rope(x, [3, 1, 4, 1, 5])
    assert_same_bits(attncore.rope(x, np.array([3, 1, 4, 1, 5], kind)), expected)
    assert_same_bits(attncore.rope(x, np.array([[3, 1, 4, 1, 5]], kind)), expected)


def test_like_transformers_of_torch(rng: np.random.Generator) -> None:
    """The form in which Llama's code has it: x · cos + rotate_half(x) · sin."""
    torch = pytest.importorskip("torch")
    x = normal(rng, 2, 4, 50, 64)
    frequency = 1.0 / 10000.0 ** (torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    angles = torch.outer(torch.arange(50, dtype=torch.float64), frequency)
    cosine, sine = (f(torch.cat((angles, angles), -1)).float() for f in (torch.cos, torch.sin))
    t = torch.from_numpy(x).requires_grad_()
    expected = t * cosine + torch.cat((-t[..., 32:], t[..., :32]), -1) * sine
    np.testing.assert_allclose(attncore.rope(x), expected.detach().numpy(), rtol=0, atol=1e-6)
    d_out = normal(rng, 2, 4, 50, 64)
    expected.backward(torch.from_numpy(d_out))
    np.testing.assert_allclose(attncore.rope(d_out, inverse=True), t.grad, rtol=0, atol=1e-6)


def test_long_and_short_calls_agree(isa: str, rng: np.random.Generator) -> None:
    """A token's bits do not depend on its neighbours, nor on threads."""
    x = normal(rng, 3, 2, 300, 48, dtype=np.float64)
    whole = attncore.rope(x, num_threads=1)
    assert_same_bits(attncore.rope(x, num_threads=3), whole)
    for token in (0, 15, 16, 17, 299):
        assert_same_bits(attncore.rope(x[:, :, token : token + 1], [token]), whole[:, :, [token]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_ranks_and_strides(isa: str, dtype: Any, rng: np.random.Generator) -> None:
    x = normal(rng, 2, 3, 9, 12, dtype=dtype)
    expected = attncore.rope(x, dims=10)
    swapped = attncore.rope(x.swapaxes(1, 2), dims=10, layout="bshd")
    assert_same_bits(swapped.swapaxes(1, 2), expected)
    assert_same_bits(attncore.rope(x[1], dims=10), expected[1])
    assert_same_bits(attncore.rope(x[1, 2], dims=10), expected[1, 2])
    out = np.zeros((9, 12, 3, 2), dtype).T[::-1, ::-1, ::-1].swapaxes(2, 3)
    assert attncore.rope(x, dims=10, out=out) is out
    assert_same_bits(np.ascontiguousarray(out), expected)
    memory = np.zeros(x.nbytes + 1, np.uint8)[1:].view(dtype).reshape(x.shape)
    memory[:] = x
    assert attncore.rope(memory, dims=10, out=memory) is memory  # in place
    assert_same_bits(memory, expected)


def test_nothing() -> None:
    for shape in ((0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)):
        assert attncore.rope(np.zeros(shape, np.float32)).shape == shape


def test_nan_and_inf_stay_in_their_pair(isa: str) -> None:
    x = np.ones((3, 8))
    x[1, 2] = np.nan
    x[2, 1] = np.inf
    y = attncore.rope(x)
    assert np.isnan(y[1]).nonzero()[0].tolist() == [2, 6]
    assert (~np.isfinite(y[2])).nonzero()[0].tolist() == [1, 5]


@some
@given(
    seed=st.integers(0, 2**32),
    pairs=st.integers(1, 40),
    start=st.integers(-(2**40), 2**40),
    base=st.floats(1.0, 1e7),
    interleaved=st.booleans(),
)
def test_rotating_back_gives_x(
    isa: str, seed: int, pairs: int, start: int, base: float, interleaved: bool
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 7, 2 * pairs))
    options: dict[str, Any] = {"base": base, "interleaved": interleaved}
    turned = attncore.rope(x, start + np.arange(7), **options)
    back = attncore.rope(turned, start + np.arange(7), inverse=True, **options)
    np.testing.assert_allclose(back, x, rtol=0, atol=1e-14)
    lengths = np.linalg.norm(turned, axis=-1)
    np.testing.assert_allclose(lengths, np.linalg.norm(x, axis=-1), rtol=1e-14)


@some
@given(
    seed=st.integers(0, 2**32),
    pairs=st.integers(1, 40),
    query=st.integers(0, 2**40),
    key=st.integers(0, 2**40),
    shift=st.integers(-(2**41), 2**41),
)
def test_scores_depend_on_the_distance(
    isa: str, seed: int, pairs: int, query: int, key: int, shift: int
) -> None:
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, 1, 2 * pairs))
    here = attncore.rope(q, [query]) @ attncore.rope(k, [key]).T
    there = attncore.rope(q, [query + shift]) @ attncore.rope(k, [key + shift]).T
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-13 * pairs)


# ---- bad input ----

X = np.zeros((2, 3, 5, 8), np.float32)
SQUARE = np.zeros((8, 8), np.float32)
READ_ONLY = np.zeros_like(X)
READ_ONLY.flags.writeable = False
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "list as x": ({"x": [[1.0]]}, TypeError, "x.*array.*list"),
    "integer x": ({"x": X.astype(int)}, TypeError, "x.*int64.*float32"),
    "1-D x": ({"x": X[0, 0, 0]}, ValueError, "x.*1 dim.*2, 3 or 4"),
    "5-D x": ({"x": X[None]}, ValueError, "x.*5 dim.*2, 3 or 4"),
    "odd dim": ({"x": X[..., :7]}, ValueError, "dims.*7.*even"),
    "odd dims": ({"dims": 3}, ValueError, "dims.*3.*even"),
    "too many dims": ({"dims": 10}, ValueError, "dims.*10.*8"),
    "negative dims": ({"dims": -2}, ValueError, "dims.*-2"),
    "no dims": ({"dims": 0}, ValueError, "dims.*0.*at least 2"),
    "float dims": ({"dims": 4.0}, TypeError, "dims.*int.*float"),
    "float positions": ({"positions": np.zeros(5)}, TypeError, "positions.*float64.*integer"),
    "scalar position": ({"positions": 3}, ValueError, "positions.*scalar"),
    "3-D positions": ({"positions": np.zeros((1, 2, 5), int)}, ValueError, "positions.*3 dim"),
    "other tokens": ({"positions": [1, 2, 3]}, ValueError, r"positions.*\(1, 3\).*\(1, 5\)"),
    "another batch": ({"positions": np.zeros((3, 5), int)}, ValueError, r"positions.*\(3.*\(2"),
    "infinite base": ({"base": np.inf}, ValueError, "base.*inf.*finite"),
    "zero base": ({"base": 0.0}, ValueError, "base.*0.*1e-100"),
    "negative base": ({"base": -1.0}, ValueError, "base.*-1"),
    "NaN base": ({"base": np.nan}, ValueError, "base.*nan"),
    "text as base": ({"base": "10000"}, TypeError, "base.*number.*str"),
    "None as base": ({"base": None}, TypeError, "base.*None"),
    "int as interleaved": ({"interleaved": 1}, TypeError, "interleaved.*bool.*int"),
    "int as inverse": ({"inverse": 0}, TypeError, "inverse.*bool.*int"),
    "unknown layout": ({"layout": "sbhd"}, ValueError, "layout.*sbhd.*bhsd"),
    "out of another shape": ({"out": np.zeros((2, 3, 5, 9), np.float32)}, ValueError, "out.*9.*8"),
    "out of another rank": ({"out": np.zeros((3, 5, 8), np.float32)}, ValueError, "out.*3 dim.*4"),
    "out of another dtype": ({"out": np.zeros(X.shape)}, TypeError, "out.*float64.*float32"),
    "read-only out": ({"out": READ_ONLY}, ValueError, "out.*read-only"),
    "out is x reversed": ({"out": X[:, :, ::-1]}, ValueError, "out.*overlaps x"),
    "out is x turned": ({"x": SQUARE, "out": SQUARE.T}, ValueError, "out.*overlaps x"),
    "no threads": ({"num_threads": 0}, ValueError, "num_threads.*0.*1"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input(name: str) -> None:
    changes, kind, message = BAD[name]
    with pytest.raises(kind, match=re.compile(message, re.DOTALL)):
        attncore.rope(**{"x": X, **changes})


def test_out_overlaps_positions() -> None:
    memory = np.zeros((4, 4), np.int32)
    with pytest.raises(ValueError, match="out: overlaps positions"):
        attncore.rope(np.zeros((4, 4), np.float32), memory[0], out=memory.view(np.float32))
