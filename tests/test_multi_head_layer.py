"""MultiHeadAttention against a textbook: shared heads, rotary, norms, all options of attention;
gradients by central differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES
from layer_kit import LAYERS, SELF, B, E, H, K, S, inputs_of, make
from reference import Array, reference
from rule import EPS


def rotated(x: Array, positions: Any, rotary: attncore.Rotary) -> Array:
    """x (batch, head, token, dim)"""
    dims = rotary.dims or x.shape[3]
    pair = np.arange(dims // 2)
    place = np.arange(x.shape[2]) if positions is None else np.asarray(positions)
    angle = np.atleast_2d(place)[:, None, :, None] * rotary.base ** (-2 * pair / dims)
    first, second = (2 * pair, 2 * pair + 1) if rotary.interleaved else (pair, pair + dims // 2)
    result = x.copy()
    result[..., first] = x[..., first] * np.cos(angle) - x[..., second] * np.sin(angle)
    result[..., second] = x[..., second] * np.cos(angle) + x[..., first] * np.sin(angle)
    return result


def textbook(
    name: str,
    layer: attncore.MultiHeadAttention,
    *arrays: Array,
    positions: Any = None,
    key_positions: Any = None,
    **options: Any,
) -> tuple[Array, Array]:
    """y and the weights of the keys, in float64, each step as it is written in papers."""
    given = LAYERS[name]
    p = {n: a.astype(np.float64) for n, a in layer.parameters().items()}
    read = [a.astype(np.float64) for a in arrays]
    x, context, value_context = (read * 3)[:3] if len(read) == 1 else [*read, read[1]][:3]
    if len(read) == 1:
        options.setdefault("query_offset", 0)
        key_positions = positions
    kv_heads = given.get("num_kv_heads", H)
    dim = given.get("head_dim", E // H)
    counts = (H * dim, kv_heads * dim, kv_heads * dim)
    if "in_proj_weight" in p:
        projections = np.split(p["in_proj_weight"], 3)
    else:
        projections = [p[f"{n}_proj_weight"] for n in "qkv"]
    biases = np.split(p.get("in_proj_bias", np.zeros(sum(counts))), np.cumsum(counts)[:2])
    q, k, v = (
        (a @ w.T + b).reshape(*a.shape[:2], -1, dim).swapaxes(1, 2)
        for a, w, b in zip((x, context, value_context), projections, biases, strict=True)
    )
    if epsilon := given.get("qk_norm"):
        epsilon = 1e-6 if epsilon is True else epsilon
        q, k = (
            a / np.sqrt((a**2).mean(-1, keepdims=True) + epsilon) * p[f"{n}_norm.weight"]
            for a, n in ((q, "q"), (k, "k"))
        )
    if rotary := given.get("rotary"):
        rotary = attncore.Rotary() if rotary is True else rotary
        q, k = rotated(q, positions, rotary), rotated(k, key_positions, rotary)
    result = reference(q, k, v, **options)
    out, lse, weights = (a.astype(np.float64) for a in (result.out, result.lse, result.weights))
    if "add_bias_kv" in given:
        extra_k, extra_v = (
            np.stack([p[n].reshape(kv_heads, dim), np.zeros((kv_heads, dim))], 1)
            for n in ("bias_k", "bias_v")
        )
        shape = (len(x), kv_heads, 2, dim)
        kept = {n: o for n, o in options.items() if n in ("scale", "softcap", "query_lengths")}
        extra = reference(
            q, np.broadcast_to(extra_k, shape), np.broadcast_to(extra_v, shape), **kept
        )
        whole = np.logaddexp(lse, extra.lse.astype(np.float64))
        share = np.exp(lse - np.where(np.isinf(whole), 0, whole))[..., None]
        rest = np.exp(extra.lse.astype(np.float64) - np.where(np.isinf(whole), 0, whole))[..., None]
        out, weights = out * share + extra.out.astype(np.float64) * rest, weights * share
    y = out.swapaxes(1, 2).reshape(*x.shape[:2], -1) @ p["out_proj.weight"].T
    return y + p.get("out_proj.bias", 0.0), weights


def all_options(rng: np.random.Generator, queries: int, keys: int) -> dict[str, dict[str, Any]]:
    return {
        "none": {},
        "causal": {"causal": True},
        "window": {"window": (2, 1)},
        "lengths": {"key_lengths": [3, keys], "query_lengths": [queries, 2], "causal": True},
        "mask": {"mask": rng.random((B, 1, queries, keys)) < 0.6},
        "two biases": {
            "bias": (
                rng.standard_normal((H, queries, keys), dtype=np.float32),
                rng.standard_normal((B, 1, 1, keys), dtype=np.float32),
            )
        },
        "alibi, sinks": {
            "alibi": np.linspace(0.1, 1, H, dtype=np.float32),
            "sinks": np.linspace(-1, 1, H, dtype=np.float32),
        },
        "softcap": {"softcap": 1.5, "scale": 0.7},
        "segments": {
            "query_segments": np.arange(B * queries).reshape(B, queries) // 3,
            "key_segments": np.arange(B * keys).reshape(B, keys) // 4,
        },
        "nothing visible": {"mask": np.zeros((queries, keys), bool)},
    }


OPTIONS = list(all_options(np.random.default_rng(0), S, S))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", SELF)
def test_self_attention(name: str, options: str, rng: np.random.Generator) -> None:
    layer, (x,) = make(name), inputs_of(name, rng, 1)
    given = all_options(rng, S, S)[options]
    y, weights = layer(x, need_weights="heads", **given)
    expected, expected_weights = textbook(name, layer, x, **given)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(weights[..., :S], expected_weights, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_cross_attention(name: str, options: str, rng: np.random.Generator) -> None:
    layer, arrays = make(name), inputs_of(name, rng, 3)
    given = all_options(rng, S, K)[options]
    y, weights = layer(*arrays, need_weights="heads", **given)
    expected, expected_weights = textbook(name, layer, *arrays, **given)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(weights[..., :K], expected_weights, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["rotary", "rotary pairs, partial", "norm and rotary"])
def test_positions(name: str, rng: np.random.Generator) -> None:
    layer, (x, context) = make(name), inputs_of(name, rng, 2)
    by_entry, shared = rng.integers(0, 99, (B, S)), rng.integers(0, 99, K, dtype=np.int32)
    calls: list[tuple[tuple[Array, ...], dict[str, Any]]] = [
        ((x,), {"positions": by_entry}),
        ((x,), {"positions": np.arange(S) + 17}),
        ((x, context), {"positions": by_entry, "key_positions": shared}),
        ((x, context), {"key_positions": shared}),
    ]
    for arrays, given in calls:
        y = layer(*arrays, **given)
        expected, _ = textbook(name, layer, *arrays, **given)
        np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["grouped", "norm and rotary", "appended"])
def test_dtypes(name: str, dtype: np.dtype[Any], isa: str, rng: np.random.Generator) -> None:
    """Each of some six steps rounds once."""
    layer, (x,) = make(name, dtype), inputs_of(name, rng, 1, dtype)
    y = layer(x, causal=True)
    assert y.dtype == dtype
    expected, _ = textbook(name, layer, x, causal=True)
    error = np.abs(y.astype(np.float64) - expected).max() / np.abs(expected).max()
    assert error < 8 * EPS[dtype.name]


def differences(
    layer: attncore.MultiHeadAttention,
    inputs: list[Array],
    variables: list[Array],
    gradients: list[Any],
    d_y: Array,
    rng: np.random.Generator,
    **options: Any,
) -> None:
    """Central differences along a random direction of each variable, through it all."""
    for variable, gradient in zip(variables, gradients, strict=True):
        direction, step = rng.standard_normal(variable.shape), 1e-5
        direction /= np.linalg.norm(direction)
        kept, values = variable.copy(), []
        for sign in (1, -1):
            variable[...] = kept + sign * step * direction
            values.append(float((layer(*inputs, **options) * d_y).sum()))
        variable[...] = kept
        numeric = (values[0] - values[1]) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(numeric, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("options", [*OPTIONS, "dropout"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients(name: str, options: str, isa: str, rng: np.random.Generator) -> None:
    layer, inputs = make(name), inputs_of(name, rng, 3)
    inputs = inputs if rng.random() < 0.5 or name not in SELF else inputs[:1]
    dropout = {"dropout": {"dropout_p": 0.4, "seed": 5}}
    given = (all_options(rng, S, inputs[-1].shape[1]) | dropout)[options]
    d_y = rng.standard_normal((B, S, E))
    layer(*inputs, **given)
    gradients = layer.backward(d_y)
    analytic = [gradients] if len(inputs) == 1 else list(gradients)
    analytic += list(layer.gradients.values())
    variables = inputs + list(layer.parameters().values())
    differences(layer, inputs, variables, analytic, d_y, rng, **given)


@pytest.mark.parametrize("name", ["grouped", "appended", "norm and rotary"])
def test_gradients_of_options(name: str, isa: str, rng: np.random.Generator) -> None:
    layer, inputs = make(name), inputs_of(name, rng, 1)
    table = rng.standard_normal((H, 16))
    given: dict[str, Any] = {
        "bias": (rng.standard_normal((H, 1, S)), rng.standard_normal((B, 1, S, S))),
        "alibi": rng.random((B, H)),
        "sinks": rng.standard_normal(H),
        "relative_bias": attncore.RelativeBias(table, max_distance=20),
        "dropout_p": 0.2,
        "seed": 3,
    }
    d_y = rng.standard_normal((B, S, E))
    layer(*inputs, **given)
    assert layer.option_gradients == attncore.Gradients()
    wanted = ["bias", "alibi", "sinks", "relative_bias"]
    assert layer.backward(d_y, wanted=wanted) is None
    d = layer.option_gradients
    assert isinstance(d.bias, tuple)
    variables = [*given["bias"], given["alibi"], given["sinks"], table]
    differences(
        layer, inputs, variables, [*d.bias, d.alibi, d.sinks, d.relative_bias], d_y, rng, **given
    )
    one = rng.standard_normal((S, S))
    layer(*inputs, bias=one)
    layer.backward(d_y, wanted=["bias"])
    differences(layer, inputs, [one], [layer.option_gradients.bias], d_y, rng, bias=one)


def test_the_average_of_many_weights(rng: np.random.Generator) -> None:
    """So many that their mean is taken a block of rows at a time; what is appended is among them."""
    layer = attncore.MultiHeadAttention(8, 4, add_bias_kv=True, seed=0)
    x = rng.standard_normal((2, 500, 8)).astype(np.float32)  # four million weights
    (_, mean), (_, heads) = (layer(x, causal=True, need_weights=n) for n in ("average", "heads"))
    np.testing.assert_allclose(mean, heads.mean(axis=1), rtol=0, atol=1e-7)


def test_gradients_of_gains_sum_over_many_tokens(rng: np.random.Generator) -> None:
    """Also where several tasks add to them."""
    layer = attncore.MultiHeadAttention(8, 4, qk_norm=True, dtype=np.float64, seed=0)
    x, d_y = rng.standard_normal((2, 10, 64, 8))
    layer(x)
    layer.backward(d_y)
    together = {name: gradient.copy() for name, gradient in layer.gradients.items()}
    for entry in range(10):
        layer(x[entry])
        layer.backward(d_y[entry], accumulate=entry > 0)
    for name, gradient in layer.gradients.items():
        np.testing.assert_allclose(gradient, together[name], rtol=1e-11, atol=1e-11, err_msg=name)


def test_what_is_appended_is_dropped_by_itself(rng: np.random.Generator) -> None:
    """Neither with the first key nor instead of it: one head, one key and an appended one."""
    layer = attncore.MultiHeadAttention(4, 1, add_bias_kv=True, seed=0)
    x = rng.standard_normal((1, 4)).astype(np.float32)
    assert len({layer(x, dropout_p=0.5, seed=seed).tobytes() for seed in range(60)}) == 2**2


def test_dropout_of_what_is_appended(rng: np.random.Generator) -> None:
    """Weights of the keys and of what is appended are dropped: the mean over seeds has them all."""
    layer, (x,) = make("appended"), inputs_of("appended", rng, 1)
    exact = layer(x)
    seeds = [layer(x, dropout_p=0.5, seed=seed) for seed in range(2000)]
    deviation = np.std(seeds, axis=0) / np.sqrt(len(seeds))
    assert np.abs((np.mean(seeds, axis=0) - exact) / deviation).max() < 5
    # A query that sees no key has only what is appended, and either or both may be dropped.
    blind: dict[str, Any] = {"mask": np.zeros((S, S), bool), "dropout_p": 0.5}
    found = {layer(x, seed=seed, **blind)[0, 0].tobytes() for seed in range(60)}
    assert 2**2 <= len(found) <= 2 ** (2 * H)
