"""in_proj and out_proj: the layer's two ends, and what stands between them by hand or in a cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits
from layer_kit import LAYERS, B, E, H, K, S, inputs_of, make
from reference import Array

PLAIN = [name for name in LAYERS if name not in ("appended", "other widths")]
CASES = [(name, inputs) for name in PLAIN for inputs in (1, 2)] + [("other widths", 3)]


def rotated(layer_name: str, heads: Array) -> Array:
    rotary = LAYERS[layer_name].get("rotary")
    if rotary is None:
        return heads
    return attncore.rope(heads, rotary=attncore.Rotary() if rotary is True else rotary)


@pytest.mark.parametrize(("name", "inputs"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layer_by_hand(
    name: str, dtype: Any, inputs: int, isa: str, rng: np.random.Generator
) -> None:
    """Projections have the bits of the layer's; so has the whole where nothing is rotated."""
    layer, arrays = make(name, dtype), inputs_of(name, rng, inputs, dtype)
    expected = layer(*arrays)
    query, key, value = layer.in_proj(*arrays)
    assert query.shape[:2] == (B, H)
    keys = (S, K, K)[inputs - 1]
    assert (
        key.shape == value.shape == (B, LAYERS[name].get("num_kv_heads", H), keys, query.shape[3])
    )
    options: dict[str, Any] = {"query_offset": 0} if inputs == 1 else {}
    out = attncore.attention(rotated(name, query), rotated(name, key), value, **options)
    y = layer.out_proj(out)
    if "rotary" not in LAYERS[name]:  # rope in the product's epilogue rounds once
        assert_same_bits(y, expected)
    tolerance = 16 * float(attncore_eps(dtype)) * np.abs(expected.astype(np.float64)).max()
    np.testing.assert_allclose(
        y.astype(np.float64), expected.astype(np.float64), rtol=0, atol=tolerance
    )


def attncore_eps(dtype: Any) -> float:
    """The spacing of a dtype's numbers at 1."""
    return 2**-7 if np.dtype(dtype).name == "bfloat16" else float(np.finfo(dtype).eps)


def test_what_is_wanted_has_the_bits_of_all(rng: np.random.Generator) -> None:
    layer, arrays = make("other widths", np.float32), inputs_of("other widths", rng, 3, np.float32)
    every = dict(zip(("query", "key", "value"), layer.in_proj(*arrays), strict=True))
    choices: list[tuple[str, ...]] = [("query",), ("key",), ("value",), ("value", "key"), ()]
    for wanted in choices:
        found = layer.in_proj(*arrays, wanted=wanted)
        for name, heads in zip(every, found, strict=True):
            if name in wanted:
                assert_same_bits(heads, every[name], name)
            else:
                assert heads is None
    _, key, value = layer.in_proj(None, *arrays[1:], wanted=("key", "value"))
    assert_same_bits(key, every["key"])
    assert_same_bits(value, every["value"])
    _, _, value = layer.in_proj(None, None, arrays[2], wanted=("value",))
    assert_same_bits(value, every["value"])
    _, key, value = layer.in_proj(None, arrays[1], arrays[2][:, :2], wanted=("key", "value"))
    assert_same_bits(key, every["key"])
    assert_same_bits(value, every["value"][:, :, :2])
    query, _, _ = layer.in_proj(arrays[0], wanted=("query",))
    assert_same_bits(query, every["query"])


@pytest.mark.parametrize("name", ["grouped", "norm and rotary"])
def test_axes(name: str, rng: np.random.Generator) -> None:
    """Without a batch axis, tokens first, any strides."""
    layer, (x,) = make(name, np.float32), inputs_of(name, rng, 1, np.float32)
    expected = layer.in_proj(x)
    y = layer.out_proj(expected[0])
    for ours, want in zip(layer.in_proj(x[1]), expected, strict=True):
        assert_same_bits(ours, want[1])
    assert_same_bits(layer.out_proj(expected[0][1]), y[1])
    for ours, want in zip(layer.in_proj(np.asfortranarray(x)), expected, strict=True):
        assert_same_bits(ours, want)
    assert_same_bits(layer.out_proj(np.asfortranarray(expected[0])), y)
    first = attncore.MultiHeadAttention(E, H, dtype=np.float32, batch_first=False, **LAYERS[name])
    first.load_state_dict(layer.state_dict())
    for ours, want in zip(first.in_proj(x.swapaxes(0, 1)), expected, strict=True):
        assert_same_bits(ours, want)
    assert_same_bits(first.out_proj(expected[0]), y.swapaxes(0, 1))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("paged", [False, True])
def test_steps_with_a_cache(name: str, paged: bool, rng: np.random.Generator) -> None:
    """Some tokens at a time give what all at once give."""
    layer = make(name, np.float32)
    x = rng.standard_normal((B, 13, E), dtype=np.float32)
    dim = LAYERS[name].get("head_dim", E // H)
    settings: Any = (LAYERS[name].get("num_kv_heads", H), dim)
    rotary = LAYERS[name].get("rotary")
    cache: Any
    if paged:
        cache = attncore.PagedKVCache(16, 4, *settings, rotary=rotary)
        for _ in range(B):
            cache.add()
    else:
        cache = attncore.KVCache(B, *settings, capacity=16, rotary=rotary)
    parts = []
    for tokens in np.split(x, [6, 7, 9], axis=1):
        query, key, value = layer.in_proj(tokens)
        cache.append(key, value)
        out = cache.attend(query, rotate_query=rotary is not None)
        parts.append(layer.out_proj(out))
    np.testing.assert_allclose(np.concatenate(parts, axis=1), layer(x, causal=True), atol=2e-5)


def test_nothing_to_do() -> None:
    layer = make("grouped", np.float32)
    for shape in [(0, 4, E), (2, 0, E)]:
        query, key, value = layer.in_proj(np.zeros(shape, np.float32))
        assert query.shape == (shape[0], H, shape[1], E // H)
        assert key.shape == value.shape == (shape[0], 2, shape[1], E // H)
        assert layer.out_proj(query).shape == shape


BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "no x": ((None,), {}, ValueError, "x: is not given"),
    "width": ((np.zeros((B, S, E + 1), np.float32),), {}, ValueError, r"x: shape.*21.*must be.*20"),
    "dtype": ((np.zeros((B, S, E)),), {}, TypeError, "x: dtype is float64, accepted is float32"),
    "dimensions": ((np.zeros(E, np.float32),), {}, ValueError, "x: has 1 dim.*2 or 3"),
    "ranks": (
        (np.zeros((B, S, E), np.float32), np.zeros((K, E), np.float32)),
        {},
        ValueError,
        "context: has 2 dimensions, x has 3",
    ),
    "batch": (
        (np.zeros((B, S, E), np.float32), np.zeros((B + 1, K, E), np.float32)),
        {},
        ValueError,
        r"context: is of 3 entries, x of 2",
    ),
    "values alone": (
        (np.zeros((B, S, E), np.float32), None, np.zeros((B, S, E), np.float32)),
        {},
        ValueError,
        "value_context: is given without context",
    ),
    "ranks of contexts": (
        (None, np.zeros((B, K, E), np.float32), np.zeros((K, E), np.float32)),
        {"wanted": ["key", "value"]},
        ValueError,
        "value_context: has 2 dimensions, context has 3",
    ),
    "name": (
        (np.zeros((B, S, E), np.float32),),
        {"wanted": ["out"]},
        ValueError,
        "wanted: has 'out'",
    ),
    "text": (
        (np.zeros((B, S, E), np.float32),),
        {"wanted": "key"},
        TypeError,
        "wanted: must be a coll",
    ),
    "threads": (
        (np.zeros((B, S, E), np.float32),),
        {"num_threads": 0},
        ValueError,
        "num_threads: is 0",
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_x(dtype: Any) -> None:
    with pytest.raises(ValueError, match="x: is not given"):
        make("plain", dtype).in_proj(None)


@pytest.mark.parametrize("case", BAD)
def test_bad_in_proj(case: str) -> None:
    arguments, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        make("plain", np.float32).in_proj(*arguments, **options)


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "message"),
    [
        ((B, H, S, 6), np.float32, ValueError, r"out: shape.*6.*must be.*5"),
        ((B, H + 1, S, 5), np.float32, ValueError, r"out: shape.*5, 6.*must be.*4, 6"),
        ((B, H, S, 5), np.float16, TypeError, "out: dtype is float16, accepted is float32"),
        ((S, 5), np.float32, ValueError, "out: has 2 dimensions, must have 3 or 4"),
    ],
)
def test_bad_out_proj(
    shape: tuple[int, ...], dtype: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make("plain", np.float32).out_proj(np.zeros(shape, dtype))
