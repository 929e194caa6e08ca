"""Contract: the bits of a sequence's gradients depend on that sequence, the options and the ISA."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits, inputs, normal
from kit_backward import OPERANDS, Named, assert_same_gradients, d_outputs, gradients
from test_contract_reproducibility import OPTIONS

# With one thread every KV head has one owner; with five, "prefill", "one head" and "decode" take two passes.
SHAPES: dict[str, dict[str, Any]] = {
    "prefill": {"queries": 140, "keys": 330, "heads": 4, "kv_heads": 2, "dim": 48},
    "one head": {"queries": 210, "keys": 260, "heads": 1, "dim": 40},
    "decode": {"queries": 1, "keys": 2100, "heads": 8, "kv_heads": 2, "dim": 32},
    "many heads": {"queries": 40, "keys": 70, "heads": 24, "kv_heads": 8, "dim": 16},
    "tiny": {"queries": 16, "keys": 16, "heads": 8, "dim": 64},
}


def options_of_all_kinds(rng: np.random.Generator, batch: int, shape: dict[str, Any]) -> Any:
    """Whatever has a gradient, each with another broadcasting."""
    heads, rows, keys = shape["heads"], shape["queries"], shape["keys"]
    numbers = partial(normal, rng)
    return {
        "causal": True,
        "bias": (
            numbers(heads, rows, keys),
            numbers(batch, 1, 1, keys),
            numbers(1),
            numbers(rows, 1),
        ),
        "alibi": numbers(heads) / 50,
        "sinks": numbers(heads),
        "relative_bias": attncore.RelativeBias(numbers(heads, 32)),
        "dropout_p": 0.2,
        "seed": 77,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", [*OPTIONS, "all"])
@pytest.mark.parametrize("shape", SHAPES)
def test_threads(isa: str, dtype: Any, shape: str, option: str, rng: Any) -> None:
    batch = 2 if shape == "tiny" else 1
    made = inputs(rng, dtype=dtype, batch=batch, **SHAPES[shape])
    d_out, d_lse = d_outputs(rng, made[0], made[2])
    options = OPTIONS.get(option) or options_of_all_kinds(rng, batch, SHAPES[shape])
    one = gradients(d_out, made, d_lse=d_lse, num_threads=1, **options)
    for threads in (2, 3, 5):
        other = gradients(d_out, made, d_lse=d_lse, num_threads=threads, **options)
        assert_same_gradients(other, one, f"of {threads} threads")


def test_again_and_again(isa: str, rng: Any) -> None:
    made = inputs(rng, **SHAPES["prefill"])
    d_out, _ = d_outputs(rng, made[0], made[2])
    options = options_of_all_kinds(rng, 1, SHAPES["prefill"])
    first = gradients(d_out, made, num_threads=2, **options)
    for threads in (2, 3) * 8:
        assert_same_gradients(gradients(d_out, made, num_threads=threads, **options), first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_entry_alone_or_among_others(
    isa: str, dtype: Any, shape: str, option: str, rng: Any
) -> None:
    made = inputs(rng, dtype=dtype, batch=4, **SHAPES[shape])
    d_out, d_lse = d_outputs(rng, made[0], made[2])
    together = gradients(d_out, made, d_lse=d_lse, **OPTIONS[option])
    for b in (0, 3):
        at = slice(b, b + 1)
        alone = gradients(d_out[at], [a[at] for a in made], d_lse=d_lse[at], **OPTIONS[option])
        assert_same_gradients({n: a[at] for n, a in together.items()}, alone, f"entry {b}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_padding_and_neighbours_of_other_lengths(
    isa: str, dtype: Any, shape: str, option: str, rng: Any
) -> None:
    """A sequence alone, without padding, gives the bits that it gives in a padded batch; padding gets 0."""
    made = inputs(rng, dtype=dtype, batch=4, **SHAPES[shape])
    d_out, d_lse = d_outputs(rng, made[0], made[2])
    rows, keys = made[0].shape[2], made[1].shape[2]
    query_lengths = [rows, max(1, rows // 2), rows, max(1, rows - 1)]
    key_lengths = [keys, keys // 3 + 1, 5, keys - 1]
    lengths = {"query_lengths": query_lengths, "key_lengths": key_lengths}
    together = gradients(d_out, made, d_lse=d_lse, **lengths, **OPTIONS[option])
    for b, (i, j) in enumerate(zip(query_lengths, key_lengths, strict=True)):
        its = dict(zip(OPERANDS, (i, j, j), strict=True))
        at = slice(b, b + 1)
        cut = [a[at, :, :n] for a, n in zip(made, its.values(), strict=True)]
        alone = gradients(d_out[at, :, :i], cut, d_lse=d_lse[at, :, :i], **OPTIONS[option])
        ours = {n: a[at, :, : its[n]] for n, a in together.items()}
        assert_same_gradients(ours, alone, f"of entry {b}")
        for name, one in together.items():
            assert (one[b, :, its[name] :] == 0).all(), f"d_{name} of the padding"


def test_length_of_the_padding(isa: str, rng: Any) -> None:
    made = inputs(rng, queries=40, keys=200, heads=2, dim=32)
    d_out, _ = d_outputs(rng, made[0], made[2])
    expected = gradients(d_out, made, causal=True)
    ends = {"query": 40, "key": 200, "value": 200}
    for extra in (1, 7, 64, 1000, 3000):
        pad = [(0, 0), (0, 0), (0, extra), (0, 0)]
        d_padded, *padded = (np.pad(a, pad, constant_values=np.nan) for a in (d_out, *made))
        lengths: dict[str, Any] = {"query_lengths": [40], "key_lengths": [200]}
        ours = gradients(d_padded, padded, causal=True, **lengths)
        cut = {name: a[:, :, : ends[name]] for name, a in ours.items()}
        assert_same_gradients(cut, expected, f"with a padding of {extra}")


def test_options_of_each_batch_entry(isa: str, rng: Any) -> None:
    made = inputs(rng, batch=3, **SHAPES["prefill"])
    d_out, d_lse = d_outputs(rng, made[0], made[2])
    rows, keys = 140, 330
    mask = rng.random((3, 1, rows, keys)) < 0.8
    full = np.float32(rng.standard_normal((3, 4, rows, keys)))
    of_keys = np.float32(rng.standard_normal((3, 1, 1, keys)))
    slopes, offset = np.float32(rng.random((3, 4))), np.array([0, 200, -3])
    segments = np.sort(rng.integers(0, 4, (3, rows))), np.sort(rng.integers(0, 4, (3, keys)))

    def run(at: slice) -> Named:
        return gradients(
            d_out[at],
            [a[at] for a in made],
            d_lse=d_lse[at],
            causal=True,
            mask=mask[at],
            bias=(full[at], of_keys[at]),
            query_offset=offset[at],
            alibi=slopes[at],
            query_segments=segments[0][at],
            key_segments=segments[1][at],
        )

    together = run(slice(None))
    for b in range(3):
        at = slice(b, b + 1)
        assert_same_gradients({n: a[at] for n, a in together.items()}, run(at), f"of entry {b}")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", ["prefill", "many heads"])
def test_wanted(isa: str, dtype: Any, shape: str, rng: Any) -> None:
    """Any choice of gradients has the bits that all have."""
    made = inputs(rng, dtype=dtype, **SHAPES[shape])
    d_out, d_lse = d_outputs(rng, made[0], made[2])
    options = options_of_all_kinds(rng, 1, SHAPES[shape])
    every = gradients(d_out, made, d_lse=d_lse, **options)
    fields = (*OPERANDS, "bias", "alibi", "sinks", "relative_bias")
    choices = [{one} for one in fields] + [("key", "value"), ["query", "bias"], {"query", "alibi"}]
    for wanted in [*choices, frozenset(fields)]:
        ours = gradients(d_out, made, d_lse=d_lse, wanted=wanted, **options)
        names = {n for n in every if n.split()[0] in wanted}
        assert_same_gradients(ours, {n: every[n] for n in every if n in names}, f"of {wanted}")
    assert gradients(d_out, made, wanted=(), **options) == {}


def test_calls_before_leave_no_trace(isa: str, rng: Any) -> None:
    """The workspace is kept between calls; what it held must not show."""
    made = inputs(rng, **SHAPES["prefill"])
    d_out, _ = d_outputs(rng, made[0], made[2])
    expected = gradients(d_out, made)
    for shape in SHAPES.values():
        other = inputs(rng, dtype=np.float64, **shape)
        for a in other:
            a[...] = np.nan
        gradients(other[0], other)
        assert_same_gradients(gradients(d_out, made), expected)


EMPTY: dict[str, dict[str, Any]] = {
    "no queries": {"query_lengths": [0, 140, 0, 90, 140, 1, 0, 139]},
    "no keys": {"key_lengths": [0, 330, 0, 0, 134, 330, 0, 329]},
    "both": {"query_lengths": [90, 140] * 4, "key_lengths": [330, 0, 0, 330, 5, 200, 0, 330]},
    "beyond": {
        "query_offset": np.array([-900, 0, 900, -900, 400, -100, 5000, 0]),
        "window": (9, 9),
    },
}


@pytest.mark.parametrize("option", EMPTY)
def test_sequences_of_nothing_among_others(isa: str, option: str, rng: Any) -> None:
    """Many times, since threads that reuse each other's memory too early do so seldom."""
    made = inputs(rng, batch=8, **SHAPES["prefill"])
    d_out, _ = d_outputs(rng, made[0], made[2])
    expected = gradients(d_out, made, num_threads=1, **EMPTY[option])
    for turn in range(9):
        ours = gradients(d_out, made, num_threads=2 + turn % 3, **EMPTY[option])
        assert_same_gradients(ours, expected, f"in turn {turn}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_a_lone_query_head(isa: str, dtype: Any, rng: Any) -> None:
    """What a KV head's rows get does not depend on the other KV heads."""
    made = inputs(rng, 150, 260, heads=6, kv_heads=2, dtype=dtype)
    d_out, _ = d_outputs(rng, made[0], made[2])
    together = gradients(d_out, made, causal=True)
    parts = {"query": slice(3, 6), "key": slice(1, 2), "value": slice(1, 2)}
    cut = [a[:, part] for a, part in zip(made, parts.values(), strict=True)]
    alone = gradients(d_out[:, 3:], cut, causal=True)
    for name, part in parts.items():
        assert_same_bits(together[name][:, part], alone[name], f"d_{name}")
