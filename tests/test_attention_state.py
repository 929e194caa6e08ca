"""AttentionState: keys in pieces give what attention over all of them gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import assert_same_bits, compare_results, dtype_of, inputs
from kit_quantised import restore, scale_for, store
from reference import Array, from_bhsd
from state_kit import DTYPE_PAIRS, expected, in_pieces, make_state, sizes_to_cuts, updates

B, H, HK, Q, K = 2, 4, 2, 5, 61
# Sizes of pieces, repeated: single keys, primes, empty ones between, all at once.
SIZES = [(1,), (7,), (0, 13, 0, 1), (K,)]
dtype_pairs = pytest.mark.parametrize(("dtype", "storage"), DTYPE_PAIRS)


def options_of(case: str, rng: np.random.Generator) -> dict[str, Any]:
    """Options of attention over (B, H, Q, K)."""
    table = rng.standard_normal((H, 16)).astype(np.float32)
    bias = rng.standard_normal((H, Q, K)).astype(np.float32)
    bias[:, :, rng.random(K) < 0.2] = -np.inf
    cases: dict[str, dict[str, Any]] = {
        "plain": {},
        "causal": {"causal": True, "query_offset": K - Q},
        "causal, from the start": {"causal": True, "query_offset": [0, 3]},
        "window": {"window": (9, 2), "query_offset": [K - Q, 17]},
        "alibi": {"alibi": rng.random((B, H)).astype(np.float32), "query_offset": 20},
        "relative bias": {"relative_bias": attncore.RelativeBias(table), "query_offset": 30},
        "softcap, scale": {"softcap": 3.0, "scale": 0.7},
        "sinks": {"sinks": rng.standard_normal(H).astype(np.float32)},
        "mask": {"mask": rng.random((B, 1, Q, K)) < 0.5},
        "mask of rows": {"mask": np.arange(Q)[:, None] != 2},
        "bias": {"bias": (bias, rng.standard_normal((B, 1, 1, K)).astype(np.float32))},
        "segments": {
            "query_segments": rng.integers(0, 3, (B, Q)),
            "key_segments": np.sort(rng.integers(0, 3, (B, K))),
        },
        "lengths": {"key_lengths": [K, 19], "query_lengths": [Q, 3]},
        "nothing visible": {"mask": np.zeros((1, K), bool), "sinks": np.ones(H, np.float32)},
    }
    if case == "all":
        every = (c for name, c in cases.items() if name not in ("nothing visible", "mask of rows"))
        return {name: option for c in every for name, option in c.items()}
    return cases[case]


CASES = [
    "plain",
    "causal",
    "causal, from the start",
    "window",
    "alibi",
    "relative bias",
    "softcap, scale",
    "sinks",
    "mask",
    "mask of rows",
    "bias",
    "segments",
    "lengths",
    "nothing visible",
    "all",
]


@dtype_pairs
@pytest.mark.parametrize("case", CASES)
def test_pieces(isa: str, dtype: str, storage: str, case: str, rng: np.random.Generator) -> None:
    q, k, v = inputs(
        rng, Q, K, batch=B, heads=H, kv_heads=HK, dim=18, value_dim=7, dtype=dtype_of(storage)
    )
    options = options_of(case, rng)
    exact, plainly = expected(q, k, v, dtype, **options)
    for sizes in SIZES:
        out, lse = in_pieces(q, k, v, sizes_to_cuts(sizes, K), dtype=dtype, **options)
        assert str(out.dtype) == str(lse.dtype) == dtype
        compare_results(out, lse, exact, plainly)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("queries", "dims"), [(1, (64, 64)), (130, (64, 64)), (33, (1, 300))])
def test_shapes(
    isa: str, dtype: str, queries: int, dims: tuple[int, int], rng: np.random.Generator
) -> None:
    """Decoding, several row tiles, odd dims; pieces larger than a key tile."""
    q, k, v = inputs(rng, queries, 3000, dim=dims[0], value_dim=dims[1], dtype=dtype)
    options = {"causal": True, "query_offset": 2950}
    exact, plainly = expected(q, k, v, dtype, **options)
    out, lse = in_pieces(q, k, v, sizes_to_cuts((997, 2, 129), 3000), dtype=dtype, **options)
    compare_results(out, lse, exact, plainly)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_layouts(layout: Any, rank: int, rng: np.random.Generator) -> None:
    """Results have query's axes; 2 and 3 dimensions have fewer, and lengths may be scalars."""
    heads = 1 if rank == 2 else 4
    q, k, v = inputs(rng, Q, K, heads=heads, value_dim=9)
    arrays = [from_bhsd(array, rank, layout) for array in (q, k, v)]
    token = -2 if rank == 2 or layout == "bhsd" else -3
    options: dict[str, Any] = {"layout": layout, "causal": True, "query_offset": 30}
    state = attncore.AttentionState(arrays[0], value_dim=9, **options)
    for begin, end in sizes_to_cuts((11,), K):
        at = [slice(None)] * rank
        at[token] = slice(begin, end)
        left = max(0, min(50 - begin, 11))
        state.update(*(a[tuple(at)] for a in arrays[1:]), key_lengths=left if rank < 4 else [left])
    out, lse = state.result()
    whole = attncore.attention(
        *arrays, key_lengths=50 if rank < 4 else [50], return_lse=True, **options
    )
    assert (out.shape, lse.shape) == (whole[0].shape, whole[1].shape)
    np.testing.assert_allclose(out, whole[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(lse, whole[1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("queries", [1, 40])
def test_one_piece_has_the_bits_of_attention(
    isa: str, queries: int, rng: np.random.Generator
) -> None:
    q, k, v = inputs(rng, queries, 700, batch=B, heads=H, kv_heads=HK)
    mask = rng.random((queries, 700)) < 0.5
    mask[0] = False
    state = attncore.AttentionState(q, softcap=4.0)
    state.update(k, v, mask=mask)
    out, lse = state.result()
    whole = attncore.attention(q, k, v, mask=mask, softcap=4.0, return_lse=True)
    assert_same_bits(out, whole[0])
    np.testing.assert_allclose(lse, whole[1], rtol=3e-7)


def test_ragged_pieces(isa: str, rng: np.random.Generator) -> None:
    """Each batch entry goes on from where its own keys ended."""
    q, k, v = inputs(rng, Q, 90, batch=3, heads=H, kv_heads=HK, dtype=np.float64)
    counts = rng.integers(0, 10, (3, 9))
    options: dict[str, Any] = {"causal": True, "query_offset": [20, 30, 40], "alibi": [0.1] * H}
    state = attncore.AttentionState(q, **options)
    seen = np.zeros(3, int)
    for count in counts.T:
        piece = [np.full((3, HK, 10, 32), np.nan) for _ in "kv"]
        for entry in range(3):
            for part, source in zip(piece, (k, v), strict=True):
                taken = source[entry, :, seen[entry] : seen[entry] + count[entry]]
                part[entry, :, : count[entry]] = taken
        state.update(*piece, key_lengths=count)
        seen += count
        assert state.next_key.tolist() == seen.tolist()
    whole = attncore.attention(q, k, v, key_lengths=seen, return_lse=True, **options)
    for ours, theirs in zip(state.result(), whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("counts", [(9, 4), (4, 9), (9, 0)])
def test_a_merged_state_goes_on_after_both(counts: tuple[int, int]) -> None:
    x = np.ones((9, 4), np.float32)
    state, other = (attncore.AttentionState(x) for _ in range(2))
    for one, count in zip((state, other), counts, strict=True):
        one.update(x[:count], x[:count])
    state.merge(other)
    assert state.next_key.tolist() == [9]
    assert other.next_key.tolist() == [counts[1]]


def test_pieces_in_any_order_by_their_positions(isa: str, rng: np.random.Generator) -> None:
    q, k, v = inputs(rng, Q, K, batch=B, heads=H, kv_heads=HK, dtype=np.float64)
    options: dict[str, Any] = {"window": (20, 4), "query_offset": [40, 25], "alibi": [0.3] * H}
    state = attncore.AttentionState(q, **options)
    pieces = sizes_to_cuts((6,), K)
    for number, begin in enumerate(rng.permutation([begin for begin, _ in pieces])):
        first = int(begin) if number % 2 else [int(begin)] * B
        state.update(k[:, :, begin : begin + 6], v[:, :, begin : begin + 6], first_key=first)
    assert state.next_key.tolist() == [K, K]
    whole = attncore.attention(q, k, v, return_lse=True, **options)
    for ours, theirs in zip(state.result(), whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_keys(dtype: str, rng: np.random.Generator) -> None:
    q, k, v = inputs(rng, Q, 0, dtype=dtype)
    state = attncore.AttentionState(q)
    for _ in range(2):
        out, lse = state.result()
        assert_same_bits(out, np.zeros_like(q))
        assert_same_bits(lse, np.full(q.shape[:3], -np.inf, dtype), "lse")
        state.update(k, v)
    merged = attncore.AttentionState(q)
    merged.merge(state)
    assert_same_bits(merged.result()[1], lse, "lse")


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4)])
def test_no_queries(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    state = attncore.AttentionState(np.zeros(shape, np.float32))
    x = np.ones((shape[0], 2, 9, 4), np.float32)
    state.update(x, x)
    out, lse = state.result()
    assert (out.shape, lse.shape) == (shape, shape[:3])
    assert state.next_key.tolist() == [9] * shape[0]


def test_what_the_state_keeps_is_its_own(rng: np.random.Generator) -> None:
    """Query, options and pieces may change once the call is over; results too."""
    q, k, v = inputs(rng, Q, K, batch=B)
    options: dict[str, Any] = {
        "sinks": np.ones(2, np.float32),
        "query_offset": np.array([50, 40]),
        "causal": True,
    }
    expected_out = attncore.attention(q, k, v, **options)
    state = make_state(q, v, **options)
    for array in (q, options["sinks"], options["query_offset"]):
        array[...] = 7
    for arrays, own in updates(k, v, sizes_to_cuts((20,), K)):
        state.update(*arrays, **own)
        for array in arrays:
            array[...] = np.nan
    np.testing.assert_allclose(state.result()[0], expected_out, atol=1e-6)
    state.result()[0][...] = np.nan
    np.testing.assert_allclose(state.result()[0], expected_out, atol=1e-6)


@pytest.mark.parametrize("storage", ["float32", "float64"])  # converted, and as they are
@pytest.mark.parametrize("view", ["negative", "transposed", "broadcast"])
def test_strides(isa: str, view: str, storage: str, rng: np.random.Generator) -> None:
    def seen(array: Array) -> Array:
        if view == "broadcast":
            return np.broadcast_to(array[:1], array.shape)
        if view == "negative":
            return array[:, ::-1, ::-1, ::-1]
        return array.swapaxes(0, 2)[:, :, :, ::2]

    q, k, v = (seen(rng.standard_normal((6, 4, 6, 8)).astype(storage)) for _ in range(3))
    out, lse = in_pieces(q, k, v, sizes_to_cuts((2,), k.shape[2]), dtype="float64")
    copies = [np.array(array, np.float64, order="C") for array in (q, k, v)]
    theirs = attncore.attention(*copies, return_lse=True)
    np.testing.assert_allclose(out, theirs[0], rtol=0, atol=1e-13)
    np.testing.assert_allclose(lse, theirs[1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("storage", ["int8", "float8_e4m3fn", "int4"])
def test_quantised_pieces(isa: str, storage: str, layout: Any, rng: np.random.Generator) -> None:
    """A scale for each token and head, split as the keys are."""
    pytest.importorskip("ml_dtypes")
    q, k, v = inputs(rng, Q, K, batch=B, heads=H, kv_heads=HK, dim=18, value_dim=8)
    scales = [scale_for(storage, array) for array in (k, v)]
    packs = [store(a / s[..., None], storage) for a, s in zip((k, v), scales, strict=True)]
    key, value = (restore(p) * s[..., None] for p, s in zip(packs, scales, strict=True))

    def laid(array: Array) -> Array:
        return array.swapaxes(1, 2) if layout == "bshd" else array

    state = attncore.AttentionState(laid(q), value_dim=8, layout=layout)
    for begin, end in sizes_to_cuts((7,), K):
        own = [laid(array[:, :, begin:end]) for array in (*packs, *scales)]
        state.update(own[0], own[1], key_scale=own[2], value_scale=own[3])
    out, lse = state.result()
    exact, plainly = expected(q, key, value, "float32")
    compare_results(laid(out), lse, exact, plainly)
