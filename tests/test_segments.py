"""Segments in any arrangement are their boolean mask, to the bit, whether they are a band or not."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import attncore
from kit import DTYPES, assert_same_bits, check, inputs
from kit_backward import assert_same_gradients, check_backward, d_outputs, gradients
from reference import Array

# (queries' runs, keys' runs): segment ids and how many tokens in a row have them, in hundredths
ARRANGEMENTS: dict[str, tuple[list[tuple[int, int]], list[tuple[int, int]]]] = {
    "rising": ([(0, 20), (1, 50), (5, 30)], [(0, 35), (1, 10), (2, 20), (5, 35)]),
    "padding last": ([(1, 40), (2, 40), (0, 20)], [(1, 50), (2, 25), (0, 25)]),
    "falling": ([(9, 30), (-4, 70)], [(9, 60), (3, 10), (-4, 30)]),
    "queries' own": ([(1, 30), (7, 30), (2, 40)], [(1, 50), (2, 50)]),
    "keys begin later": ([(7, 60), (2, 40)], [(0, 50), (2, 50)]),
    "another order": ([(1, 50), (2, 50)], [(2, 50), (1, 50)]),
    "in two runs": ([(1, 50), (2, 50)], [(1, 30), (2, 30), (1, 40)]),
    "queries go back": ([(1, 40), (2, 20), (1, 40)], [(1, 50), (2, 50)]),
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiles": {"queries": 130, "keys": 290, "heads": 2, "dim": 40},
    "a group": {"queries": 67, "keys": 301, "heads": 6, "kv_heads": 2, "dim": 17},
    "few rows": {"queries": 5, "keys": 290, "heads": 2, "dim": 32},
    "turned": {"queries": 31, "keys": 140, "heads": 2, "dim": 64},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "alone": {},
    "causal": {"causal": True},
    "window and lengths": {"window": (60, 9)},
    "softcap and dropout": {"softcap": 3.0, "dropout_p": 0.3, "seed": 8},
}
# Each shape with each option, in two of the arrangements.
CASES = [
    (arrangement, shape, list(OPTIONS)[(i + j) % len(OPTIONS)])
    for i, arrangement in enumerate(ARRANGEMENTS)
    for j, shape in enumerate(SHAPES)
]


def laid_out(runs: list[tuple[int, int]], tokens: int, shift: int) -> Array:
    """The ids of two entries, whose runs end `shift` tokens apart."""
    ids, shares = (np.array(column) for column in zip(*runs, strict=True))
    ends = np.cumsum(shares)[:-1] * tokens // 100
    of_token = [np.searchsorted(ends + by, np.arange(tokens), side="right") for by in (0, shift)]
    return np.asarray(ids[np.stack(of_token)])


def as_mask(query_segments: Array, key_segments: Array) -> Array:
    return np.asarray(query_segments[:, None, :, None] == key_segments[:, None, None, :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("arrangement", "shape", "option"), CASES)
def test_segments_have_the_bits_of_their_mask(
    isa: str, dtype: Any, arrangement: str, shape: str, option: str, rng: Any
) -> None:
    """Forward and backward, and what a segment hides may be NaN."""
    made = inputs(rng, batch=2, dtype=dtype, **SHAPES[shape])
    queries, keys = ARRANGEMENTS[arrangement]
    ours = laid_out(queries, SHAPES[shape]["queries"], 3)
    theirs = laid_out(keys, SHAPES[shape]["keys"], 11)
    options = dict(OPTIONS[option])
    if option == "alone":
        made[2][:, :, -5:] = np.nan
    if option == "window and lengths":
        options["query_lengths"] = np.array([ours.shape[1], ours.shape[1] - 1])
        options["key_lengths"] = np.array([theirs.shape[1] - 7, theirs.shape[1] // 2])
    d_out, _ = d_outputs(rng, made[0], made[2])
    by_ids = {**options, "query_segments": ours, "key_segments": theirs}
    by_mask = {**options, "mask": as_mask(ours, theirs)}
    results = []
    for given_options in (by_ids, by_mask):
        with np.errstate(invalid="ignore"):
            out, lse = attncore.attention(*made, return_lse=True, **given_options)
            results.append((out, lse, gradients(d_out, made, **given_options)))
    (out, lse, of_segments), (same_out, same_lse, of_mask) = results
    assert_same_bits(out, same_out)
    assert_same_bits(lse, same_lse, "lse")
    assert_same_gradients(of_segments, of_mask)


runs = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 90)), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(runs, runs, st.booleans(), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_any_runs_have_the_bits_of_their_mask(
    of_queries: list[tuple[int, int]],
    of_keys: list[tuple[int, int]],
    causal: bool,
    group: int,
    seed: int,
) -> None:
    ours, theirs = (
        np.repeat([segment for segment, _ in some], [count for _, count in some])[None]
        for some in (of_queries, of_keys)
    )
    rng = np.random.default_rng(seed)
    shape: dict[str, Any] = {
        "queries": ours.size,
        "keys": theirs.size,
        "heads": group,
        "kv_heads": 1,
        "dim": 8,
    }
    made = inputs(rng, **shape)
    out = attncore.attention(*made, causal=causal, query_segments=ours, key_segments=theirs)
    expected = attncore.attention(*made, causal=causal, mask=as_mask(ours, theirs))
    assert_same_bits(out, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_number_their_segments_alike(isa: str, causal: bool, rng: Any) -> None:
    """Each sequence's segments are its own, whatever ids the next one has."""
    lengths = (150, 33, 260)
    starts: Array = np.cumsum((0, *lengths))
    ids = np.concatenate([np.arange(n) * 3 // n for n in lengths])
    packed: Any = [rng.standard_normal((starts[-1], 2, 24)).astype(np.float32) for _ in range(3)]
    query, key, value = packed
    own: dict[str, Any] = {"query_segments": ids, "key_segments": ids}
    out = attncore.attention_varlen(query, key, value, starts, starts, causal=causal, **own)
    for begin, end in itertools.pairwise(starts):
        part = [a[begin:end].swapaxes(0, 1)[None] for a in packed]
        own = {
            "query_segments": ids[None, begin:end],
            "key_segments": ids[None, begin:end],
        }
        alone = attncore.attention(*part, causal=causal, **own)
        assert_same_bits(out[begin:end].swapaxes(0, 1), alone[0])


def ordered_and_not(rng: np.random.Generator, shape: tuple[int, int, int]) -> tuple[Array, Array]:
    """Of entries by turns: packed documents, and ids in any order."""
    batch, queries, keys = shape
    ours, theirs = np.arange(queries) * 3 // queries, np.arange(keys) * 3 // keys
    any_order = rng.integers(0, 3, (batch, queries)), rng.integers(0, 3, (batch, keys))
    turn = np.arange(batch)[:, None] % 2 == 0
    return np.where(turn, ours, any_order[0]), np.where(turn, theirs, any_order[1])


def test_entries_of_both_kinds_have_the_bits_of_each_alone(isa: str, rng: Any) -> None:
    made = inputs(rng, 150, 270, batch=4, heads=2, dim=24)
    ours, theirs = ordered_and_not(rng, (4, 150, 270))
    d_out, _ = d_outputs(rng, made[0], made[2])
    options: dict[str, Any] = {"query_segments": ours, "key_segments": theirs}
    out = attncore.attention(*made, **options)
    d = gradients(d_out, made, **options)
    for entry in range(4):
        at = slice(entry, entry + 1)
        options = {"query_segments": ours[at], "key_segments": theirs[at]}
        alone = [a[at] for a in made]
        assert_same_bits(out[at], attncore.attention(*alone, **options))
        of_alone = gradients(d_out[at], alone, **options)
        assert_same_gradients({name: g[at] for name, g in d.items()}, of_alone)


@pytest.mark.parametrize("lengths", [[0, 40], [40, 0], [0, 0]])
def test_entries_without_queries(isa: str, lengths: list[int], rng: Any) -> None:
    """The first one's, too: nothing stands before its segments."""
    made = inputs(rng, 40, 90, batch=2, dim=16)
    ours, theirs = np.arange(40)[None] // 10 % 4, np.arange(90)[None] // 30
    ids = {"query_segments": np.repeat(ours, 2, 0), "key_segments": np.repeat(theirs, 2, 0)}
    options: dict[str, Any] = {**ids, "query_lengths": lengths}
    out, _ = check(*made, **options)
    assert (out[np.array(lengths) == 0] == 0).all()
    d_out, _ = d_outputs(rng, made[0], made[2])
    check_backward(d_out, made, **options)
    assert (attncore.explain(*made, **options).flops == 0) == (sum(lengths) == 0)


def test_states_take_pieces_of_segments(isa: str, rng: Any) -> None:
    """Each piece is a band, or some are; queries' segments stay."""
    made = inputs(rng, 70, 5000, batch=2, heads=2, dim=33)
    query, key, value = made
    ours, theirs = ordered_and_not(rng, (2, 70, 5000))
    by_ids = attncore.AttentionState(query, query_segments=ours)
    by_mask = attncore.AttentionState(query)
    for begin, end in itertools.pairwise((0, 1700, 1701, 4200, 5000)):
        keys = slice(begin, end)
        piece = key[:, :, keys], value[:, :, keys]
        by_ids.update(*piece, key_segments=theirs[:, keys])
        by_mask.update(*piece, mask=as_mask(ours, theirs[:, keys]))
    for one, other in zip(by_ids.result(), by_mask.result(), strict=True):
        assert_same_bits(one, other)


def test_explain_counts_what_segments_leave() -> None:
    made = [np.zeros((1, 2, 1024, 32), np.float32)] * 3
    ids = np.arange(1024)[None] // 256
    whole = attncore.explain(*made).flops
    assert attncore.explain(*made, query_segments=ids, key_segments=ids).flops == whole / 4
    lengths = np.arange(1, 46)
    ids = np.repeat(np.arange(45), lengths)[None, :1024]
    unequal = attncore.explain(*made, query_segments=ids, key_segments=ids).flops
    pairs = (np.bincount(ids[0]) ** 2).sum()
    assert unequal == whole * pairs / 1024**2
    mixed = ids[:, ::-1] % 3
    assert attncore.explain(*made, query_segments=ids, key_segments=mixed).flops == whole
