"""precision=: float32 by float32's own products, or by those of bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kit import DTYPES, Inputs, assert_same_bits, dtype_of, inputs
from kit_precision import FEW, MEDIUM, ROUNDING, TILES, assert_same, run
from reference import Array, Result, reference, score, visible_product
from rule import assert_close_by_rule


def rounded(array: Array) -> Array:
    wide: Array = array.astype(dtype_of("bfloat16")).astype(np.float32)
    return wide


def plainly(made: Inputs, **options: Any) -> Result:
    """The plain evaluation of what "medium" is: operands and weights rounded to bfloat16, sums in float32."""
    q, k, v = map(rounded, made)
    scored = score(q, k, v, np.dtype(np.float32), **options)
    scores = np.where(scored.visible, scored.scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(top == -np.inf, np.float32(0), top)
    weights = np.where(scored.visible, np.exp(scores - top), np.float32(0))
    total = weights.sum(axis=-1, keepdims=True)
    whole = np.where(total == 0, np.float32(1), total)
    out = visible_product(rounded(weights / whole), scored.v, scored.visible)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    return Result(out, lse, weights)


def check(made: Inputs, **options: Any) -> None:
    """The rule, and what bfloat16 explains of each operand, of a weight and of the sum of weights: 2⁻⁹, half of
    what rounding may cost at worst, as errors of both signs meet.
    """
    out, lse = run(made, **MEDIUM, **options)
    highest, _ = run(made, **options)
    exact, plain = reference(*made, **options), plainly(made, **options)
    assert out.dtype == np.float32
    assert_close_by_rule(out, exact.out, plain.out, exact.magnitude)
    assert_close_by_rule(lse, exact.lse, plain.lse, max(1.0, exact.score_magnitude / 16), "lse")
    unit = 2.0**-9
    largest = np.abs(made[2]).max(initial=0)
    off_by = (2 * np.expm1(2.01 * unit * exact.score_magnitude) + 4 * unit) * largest
    assert np.abs(out - highest).max(initial=0) <= off_by


SHAPES: dict[str, dict[str, Any]] = {
    "square": {"queries": 130, "keys": 130, "dim": 64},
    "two tiles and a key": {"queries": 19, "keys": 257, "dim": 128},
    "odd dims": {"queries": 31, "keys": 77, "dim": 33, "value_dim": 17},
    "narrow values": {"queries": 20, "keys": 300, "dim": 72, "value_dim": 8},
    "wide values": {"queries": 20, "keys": 131, "dim": 8, "value_dim": 70},
    "dims of 1": {"queries": 9, "keys": 5, "dim": 1},
    "one key": {"queries": 12, "keys": 1, "dim": 40},
    "GQA 3": {"queries": 11, "keys": 90, "heads": 6, "kv_heads": 2},
    "GQA 8": {"queries": 9, "keys": 65, "heads": 8, "kv_heads": 1, "batch": 2},
    "folded": {"queries": 20, "keys": 4500, "heads": 1, "dim": 16},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (40, 3)},
    "softcap": {"softcap": 2.0, "scale": 0.4},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_of_medium(isa: str, shape: str, option: str, rng: np.random.Generator) -> None:
    if isa in ROUNDING:
        check(inputs(rng, **SHAPES[shape]), **OPTIONS[option])


def test_error_of_medium_with_masks(isa: str, rng: np.random.Generator) -> None:
    if isa not in ROUNDING:
        return
    made = inputs(rng, 40, 150, batch=3, heads=6, kv_heads=2, value_dim=24)
    mask = rng.random((1, 6, 40, 150)) < 0.5
    lengths = {"key_lengths": [150, 31, 0], "query_lengths": [40, 17, 40]}
    bias = rng.standard_normal((40, 150)).astype(np.float32)
    for option in ({"mask": mask}, lengths, {"bias": bias}):
        check(made, **option)
        check(made, window=(30, 0), **option)
    check(made, mask=mask, **lengths)


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("shape", SHAPES)
def test_higher_ones_are_the_default(
    isa: str, shape: str, precision: str, rng: np.random.Generator
) -> None:
    """But for "high" by tiles, whose operands and weights have 16 bits."""
    made = inputs(rng, **SHAPES[shape])
    ours, theirs = run(made, causal=True, precision=precision), run(made, causal=True)
    if precision == "highest" or isa not in TILES:
        assert_same(ours, theirs)
        return
    unit = 2.0**-16
    exact = reference(*made, causal=True)
    bound = (2 * np.expm1(4 * unit * exact.score_magnitude) + 8 * unit) * np.abs(made[2]).max()
    assert np.abs(ours[0] - theirs[0]).max() <= bound
    lse_bound = 4 * unit * exact.score_magnitude
    np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=lse_bound + 1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_medium_is_bfloat16s_where_there_are_pairs(
    isa: str, shape: str, rng: np.random.Generator
) -> None:
    made = inputs(rng, **SHAPES[shape])
    ours, theirs = run(made, **MEDIUM), run(made)
    if isa not in ROUNDING:
        assert_same(ours, theirs)
        return
    assert (ours[0] != theirs[0]).any()
    q, k, v = (x.astype(dtype_of("bfloat16")) for x in made)
    out, lse = run((q, k, v))  # the same products, rounded once more
    assert_same_bits(ours[0].astype(dtype_of("bfloat16")), out)
    assert_same_bits(ours[1], lse, "lse")


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_other_dtypes_are_as_ever(isa: str, dtype: Any, rng: np.random.Generator) -> None:
    made = inputs(rng, 30, 61, dtype=dtype)
    assert_same(run(made, **MEDIUM), run(made))
    if dtype != np.float64:  # mixed
        q, k, v = inputs(rng, 30, 61)
        for mixed in ((q, k.astype(dtype), v), (q, k, v.astype(dtype)), (q.astype(dtype), k, v)):
            assert_same(run(mixed, **MEDIUM), run(mixed))


@pytest.mark.parametrize(("rows", "group"), [(1, 1), (FEW, 1), (2, 4), (1, 8), (5, 3)])
@pytest.mark.parametrize("stride", [1, -2])
def test_few_rows_are_exact(
    isa: str, rows: int, group: int, stride: int, rng: np.random.Generator
) -> None:
    for dims in ({"dim": 40, "value_dim": 72}, {"dim": 128}, {"dim": 72, "value_dim": 8}):
        q, k, v = inputs(rng, rows, 1500, heads=2 * group, kv_heads=2, **dims)
        v = np.repeat(v, abs(stride), axis=3)[..., ::stride]
        k = np.repeat(k, abs(stride), axis=3)[..., ::stride]
        assert_same(run((q, k, v), **MEDIUM), run((q, k, v)))


def change(array: Array, how: str) -> Array:
    """An equal array that lies in another way."""
    if how == "every second":
        return np.repeat(array, 2, axis=3)[..., ::2]
    if how == "backwards":
        return np.ascontiguousarray(array[..., ::-1, ::-1])[..., ::-1, ::-1]
    if how == "transposed":
        return np.ascontiguousarray(array.swapaxes(2, 3)).swapaxes(2, 3)
    memory = np.zeros(array.nbytes + 1, np.uint8)
    unaligned = memory[1:].view(array.dtype).reshape(array.shape)
    unaligned[...] = array
    return unaligned


@pytest.mark.parametrize("how", ["every second", "backwards", "transposed", "unaligned"])
@pytest.mark.parametrize("which", range(3))
def test_strides_leave_bits_alone(isa: str, which: int, how: str, rng: np.random.Generator) -> None:
    made = inputs(rng, 21, 141, dim=41, value_dim=70, heads=4, kv_heads=2)
    other = [change(a, how) if i == which else a for i, a in enumerate(made)]
    assert_same(run(tuple(other), **MEDIUM), run(made, **MEDIUM))  # type: ignore[arg-type]


@pytest.mark.parametrize("poison", [np.nan, np.inf, np.finfo(np.float32).max])
@pytest.mark.parametrize("rows", [3, 60])
def test_what_hidden_keys_hold_does_not_matter(
    isa: str, rows: int, poison: float, rng: np.random.Generator
) -> None:
    """finfo.max is finite, but infinite as it is rounded."""
    q, k, v = inputs(rng, rows, 200, dim=40, value_dim=33)
    mask = rng.random((rows, 200)) < 0.5
    mask[:, 150] = False
    mask[rows // 2 :, 20] = False
    mask[: rows // 2, 20] = True
    clean = run((q, k, v), mask=mask, **MEDIUM)
    v2, k2 = v.copy(), k.copy()
    v2[:, :, [20, 150]] = poison
    k2[:, :, 150] = poison
    ours = run((q, k2, v2), mask=mask, **MEDIUM)
    assert_same_bits(ours[1], clean[1], "lse")
    assert_same_bits(ours[0][:, :, rows // 2 :], clean[0][:, :, rows // 2 :])
    if isa in ROUNDING and rows > FEW:
        assert not np.isfinite(ours[0][:, :, : rows // 2]).any()


@pytest.mark.parametrize("how", ["lengths", "window"])
def test_uninitialised_tails(isa: str, how: str, rng: np.random.Generator) -> None:
    q, k, v = inputs(rng, 50, 171, dim=24)
    options: dict[str, Any] = {"query_offset": 0, "window": (None, 2)}
    if how == "lengths":
        options |= {"key_lengths": 131, "window": None}
    last = 131 if how == "lengths" else 52
    clean = run((q, k, v), **MEDIUM, **options)
    for array in (k, v):
        array[:, :, last:] = np.nan
    assert_same(run((q, k, v), **MEDIUM, **options), clean)


def test_batch_and_threads_leave_bits_alone(isa: str, rng: np.random.Generator) -> None:
    lengths = {"query_lengths": [70, 9, 4, 0], "key_lengths": [300, 299, 150, 7]}
    q, k, v = inputs(rng, 70, 300, batch=4, heads=6, kv_heads=2)
    first = run((q, k, v), causal=True, num_threads=1, **lengths, **MEDIUM)
    for threads in (2, 3):
        other = run((q, k, v), causal=True, num_threads=threads, **lengths, **MEDIUM)
        assert_same(other, first)
    for b, (rows, keys) in enumerate(zip(*lengths.values(), strict=True)):
        alone = q[b : b + 1, :, :rows], k[b : b + 1, :, :keys], v[b : b + 1, :, :keys]
        out, lse = run(alone, causal=True, **MEDIUM)
        assert_same((out[0], lse[0]), (first[0][b, :, :rows], first[1][b, :, :rows]))


@pytest.mark.parametrize(("queries", "keys", "batch"), [(0, 9, 1), (9, 0, 1), (9, 9, 0)])
def test_zero_sizes(
    isa: str, queries: int, keys: int, batch: int, rng: np.random.Generator
) -> None:
    made = inputs(rng, queries, keys, batch=batch)
    assert_same(run(made, **MEDIUM), run(made))
