"""Few rows whose keys lie as (tokens, heads, dim): heads are read together, with the bits of each alone.

One task reads a token of all KV heads before the next one where there is enough to read (4 MiB).
The bits are those of (heads, tokens, dim), whose results other tests compare with the reference.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits, dtype_of, inputs
from reference import Array

# batch, KV heads, group, queries, keys, dim, value dim: more than 4 MiB in float16, and parts of 1024 keys.
SHAPES: dict[str, tuple[int, int, int, int, int, int, int]] = {
    "one row": (1, 8, 1, 1, 4200, 40, 33),
    "a group of 3": (2, 5, 3, 1, 3000, 48, 40),
    "a group of 8": (1, 3, 8, 1, 6150, 64, 64),
    "nine rows": (1, 4, 3, 3, 5003, 64, 72),
    "sixteen rows": (2, 2, 8, 2, 4100, 80, 64),
    "many heads": (1, 40, 1, 1, 2100, 16, 24),
    "one part of many entries": (12, 8, 2, 1, 700, 40, 33),
}


def tokens_first(a: Array) -> Array:
    """The same numbers, in the order (batch, tokens, heads, dim)."""
    return np.swapaxes(np.ascontiguousarray(np.swapaxes(a, 1, 2)), 1, 2)


def make(rng: np.random.Generator, shape: str, dtype: Any) -> tuple[Array, Array, Array]:
    batch, kv_heads, group, queries, keys, dim, value_dim = SHAPES[shape]
    made = inputs(rng, queries, keys, batch=batch, heads=kv_heads * group, kv_heads=kv_heads, dim=dim,
                  value_dim=value_dim, dtype=dtype)  # fmt: skip
    assert made[1].nbytes + made[2].nbytes > 4 << 20
    return made


def check(query: Array, key: Array, value: Array, **options: Any) -> None:
    expected, lse = attncore.attention(query, key, value, return_lse=True, **options)
    for threads in (1, 2):
        out, ours = attncore.attention(query, tokens_first(key), tokens_first(value),
                                       return_lse=True, num_threads=threads, **options)  # fmt: skip
        assert_same_bits(out, expected)
        assert_same_bits(ours, lse, "lse")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(isa: str, shape: str, dtype: Any, rng: Any) -> None:
    check(*make(rng, shape, dtype))


OPTIONS = ["causal", "window", "lengths", "mask", "mask of a head", "dropout", "sinks", "softcap"]


@pytest.mark.parametrize("dtype", [np.float32, dtype_of("bfloat16")])
@pytest.mark.parametrize("option", [*OPTIONS, "all"])
def test_options(isa: str, option: str, dtype: Any, rng: Any) -> None:
    """Heads may see different keys: then a tile is each head's own."""
    query, key, value = make(rng, "a group of 3", dtype)
    heads, keys = query.shape[1], key.shape[2]
    apart = rng.random((1, heads, 1, keys)) < 0.7
    apart[:, :3, :, 1000:1400] = False  # tiles that one KV head does not see
    options: dict[str, dict[str, Any]] = {
        "causal": {"causal": True, "query_offset": 2500},
        "window": {"window": (1500, 0)},
        "lengths": {"key_lengths": [keys - 77, 1030]},
        "mask": {"mask": rng.random(keys) < 0.7},
        "mask of a head": {"mask": apart},
        "dropout": {"dropout_p": 0.2, "seed": 3},
        "sinks": {"sinks": rng.standard_normal(heads).astype(np.float32)},
        "softcap": {"softcap": 3.0},
    }
    every = {name: value for one in options.values() for name, value in one.items()}
    check(query, key, value, **(every if option == "all" else options[option]))


def test_heads_are_one_task_whether_keys_are_split_or_not(rng: Any) -> None:
    """So that memory is read in its order: 8 heads a task, of each part."""
    for keys, parts in ((700, 1), (1100, 2)):
        query, *arrays = inputs(rng, 1, keys, batch=12, heads=8, kv_heads=8, dim=64)
        plan = attncore.explain(query, *map(tokens_first, arrays), num_threads=1)
        assert plan.tasks == 12 * parts
        assert attncore.explain(query, *arrays, num_threads=1).tasks == 12 * parts * 8


@pytest.mark.parametrize("keys", [700, 3000])
def test_heads_that_see_nothing(isa: str, keys: int, rng: Any) -> None:
    """What an earlier call left in the workspace is not theirs."""
    query, key, value = inputs(rng, 1, keys, batch=12, heads=8, kv_heads=8, dim=64)
    swapped = tokens_first(key), tokens_first(value)
    positions: list[tuple[int, dict[str, Any]]]
    positions = [(-1, {"causal": True}), (10 * keys, {"window": (100, 0)})]
    for at, option in positions:
        for offset in (at, np.resize([at, keys // 2, 400], 12)):
            options = {**option, "query_offset": offset}
            attncore.attention(1e3 * query, *swapped)
            check(query, key, value, **options)
            out, lse = attncore.attention(query, *swapped, return_lse=True, **options)
            assert (out[0] == 0).all()
            assert (lse[0] == -np.inf).all()


@pytest.mark.parametrize("where", ["hidden", "visible"])
@pytest.mark.parametrize("dtype", [np.float32, dtype_of("bfloat16")])
def test_poison(isa: str, dtype: Any, where: str, rng: Any) -> None:
    """NaN and Inf of one head's values in the middle of a tile, seen by some of its rows or none."""
    query, key, value = make(rng, "nine rows", dtype)
    value[:, 1, 1490:1500, 3] = np.nan
    value[:, 2, 2020, 5] = np.inf
    mask = np.ones((1, query.shape[1], 3, key.shape[2]), bool)
    mask[..., 1400:2100] = False
    if where == "visible":
        mask[:, 4, 1] = mask[:, 7, 2] = True
    check(query, key, value, mask=mask)
    out = attncore.attention(query, tokens_first(key), tokens_first(value), mask=mask)
    assert np.isfinite(out[:, [0, 1, 2, 9, 10, 11]].astype(np.float32)).all()


@pytest.mark.parametrize("page_size", [1, 16, 100])
@pytest.mark.parametrize("dtype", [np.float32, dtype_of("bfloat16"), np.dtype(np.int8)])
def test_pages(isa: str, dtype: Any, page_size: int, rng: Any) -> None:
    """Both layouts of pages, of floats and of quantised numbers."""
    lengths = [4500, 1, 0, 2049]
    pages = sum(-(-length // page_size) for length in lengths) + 3
    shape = (pages, page_size, 6, 64)
    query = rng.standard_normal((4, 12, 1, 64)).astype(np.float32)
    key, value = ((40 * rng.standard_normal(shape)).astype(dtype) for _ in range(2))
    scales: dict[str, Any] = {}
    if dtype == np.int8:
        scales = {f"{x}_scale": rng.random(shape[:3]).astype(np.float32) for x in ("key", "value")}
    elif dtype != np.float32:
        query = query.astype(dtype)
    table = np.resize(rng.permutation(pages), (4, -(-4500 // page_size))).astype(np.int32)

    def heads_first(a: Array) -> Array:
        return np.ascontiguousarray(np.swapaxes(a, 1, 2))

    swapped: dict[str, Any] = {name: heads_first(a) for name, a in scales.items()}
    expected = attncore.attention_paged(
        query, heads_first(key), heads_first(value), table, lengths, page_layout="bhsd", **swapped
    )
    for threads in (1, 2):
        out = attncore.attention_paged(
            query, key, value, table, lengths, num_threads=threads, **scales
        )
        assert_same_bits(out, expected)
