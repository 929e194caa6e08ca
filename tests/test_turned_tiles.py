"""Keys that lie as products take them are multiplied there, queries beside each other: the bits of the way that packs keys.

Scores that a bias of 0 is added to go the other way, so that the same call with one is what bits are compared with; so are whole
tiles of packed keys, whose scores are scaled on their way to exp.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import attncore
from kit import DTYPE_NAMES, DTYPES, assert_same_bits, check, dtype_of, inputs
from kit_paged import into_pages

ROWS = [9, 12, 15, 16, 24, 31, 33, 48, 80, 96]


def assert_same_as_packed(*made: Any, **options: Any) -> None:
    """Out and lse to the bit; NaN are NaN, whatever their bits."""
    bias = np.zeros((1, 1, 1, made[1].shape[2]), made[0].dtype)
    ours = attncore.attention(*made, return_lse=True, **options)
    packed = attncore.attention(*made, return_lse=True, bias=bias, **options)
    for one, other in zip(ours, packed, strict=True):
        np.testing.assert_array_equal(np.isnan(one), np.isnan(other))
        numbers = ~np.isnan(other)
        assert_same_bits(one[numbers], other[numbers])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("group", [1, 3])
def test_bits(isa: str, dtype: Any, causal: bool, group: int, rng: Any) -> None:
    for rows in ROWS:
        queries = max(1, rows // group)
        for keys in (1, 13, 16, 100, 128, 300):
            sizes = {"heads": 2 * group, "kv_heads": 2, "dtype": dtype}
            dim, value_dim = [(1, 1), (20, 36), (64, 64), (72, 128)][(rows + keys) % 4]
            made = inputs(rng, queries, keys, dim=dim, value_dim=value_dim, **sizes)
            assert_same_as_packed(*made, causal=causal, scale=0.37)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [4, 5, 8, 9])
@pytest.mark.parametrize("keys", [1, 7, 23, 24, 63, 64, 255, 256])
def test_around_what_is_read_in_place(isa: str, dtype: Any, rows: int, keys: int, rng: Any) -> None:
    """Few rows are multiplied in another way from some keys on: by their own number, not by their neighbours'."""
    q, k, v = inputs(rng, rows, 300, batch=3, heads=2, kv_heads=1, dim=40, dtype=dtype)
    q = q[:, :, : max(1, rows // 2)]  # two heads of a group: so many rows, or one fewer
    lengths = [keys, 300, keys]
    out, _ = check(q, k, v, key_lengths=lengths)
    alone = attncore.attention(q[2:], k[2:, :, :keys], v[2:, :, :keys])
    assert_same_bits(out[2:], alone)
    paged = into_pages(rng, k, v, lengths, 16)
    assert_same_bits(paged.attend(q)[0], out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, 0.37, 0.25, -0.25, 2.0**-40, 1e37])
def test_whole_tiles(isa: str, dtype: Any, scale: float | None, rng: Any) -> None:
    """Keys that many rows share are packed; where nothing is added to scores, exp applies the scale."""
    for dim, causal in ((64, False), (40, True)):
        made = inputs(rng, 230, 400, heads=2, kv_heads=1, dim=dim, dtype=dtype)
        assert_same_as_packed(*made, causal=causal, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(isa: str, dtype: Any, rng: Any) -> None:
    for rows, window in ((16, None), (48, (20, 3)), (96, (130, 0))):
        made = inputs(rng, rows, 270, dim=64, dtype=dtype)
        check(*made, window=window, query_offset=150, key_lengths=[261])


@pytest.mark.parametrize("dtype", DTYPES)
def test_far_scores(isa: str, dtype: Any, rng: Any) -> None:
    """Scores that overflow in base 2, and a maximum that follows them from tile to tile."""
    for scale in (30.0, 1e30, 1e37):
        q, k, v = inputs(rng, 32, 300, dim=16, dtype=dtype)
        k[:, :, 250:] *= dtype.type(3)
        assert_same_as_packed(q, k, v, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_poison(isa: str, dtype: Any, causal: bool, rng: Any) -> None:
    """NaN and Inf reach those rows that see them, and no others."""
    for at, keys in ((2, 16), (15, 16), (140, 160)):
        for value_dim in (16, 20):
            q, k, v = inputs(rng, 16, keys, dim=16, value_dim=value_dim, dtype=dtype)
            v[:, 0, at] = np.inf
            k[:, 1, at] = np.nan
            assert_same_as_packed(q, k, v, causal=causal)
            out = attncore.attention(q, k, v, causal=causal)
            seen = np.arange(16) + keys - 16 >= at if causal else np.ones(16, bool)
            assert np.isfinite(out[0, :, ~seen]).all()
            assert not np.isfinite(out[0, :, seen]).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_keys_lie_does_not_matter(isa: str, dtype: Any, rng: Any) -> None:
    """Items apart, tokens apart, memory that is not aligned, pages: the same bits."""
    for rows in (16, 24, 64):
        q, k, v = inputs(rng, rows, 200, heads=2, dim=32, dtype=dtype)
        expected = attncore.attention(q, k, v, causal=True, return_lse=True)
        views: dict[str, Any] = {
            "items": lambda x: np.repeat(x, 2, axis=3)[..., ::2],
            "tokens": lambda x: np.concatenate([x, x], axis=3)[..., : x.shape[3]],
            "heads": lambda x: np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2),
            "unaligned": lambda x: np.frombuffer(
                b"\1" + x.tobytes(), np.uint8
            )[1:].view(x.dtype).reshape(x.shape),
        }  # fmt: skip
        for view in views.values():
            got = attncore.attention(view(q), view(k), view(v), causal=True, return_lse=True)
            for one, other in zip(got, expected, strict=True):
                assert_same_bits(one, other)
        for page_size in (1, 16, 64):
            paged = into_pages(rng, k, v, [200], page_size)
            got = paged.attend(q, causal=True)
            for one, other in zip(got, expected, strict=True):
                assert_same_bits(one, other)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_call(data: Any) -> None:
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30), "seed"))
    dtype = dtype_of(draw(st.sampled_from(DTYPE_NAMES), "dtype"))
    group, queries = draw(st.integers(1, 3), "group"), draw(st.integers(4, 96), "queries")
    keys, dim = draw(st.integers(1, 400), "keys"), draw(st.integers(1, 80), "dim")
    made = inputs(rng, queries, keys, batch=2, heads=2 * group, kv_heads=2, dim=dim, dtype=dtype)
    options: dict[str, Any] = {}
    if draw(st.booleans(), "lengths"):
        options["key_lengths"] = rng.integers(0, keys + 1, 2)
    if draw(st.booleans(), "window"):
        options["window"] = tuple(int(n) for n in rng.integers(0, keys + 1, 2))
        options["query_offset"] = int(rng.integers(-20, keys))
    with attncore.use_isa(draw(st.sampled_from(attncore.available_isas()), "isa")):
        assert_same_as_packed(*made, **options)
