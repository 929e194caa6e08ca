"""`tree_parents`: new tokens that form a tree see the keys before them, their ancestors and themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits, check, inputs
from kit_backward import assert_same_gradients, check_backward, d_outputs, gradients
from reference import Array, descent, reference
from rule import assert_close_by_rule


def random_tree(rng: np.random.Generator, *shape: int) -> Array:
    """Parents of shape[-1] tokens: now and then a root, else one of the tokens before, mostly a near one."""
    parents = np.empty(shape, np.int64)
    for index in np.ndindex(shape):
        far = int(rng.integers(0, index[-1] + 1)) if rng.random() < 0.3 else 1
        parents[index] = index[-1] - far if far and rng.random() < 0.9 else -1
    return np.minimum(parents, np.arange(shape[-1]) - 1)


def dense(parents: Array, rows: int, keys: int, batch: int = 1) -> Array:
    """The same as a mask (batch, 1, query, key)."""
    return descent(np.broadcast_to(parents, (batch, rows)), np.full(batch, keys - rows), keys)


# queries, keys, heads, kv_heads, dim
SHAPES = {
    "one token": (1, 9, 2, 2, 8),
    "no context": (7, 7, 2, 1, 16),
    "few rows": (7, 1031, 4, 4, 64),
    "few rows of a group": (2, 700, 8, 2, 40),
    "a word of ancestors": (64, 300, 2, 1, 32),
    "more than a word": (65, 200, 2, 2, 24),
    "many": (333, 900, 2, 1, 16),
    "across a split": (30, 2100, 1, 1, 17),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(isa: str, shape: str, dtype: Any, rng: Any) -> None:
    rows, keys, heads, kv_heads, dim = SHAPES[shape]
    made = inputs(rng, rows, keys, heads=heads, kv_heads=kv_heads, dim=dim, batch=2, dtype=dtype)
    parents = random_tree(rng, 2, rows)
    out, lse = check(*made, tree_parents=parents)
    by_mask = attncore.attention(*made, mask=dense(parents, rows, keys, 2), return_lse=True)
    assert_same_bits(out, by_mask[0])
    assert_same_bits(lse, by_mask[1], "lse")


OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "causal from the top left": {"causal": True, "query_offset": 5},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": np.array([0.5, -1, 2, 0], np.float32)},
    "key lengths": {"key_lengths": [60, 21]},
    "query lengths": {"query_lengths": [21, 4], "key_lengths": [90, 4]},
    "no query": {"query_lengths": [0, 21], "key_lengths": [0, 90]},
    "mask": {"mask": np.random.default_rng(1).random((2, 1, 21, 90)) < 0.7},
    "bias": {"bias": np.random.default_rng(2).standard_normal((4, 1, 90)).astype(np.float32)},
    "bias that hides": {"bias": np.where(np.arange(90) % 3 == 0, -np.inf, 1).astype(np.float32)},
    "segments": {
        "query_segments": np.arange(42).reshape(2, 21) // 15,
        "key_segments": np.arange(180).reshape(2, 90) // 50,
    },
    "scale": {"scale": -0.3},
    "dropout": {"dropout_p": 0.3, "seed": 5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_with_other_options(isa: str, name: str, rng: Any) -> None:
    """Forward, gradients and probabilities."""
    made = inputs(rng, 21, 90, heads=4, kv_heads=2, dim=16, batch=2)
    options = {**OPTIONS[name], "tree_parents": random_tree(rng, 2, 21)}
    check(*made, **options)
    d_out, d_lse = d_outputs(rng, made[0], made[2])
    check_backward(d_out, made, d_lse=d_lse, **options)
    if "dropout_p" in options:
        return
    weights = attncore.attention_weights(*made[:2], **options)
    exact = reference(*made, **options).weights
    assert_close_by_rule(weights, exact, exact, 1.0, "weights")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["no context", "more than a word", "many"])
def test_gradients(isa: str, shape: str, dtype: Any, rng: Any) -> None:
    rows, keys, heads, kv_heads, dim = SHAPES[shape]
    made = inputs(rng, rows, keys, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
    parents = random_tree(rng, 1, rows)
    bias = rng.standard_normal((1, 1, rows, keys)).astype(np.float32)
    d_out, _ = d_outputs(rng, made[0], made[2])
    ours = check_backward(d_out, made, tree_parents=parents, bias=bias)
    assert (ours["bias 0"][0, 0][~dense(parents, rows, keys)[0, 0]] == 0).all()
    by_mask = gradients(d_out, made, mask=dense(parents, rows, keys), bias=bias)
    assert_same_gradients(ours, by_mask, "of the mask")


@pytest.mark.parametrize("rows", [1, 5, 33, 70, 200])
def test_a_chain_is_causal(isa: str, rows: int, rng: Any) -> None:
    made = inputs(rng, rows, 400, heads=2, dim=32)
    out = attncore.attention(*made, tree_parents=np.arange(rows) - 1)
    assert_same_bits(out, attncore.attention(*made, causal=True))
    assert_same_bits(out, attncore.attention(*made, causal=True, tree_parents=np.arange(rows) - 1))


def test_a_path_is_a_sequence_of_its_own(isa: str, rng: Any) -> None:
    """A token's row is attention over the context and the tokens from its root to it."""
    rows, keys = 12, 40
    q, k, v = inputs(rng, rows, keys, heads=2, dim=16)
    parents = random_tree(rng, rows)
    out = attncore.attention(q, k, v, tree_parents=parents)
    for row in range(rows):
        path, at = [], row
        while at >= 0:
            path.append(keys - rows + at)
            at = int(parents[at])
        seen = [*range(keys - rows), *reversed(path)]
        alone = reference(q[:, :, row : row + 1], k[:, :, seen], v[:, :, seen])
        assert_close_by_rule(
            out[:, :, row : row + 1], alone.out, alone.out, alone.magnitude, "a path"
        )


@pytest.mark.parametrize("rows", [1, 6, 40])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_poison_in_other_branches(isa: str, rows: int, poison: float, rng: Any) -> None:
    q, k, v = inputs(rng, rows, 300, heads=2, dim=16)
    parents = random_tree(rng, rows)
    clean, clean_lse = attncore.attention(q, k, v, tree_parents=parents, return_lse=True)
    sees = dense(parents, rows, 300)[0, 0]
    for row in range(rows):
        dirty_k, dirty_v = k.copy(), v.copy()
        dirty_k[:, :, ~sees[row]] = dirty_v[:, :, ~sees[row]] = poison
        out, lse = attncore.attention(q, dirty_k, dirty_v, tree_parents=parents, return_lse=True)
        assert_same_bits(out[:, :, row], clean[:, :, row], f"row {row}")
        assert_same_bits(lse[:, :, row], clean_lse[:, :, row], f"lse of row {row}")


def test_parents_of_queries_that_do_not_exist_are_not_read(isa: str, rng: Any) -> None:
    made = inputs(rng, 9, 30, batch=2)
    parents = np.broadcast_to(np.arange(9) - 1, (2, 9)).copy()
    parents[1, 4:] = 77
    out = attncore.attention(
        *made, tree_parents=parents, query_lengths=[9, 4], key_lengths=[30, 11]
    )
    expected = attncore.attention(*made, causal=True, query_lengths=[9, 4], key_lengths=[30, 11])
    assert_same_bits(out, expected)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, ">i4"])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_forms_of_parents(isa: str, dtype: Any, layout: Any, rng: Any) -> None:
    """One line for the batch, strides, lists, fewer axes."""
    made = inputs(rng, 20, 50, batch=3, heads=2)
    parents = random_tree(rng, 20)
    expected = attncore.attention(*made, tree_parents=np.broadcast_to(parents, (3, 20)))
    arrays: Any = [a.swapaxes(1, 2).copy() if layout == "bshd" else a for a in made]
    strided = np.repeat(parents.astype(dtype), 3)[::3]
    for given in (strided, parents.tolist(), strided[None], parents.astype(dtype)[::-1][::-1]):
        out = attncore.attention(*arrays, tree_parents=given, layout=layout)
        assert_same_bits(out.swapaxes(1, 2) if layout == "bshd" else out, expected)
    flat: Any = [a[1, 0] for a in made]
    assert_same_bits(attncore.attention(*flat, tree_parents=parents), expected[1, 0])


def test_threads(isa: str, rng: Any) -> None:
    made = inputs(rng, 150, 1500, heads=4, kv_heads=2, dim=32, batch=2)
    parents = random_tree(rng, 2, 150)
    first = attncore.attention(*made, tree_parents=parents, num_threads=1)
    for threads in (2, 5):
        again = attncore.attention(*made, tree_parents=parents, num_threads=threads)
        assert_same_bits(again, first)


def test_weights_of_chosen_rows(isa: str, rng: Any) -> None:
    q, k, v = inputs(rng, 70, 200, heads=4, kv_heads=2)
    parents = random_tree(rng, 70)
    weights = reference(q, k, v, tree_parents=parents).weights
    rows = [69, 3, 3, -20]
    got = attncore.attention_weights(q, k, rows=rows, tree_parents=parents)
    assert_close_by_rule(got, weights[:, :, rows], weights[:, :, rows], 1.0, "weights")
    assert (got[~np.broadcast_to(dense(parents, 70, 200)[:, :, rows], got.shape)] == 0).all()
    indices, _ = attncore.attention_weights(q, k, rows=rows, top_k=3, tree_parents=parents)
    np.testing.assert_array_equal(indices, np.argsort(-weights[:, :, rows])[..., :3])


def test_explain_counts_what_can_be_seen(rng: Any) -> None:
    q, k, v = inputs(rng, 4, 600)
    plan = attncore.explain(q, k, v, tree_parents=[-1, 0, 0, 1])
    assert plan.flops <= attncore.explain(q, k, v).flops


def test_in_a_layer(rng: Any) -> None:
    layer = attncore.MultiHeadAttention(32, 4, seed=0)
    x = rng.standard_normal((2, 11, 32)).astype(np.float32)
    parents = random_tree(rng, 2, 11)
    y = layer(x, mask=dense(parents, 11, 11, 2))
    d_x = layer.backward(np.ones_like(y))
    assert_same_bits(layer(x, tree_parents=parents), y)
    assert_same_bits(layer.backward(np.ones_like(y)), d_x, "d_x")


Q, KEY, VALUE = (np.zeros((2, 2, n, 8), np.float32) for n in (5, 9, 9))
# name: (options, exception, message)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "itself": (
        {"tree_parents": [-1, 1, 0, 0, 0]},
        ValueError,
        "tree_parents.*query 1 is 1.*-1 … 0",
    ),
    "a later one": (
        {"tree_parents": [-1, 0, 4, 0, 0]},
        ValueError,
        "tree_parents.*query 2 is 4.*1",
    ),
    "less than -1": ({"tree_parents": [-2, 0, 0, 0, 0]}, ValueError, "tree_parents.*query 0 is -2"),
    "floats": ({"tree_parents": np.zeros(5)}, TypeError, "tree_parents.*float64.*integer"),
    "bools": ({"tree_parents": np.zeros(5, bool)}, TypeError, "tree_parents.*bool.*integer"),
    "too few": ({"tree_parents": [-1, 0]}, ValueError, r"tree_parents.*2.*\(2, 5\)"),
    "another batch": ({"tree_parents": -np.ones((3, 5), int)}, ValueError, "tree_parents.*3.*2"),
    "three axes": ({"tree_parents": -np.ones((1, 2, 5), int)}, ValueError, "tree_parents.*3.*2"),
    "a scalar": ({"tree_parents": -1}, ValueError, "tree_parents.*scalar"),
    "a string": ({"tree_parents": "tree"}, TypeError, "tree_parents"),
    "fewer keys than queries": (
        {"tree_parents": [-1] * 5, "key_lengths": [9, 4]},
        ValueError,
        "tree_parents.*entry 1.*4 keys.*5",
    ),
    "a window": ({"tree_parents": [-1] * 5, "window": (3, 0)}, ValueError, "tree_parents.*window"),
    "an open window": (
        {"tree_parents": [-1] * 5, "window": (None, 3)},
        ValueError,
        "tree_parents.*window",
    ),
    "alibi": ({"tree_parents": [-1] * 5, "alibi": [1.0, 2.0]}, ValueError, "tree_parents.*alibi"),
    "relative bias": (
        {
            "tree_parents": [-1] * 5,
            "relative_bias": attncore.RelativeBias(np.zeros((2, 32), np.float32)),
        },
        ValueError,
        "tree_parents.*relative_bias",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_parents(name: str) -> None:
    options, exception, message = BAD[name]
    out = np.full_like(Q, 7)
    with pytest.raises(exception, match=message):
        attncore.attention(Q, KEY, VALUE, out=out, **options)
    assert (out == 7).all()
    with pytest.raises(exception, match=message):
        attncore.attention_weights(Q, KEY, **options)
    with pytest.raises(exception, match=message):
        attncore.attention_backward(
            out, Q, KEY, VALUE, out, np.zeros((2, 2, 5), np.float32), **options
        )


@pytest.mark.parametrize("queries", [2, 5, 40])
@pytest.mark.parametrize("before", [7, 63, 127, 255, 511])
def test_a_tile_ends_with_the_first_new_token(
    isa: str, before: int, queries: int, rng: np.random.Generator
) -> None:
    made = inputs(rng, queries, before + queries)
    mask = np.concatenate([np.ones((queries, before), bool), np.eye(queries, dtype=bool)], 1)
    found = attncore.attention(*made, tree_parents=np.full(queries, -1))
    np.testing.assert_allclose(found, attncore.attention(*made, mask=mask), rtol=0, atol=1e-6)
