"""`append_paged` writes the slots of the new tokens and nothing else, rounded as it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import BFLOAT16, DTYPE_NAMES, assert_same_bits, dtype_of
from kit_quantised import FLOAT8, LARGEST, QUANTISED, packed, unpacked
from reference import Array
from threads_kit import at_once

LAYOUTS = ["bshd", "bhsd"]
# Of unpacked arrays, whose number mypy does not know.
append_paged: Any = attncore.append_paged
attention_paged: Any = attncore.attention_paged


def rounded(x: Array, dtype: Any) -> Array:
    """float64 goes through float32, except to float64."""
    with np.errstate(all="ignore"):
        through = x if np.dtype(dtype) == np.float64 else x.astype(np.float32)
        result: Array = through.astype(dtype)
    return result


def quantised(x: Array, name: str) -> tuple[Array, Array]:
    """(numbers, scale), by the documented formula."""
    wide = x.astype(np.float32).astype(np.float64)
    largest = np.abs(wide).max(axis=-1)
    scale = np.where(largest == 0, 1, largest / LARGEST[name]).astype(np.float32)
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    y = wide / scale[..., None].astype(np.float64)
    if name == "float8_e4m3fn":
        every = np.arange(256, dtype=np.uint8).view(FLOAT8)
        every = every[np.isfinite(every.astype(np.float32))]
        values = every.astype(np.float64)
        near = np.abs(y[..., None] - values)
        # The nearest; of two, that with an even last bit; −0 for what is negative and vanishes.
        order = near + 1e-12 * (every.view(np.uint8) & 1)
        order = order + 1e-13 * (np.signbit(values) != np.signbit(y[..., None]))
        return every[order.argmin(axis=-1)], scale
    numbers = np.rint(y).astype(np.int8)
    return (packed(numbers) if name == "int4" else numbers), scale


def storage(name: str) -> np.dtype[Any]:
    if name in QUANTISED:
        return {"int8": np.dtype(np.int8), "int4": np.dtype(np.uint8)}.get(name, FLOAT8)
    return dtype_of(name)


class Model:
    """Pages of a few sequences, and the tokens that these have, one by one."""

    def __init__(self, rng: np.random.Generator, name: str, *, size: int, layout: str = "bshd"):
        self.rng, self.name, self.size, self.layout = rng, name, size, layout
        self.batch, self.kv_heads, self.width, self.dims = 3, 2, 5, (6, 4)
        self.table = rng.permutation(self.batch * self.width + 3)[: self.batch * self.width]
        self.table = self.table.reshape(self.batch, self.width)
        self.lengths = np.zeros(self.batch, np.int64)
        shape = [self.batch * self.width + 3, size, self.kv_heads]
        dtype = storage(name)
        self.pools = [
            np.frombuffer(rng.bytes(int(np.prod([*shape, n])) * dtype.itemsize), dtype)
            .reshape(*shape, n)
            .copy()
            for n in (dim // 2 if name == "int4" else dim for dim in self.dims)
        ]
        if name in QUANTISED:
            self.pools += [rng.random(shape).astype(np.float32) for _ in range(2)]
        self.expected = [pool.copy() for pool in self.pools]

    def pages(self) -> dict[str, Any]:
        """The arguments that say where tokens go; pools in their layout, by views."""
        arrays = self.pools
        if self.layout == "bhsd":
            arrays = [pool.swapaxes(1, 2) for pool in arrays]
        names = ["key_pages", "value_pages", "key_scale", "value_scale"]
        return {
            **dict(zip(names, arrays, strict=False)),
            "block_table": self.table,
            "key_lengths": self.lengths,
            "page_layout": self.layout,
        }

    def tokens(self, count: int, dtype: Any) -> tuple[Array, Array]:
        shape = (self.batch, self.kv_heads, count)
        key, value = (self.rng.standard_normal((*shape, n)).astype(dtype) for n in self.dims)
        return key, value

    def note(self, arrays: tuple[Array, Array], counts: Array) -> None:
        """What the pools should hold after an append."""
        for entry, count in enumerate(counts):
            for i in range(count):
                at = self.lengths[entry] + i
                page, slot = self.table[entry, at // self.size], at % self.size
                for which, array in enumerate(arrays):
                    row = array[entry, :, i]
                    if self.name in QUANTISED:
                        numbers, scale = quantised(row, self.name)
                        self.expected[2 + which][page, slot] = scale
                    else:
                        numbers = rounded(row, storage(self.name))
                    self.expected[which][page, slot] = numbers
        self.lengths = self.lengths + counts

    def check(self) -> None:
        for ours, theirs in zip(self.pools, self.expected, strict=True):
            assert_same_bits(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 3, 16, 70])
@pytest.mark.parametrize("name", [*DTYPE_NAMES, *QUANTISED])
def test_random_appends(name: str, size: int, layout: str, rng: Any) -> None:
    model = Model(rng, name, size=size, layout=layout)
    for _ in range(6):
        room = int((model.width * size - model.lengths).min())
        most = int(rng.integers(0, min(room, 90) + 1))
        dtype = dtype_of(rng.choice(DTYPE_NAMES))
        arrays = model.tokens(most, dtype)
        counts = rng.integers(0, most + 1, model.batch)
        append_paged(*arrays, **model.pages(), lengths=counts)
        model.note(arrays, counts)
        model.check()


@pytest.mark.parametrize("name", ["float16", "int8", "int4"])
def test_packed_tokens(name: str, rng: Any) -> None:
    model = Model(rng, name, size=7)
    for counts in ([3, 0, 10], [0, 0, 0], [1, 1, 1], [13, 8, 0]):
        arrays = model.tokens(max(counts), np.float32)
        key, value = (
            np.concatenate([a[b, :, :n].swapaxes(0, 1) for b, n in enumerate(counts)])
            for a in arrays
        )
        cu = [0, *np.cumsum(counts)]
        append_paged(key, value, **model.pages(), cu_lengths=cu)
        model.note(arrays, np.array(counts))
        model.check()


@pytest.mark.parametrize("to", DTYPE_NAMES)
@pytest.mark.parametrize("of", DTYPE_NAMES)
def test_every_rounding(of: str, to: str) -> None:
    """Zeros of both signs, subnormals, halves between neighbours, overflow, infinities, NaN."""
    bits = np.arange(2**16, dtype=np.uint16)
    special = [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        65504,
        65519.99,
        65520,
        1e-8,
        3e38,
        1e300,
        1e-310,
    ]
    with np.errstate(all="ignore"):
        numbers = [bits.view(np.float16).astype(np.float64), np.array(special)]
        if BFLOAT16 is not None:
            numbers.append(bits.view(BFLOAT16).astype(np.float64))
        exact = np.concatenate([by * n for n in numbers for by in (1, 1 + 2**-9, 1 - 2**-12)])
        x = rounded(exact, dtype_of(of))
    key = np.resize(x, (1, 1, len(x) // 16, 16))
    pages = np.zeros((1, key.shape[2], 1, 16), dtype_of(to))
    append_paged(key, None, pages, None, [[0]], [0])
    got, expected = pages[0, :, 0], rounded(key[0, 0], dtype_of(to))
    with np.errstate(invalid="ignore"):
        got, expected = got.astype(np.float64), expected.astype(np.float64)
    assert ((got == expected) | (np.isnan(got) & np.isnan(expected))).all()
    assert (np.signbit(got) == np.signbit(expected))[~np.isnan(expected)].all()


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1.0, 1e30, 3.4e38])
def test_error_of_quantised_numbers(name: str, size: float, rng: Any) -> None:
    """Within what the documentation says, for rows of any size, of one number, of zeros."""
    x = rng.standard_normal((1, 1, 400, 32))
    x /= np.abs(x).max()
    x[:, :, 5] = 0
    x[:, :, 6, 1:] = 0
    x[:, :, 7] = x[:, :, 7] > 0
    x[:, :, 8] = 2.0 ** -rng.integers(0, 20, 32)
    x = (x * size).astype(np.float32)
    pages = np.zeros((1, 400, 1, 16 if name == "int4" else 32), storage(name))
    scale = np.zeros((1, 400, 1), np.float32)
    append_paged(x, None, pages, None, [[0]], [0], key_scale=scale)
    numbers = unpacked(pages) if name == "int4" else pages.astype(np.float32)
    wide = scale[..., None].astype(np.float64)
    error = np.abs(numbers * wide - x.swapaxes(1, 2))
    bound = wide / 2
    if name == "float8_e4m3fn":
        bound = np.maximum(np.abs(x.swapaxes(1, 2)) / 16.0, wide / 1024)
    assert (error <= bound * (1 + 1e-6)).all()
    assert (scale > 0).all()
    assert scale[0, 5] == 1


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_attention_to_what_was_appended(isa: str, name: str, rng: Any) -> None:
    """A prompt and tokens one by one give the bits of attention to all at once."""
    dtype = dtype_of(name)
    q, k, v = rng.standard_normal((3, 2, 2, 90, 16)).astype(np.float32)
    pools = np.zeros((2, 12, 16, 2, 16), dtype)
    table, lengths = rng.permutation(12).reshape(2, 6), np.array([0, 0])
    outs = []
    for first, last in ((0, 77), *((at, at + 1) for at in range(77, 90))):
        new = slice(first, last)
        append_paged(k[:, :, new], v[:, :, new], *pools, table, lengths)
        lengths += last - first
        outs.append(attention_paged(q[:, :, new], *pools, table, lengths, causal=True))
    expected = attncore.attention(q, k.astype(dtype), v.astype(dtype), causal=True)
    np.testing.assert_allclose(np.concatenate(outs, axis=2), expected, rtol=0, atol=2e-6)
    last_row = attncore.attention(q[:, :, -1:], k.astype(dtype), v.astype(dtype))
    assert_same_bits(outs[-1], last_row)


def test_forms_of_tokens(rng: Any) -> None:
    """Layouts, one entry, any strides, keys alone."""
    key, value = rng.standard_normal((2, 2, 3, 5, 8)).astype(np.float32)
    table = [[1, 0], [3, 2]]

    def pools() -> Any:
        return np.zeros((2, 4, 4, 3, 8), np.float32)

    expected = pools()
    append_paged(key, value, *expected, table, [1, 2])
    assert (expected != 0).sum() == key.size + value.size
    forms: list[Any] = [
        np.asfortranarray,
        lambda a: np.repeat(a, 2, axis=3)[..., ::2],
        lambda a: np.ascontiguousarray(a[..., ::-1])[..., ::-1],
    ]
    for form in forms:
        got = pools()
        append_paged(form(key), form(value), *got, table, [1, 2])
        assert_same_bits(got, expected)
        apart = np.asfortranarray(pools())
        append_paged(key, value, *apart, table, [1, 2])
        assert_same_bits(apart, expected)
    got = pools()
    swapped = [a.swapaxes(1, 2).copy() for a in (key, value)]
    append_paged(*swapped, *got, table, [1, 2], layout="bshd")
    assert_same_bits(got, expected)
    got = pools()
    for entry in range(2):
        append_paged(key[entry], value[entry], *got, table[entry], [1, 2][entry])
    assert_same_bits(got, expected)
    append_paged(key, None, got[0], None, table, [1, 2])
    assert_same_bits(got, expected)


def test_nothing_to_append(rng: Any) -> None:
    """The table is not looked at, nor needs it room."""
    key = np.ones((2, 1, 0, 4), np.float32)
    pages = np.zeros((2, 4, 1, 4), np.float32)
    append_paged(key, key, pages, pages.copy(), [[-1], [99]], [4, 4])
    append_paged(key[:0], None, pages, None, np.empty((0, 3), int), np.empty(0, int))
    ones = np.ones((2, 1, 3, 4), np.float32)
    append_paged(ones, None, pages, None, [[-1], [1]], [4, 1], lengths=[0, 2])
    assert (pages[0] == 0).all()
    assert (pages[1, :, 0, 0] == [0, 1, 1, 0]).all()


def test_entries_may_share_what_is_only_read(rng: Any) -> None:
    """A common prompt of whole pages; what lies behind a window may be gone."""
    key = rng.standard_normal((2, 1, 3, 4)).astype(np.float32)
    pages = np.zeros((4, 4, 1, 4), np.float32)
    append_paged(key, None, pages, None, [[0, 0, 2], [-1, 0, 3]], [8, 9])
    assert (pages[:2] == 0).all()
    np.testing.assert_array_equal(pages[2, :3, 0], key[0, 0])
    np.testing.assert_array_equal(pages[3, 1:, 0], key[1, 0])


def test_callers_at_once(rng: Any) -> None:
    """Each with pages of its own, in one pool."""
    pools = np.zeros((2, 16, 8, 2, 32), np.float32)
    key, value = rng.standard_normal((2, 4, 2, 32, 32)).astype(np.float32)

    def run(entry: int) -> None:
        table = np.arange(4) + 4 * entry
        for at in range(32):
            new = slice(at, at + 1)
            append_paged(key[entry, :, new], value[entry, :, new], *pools, table, at)

    at_once(4, run)
    stored = pools.reshape(2, 4, 32, 2, 32).swapaxes(2, 3)
    assert_same_bits(stored, np.stack([key, value]))
