"""Contract: memory.  What a call takes is the kernel's own count, in a process of its own."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import attncore
from kit import DTYPES, assert_same_bits, check, inputs, run_child
from reference import Array

MEASURE = """
import numpy as np
import attncore

def status(field):  # kilobytes
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

def growth(call):  # MiB at the peak, beyond what was there before
    before = status("VmRSS:")
    call()
    return (status("VmHWM:") - before) / 1024

tiny = np.ones((1, 1, 4, 4), np.float32)
attncore.attention(tiny, tiny, tiny)  # libraries and threads are loaded
"""

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")


def measured(code: str) -> list[float]:
    return [float(line) for line in run_child(MEASURE + code, timeout=300).split()]


@only_linux
@pytest.mark.parametrize("options", ["causal=True", "window=(2000, 2000), return_lse=True"])
def test_long_sequence(options: str) -> None:
    """No score matrix: 32768 tokens, 4 heads of 64; the matrix would be 16 GiB."""
    (grown,) = measured(f"""
q, k, v, out = (np.full((1, 4, 32768, 64), x, np.float32) for x in (0.1, 0.2, 0.3, 0))
print(growth(lambda: attncore.attention(q, k, v, out=out, num_threads=2, {options})))
""")
    assert grown < 64


@only_linux
@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("view", ["[..., ::-1]", "[:, :, ::-1]", "[..., ::2]", ".swapaxes(2, 3)"])
def test_strided_keys_are_not_copied(view: str, queries: int) -> None:
    """128 MiB of keys and of values, in strange order, on each ISA."""
    shape = {"[..., ::2]": (1, 2, 65536, 512), ".swapaxes(2, 3)": (1, 2, 256, 65536)}
    grown = measured(f"""
k, v = (np.full({shape.get(view, (1, 2, 65536, 256))}, x, np.float32){view} for x in (0.1, 0.2))
q = np.full((1, 4, {queries}, 256), 0.1, np.float32)
for name in attncore.available_isas():
    with attncore.use_isa(name):
        print(growth(lambda: attncore.attention(q, k, v)))
""")
    assert max(grown) < 64


@only_linux
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_dtypes_are_not_converted_whole(dtype: str) -> None:
    grown = measured(f"""
shape = (1, 2, {2**27 // np.dtype(dtype).itemsize // 256}, 128)
k, v = (np.full(shape, x, "{dtype}") for x in (1, 2))
q = np.full((1, 4, 20, 128), 0.1, "{dtype}")
print(growth(lambda: attncore.attention(q, k, v)))
""")
    assert max(grown) < 64


@only_linux
def test_masks_biases_and_heads_are_not_expanded() -> None:
    """(64 heads, 1024, 8192) would be 2 GiB of bias, and 64 heads of keys 256 MiB."""
    grown = measured("""
q = np.full((1, 64, 1024, 16), 0.1, np.float32)
k, v = (np.full((1, 1, 8192, 16), x, np.float32) for x in (0.1, 0.2))
out = np.full((1, 64, 1024, 16), 0, np.float32)
mask, bias = np.ones((1, 8192), bool), np.ones((1024, 8192), np.float32)
print(growth(lambda: attncore.attention(q, k, v, mask=mask, bias=bias, out=out)))
""")
    assert max(grown) < 64


@only_linux
def test_weights_take_what_they_return() -> None:
    grown = measured("""
q, k = (np.full((1, 4, 16384, 64), x, np.float32) for x in (0.1, 0.2))
print(growth(lambda: attncore.attention_weights(q, k, rows=[5, -1], causal=True)))
print(growth(lambda: attncore.attention_weights(q, k, top_k=4, window=(300, 0))))
""")
    assert max(grown) < 64


def toeplitz(line: Array, rows: int, keys: int) -> Array:
    """element (row, key) is line[row + key]: any number of elements in little memory."""
    step = line.strides[0]
    return as_strided(line, (rows, keys), (step, step))


@pytest.mark.parametrize("kind", ["bias", "mask"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_than_two_to_the_31_scores(isa: str, dtype: Any, kind: str, rng: Any) -> None:
    """B·H·Sq·Sk beyond 2**31; a window keeps it short, and rows are held against a part."""
    size, tail = 46_500, 400
    assert size * size > 2**31
    q, k, v = inputs(rng, size, size, heads=1, dim=8, dtype=dtype)
    line: Array = np.float32(rng.standard_normal(2 * size))
    line = line > 0 if kind == "mask" else line
    options: dict[str, Any] = {"window": (50, 60), kind: toeplitz(line, size, size)}
    out = attncore.attention(q, k, v, **options)
    for start in (0, size // 2, size - tail):
        part = slice(start, start + tail)
        cut = [a[:, :, part] for a in (q, k, v)]
        options[kind] = toeplitz(line[2 * start :], tail, tail)
        expected, _ = check(*cut, **options)
        inner = slice(0 if start == 0 else 60, None if start == size - tail else -60)
        a, b = out[:, :, part][:, :, inner], expected[:, :, inner]
        np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=2e-2, atol=2e-2)
        if dtype in (np.float32, np.float64):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_more_than_two_to_the_31_heads_rows_keys(isa: str, rng: Any) -> None:
    q, k, v = inputs(rng, 1500, 1500, heads=1, dim=4)
    wide = [np.broadcast_to(a, (8, 128, *a.shape[2:])) for a in (q, k, v)]
    assert 8 * 128 * 1500 * 1500 > 2**31
    mask = np.broadcast_to(rng.random(1500) < 0.5, (8, 128, 1500, 1500))
    out = attncore.attention(*wide, window=(8, 8), mask=mask)
    one = attncore.attention(q, k, v, window=(8, 8), mask=mask[0, 0])
    assert_same_bits(out[-1, -1], one[0, 0])
    assert_same_bits(out, np.broadcast_to(one, out.shape))


@only_linux
def test_memory_beyond_two_to_the_31_elements(isa: str) -> None:
    """Addresses as far as that; the pages in between are never touched, so they cost nothing."""
    size = 47_000
    try:
        mask = np.zeros((size, size), bool)
        far = np.zeros(2**31 + 2**20, np.float16)
    except MemoryError:
        pytest.skip("this machine does not lend 6 GiB of addresses")
    rng = np.random.default_rng(5)
    mask[-3:, -40:] = rng.random((3, 40)) < 0.5
    q, k, v = inputs(rng, 3, size, heads=1, dim=8)
    out = attncore.attention(q, k, v, mask=mask[-3:])
    cut = (q, k[:, :, -40:], v[:, :, -40:])
    np.testing.assert_allclose(out, attncore.attention(*cut, mask=mask[-3:, -40:]), atol=1e-6)

    step = 2**31 // 16  # elements from token to token
    tokens = as_strided(far, (1, 1, 17, 32), (0, 0, 2 * step, 2))
    tokens[...] = rng.standard_normal(tokens.shape)
    copy = tokens.copy()
    expected = attncore.attention(copy, copy, copy)
    assert_same_bits(attncore.attention(tokens, tokens, tokens), expected)
    keys = tokens.swapaxes(2, 3)  # the last axis strides
    expected = attncore.attention(copy.swapaxes(2, 3).copy(), *2 * [copy.swapaxes(2, 3).copy()])
    assert_same_bits(attncore.attention(keys, keys, keys), expected)
