"""MultiHeadAttention as an object: bits, strides, threads, what it keeps between calls, memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits, run_child
from layer_kit import LAYERS, SELF, B, E, H, K, S, inputs_of, make
from reference import Array
from threads_kit import at_once


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["norm and rotary", "appended"])
def test_bits_are_the_same_on_any_number_of_threads(
    name: str, dtype: np.dtype[Any], isa: str, rng: np.random.Generator
) -> None:
    layer = make(name, dtype)
    x, d_y = rng.standard_normal((2, 3, 150, E), dtype=np.float32).astype(dtype)
    results = []
    for threads in (1, 2, 5):
        y = layer(x, causal=True, num_threads=threads)
        results.append({"y": y, "d_x": layer.backward(d_y)} | layer.state_dict())
        results[-1] |= {name: gradient.copy() for name, gradient in layer.gradients.items()}
    for other in results[1:]:
        for what, array in results[0].items():
            assert_same_bits(other[what], array, what)


@pytest.mark.parametrize("name", SELF)
def test_bits_do_not_depend_on_the_batch(name: str, rng: np.random.Generator) -> None:
    layer = make(name, np.float32)
    x, d_y = rng.standard_normal((2, 3, 70, E), dtype=np.float32)
    y, d_x = layer(x), layer.backward(d_y)
    assert_same_bits(layer(x[1:2]), y[1:2], "y")
    assert_same_bits(layer.backward(d_y[1:2]), d_x[1:2], "d_x")
    assert_same_bits(layer(x[2]), y[2], "y without a batch axis")
    assert_same_bits(layer.backward(d_y[2]), d_x[2], "d_x without a batch axis")


def test_any_strides(rng: np.random.Generator) -> None:
    layer = make("grouped", np.float32)
    x, d_y = rng.standard_normal((2, B, S, E), dtype=np.float32)
    context = rng.standard_normal((1, K, E), dtype=np.float32)
    y = layer(x, np.repeat(context, B, 0))
    expected = layer.backward(d_y)
    strange = np.asfortranarray(x[:, ::-1])[:, ::-1]
    assert_same_bits(layer(strange, np.broadcast_to(context, (B, K, E))), y)
    found = layer.backward(np.asfortranarray(d_y))
    assert_same_bits(found.x, expected.x, "d_x")
    assert_same_bits(found.context, expected.context, "d_context")


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_to_do(name: str) -> None:
    """No batch entries, no queries, no keys: results of that shape, gradients of zero."""
    widths = (E, LAYERS[name].get("key_dim", E), LAYERS[name].get("value_dim", E))
    for batch, queries, keys in [(0, S, K), (B, 0, K), (B, S, 0), (0, 0, 0)]:
        layer = make(name)
        tokens = (queries, keys, keys)
        arrays = [np.ones((batch, t, w)) for t, w in zip(tokens, widths, strict=True)]
        y, weights = layer(*arrays, need_weights="heads")
        assert y.shape == arrays[0].shape
        appended = 2 if name == "appended" else 0
        assert weights.shape == (batch, H, queries, keys + appended)
        d = layer.backward(np.ones_like(y))
        assert [g.shape for g in d] == [a.shape for a in arrays]
        if keys == 0 and queries > 0 and batch > 0 and not appended:
            bias = layer.parameters().get("out_proj.bias", 0.0)
            np.testing.assert_array_equal(y, np.zeros(y.shape) + bias)
        gradients = [g for n, g in layer.gradients.items() if n != "out_proj.bias"]
        if queries * batch == 0:
            assert not any(g.any() for g in gradients)


def test_accumulate(rng: np.random.Generator) -> None:
    layer, (x,) = make("other widths"), inputs_of("grouped", rng, 1)
    contexts = inputs_of("other widths", rng, 3)[1:]
    d_y = rng.standard_normal(x.shape)
    layer(x, *contexts)
    layer.backward(d_y)
    once = {name: gradient.copy() for name, gradient in layer.gradients.items()}
    layer.backward(2 * d_y, accumulate=True)
    for name, gradient in layer.gradients.items():
        np.testing.assert_allclose(gradient, 3 * once[name], rtol=1e-13, atol=1e-13, err_msg=name)
    layer.backward(d_y)
    for name, gradient in layer.gradients.items():
        assert_same_bits(gradient, once[name], name)


def test_accumulate_is_all_or_nothing() -> None:
    """Whenever a signal ends the call: no gradient has been added, or every one."""
    run_child("""
        import signal
        import numpy as np
        import attncore
        layer = attncore.MultiHeadAttention(2048, 4, seed=0)
        x = np.ones((1, 8, 2048), np.float32)
        def handler(*_):
            raise TimeoutError
        signal.signal(signal.SIGALRM, handler)
        y = layer(x)
        layer.backward(y)
        now = {name: g.copy() for name, g in layer.gradients.items()}
        once = {name: g.copy() for name, g in now.items()}
        for i in range(12):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.006 * (i + 1))
                layer.backward(y, accumulate=True)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except TimeoutError:
                pass
            added = {(g == now[name]).all() for name, g in layer.gradients.items()}
            assert len(added) == 1, i
            if added == {False}:
                for name, g in layer.gradients.items():
                    np.testing.assert_allclose(g, now[name] + once[name], rtol=1e-5, atol=1e-5)
                    now[name] = g.copy()
    """)


def test_wanted(rng: np.random.Generator) -> None:
    layer, arrays = make("other widths"), inputs_of("other widths", rng, 3)
    d_y = rng.standard_normal(arrays[0].shape)
    layer(*arrays)
    every = layer.backward(d_y)
    for name in ("x", "context", "value_context"):
        one = layer.backward(d_y, wanted=[name])
        for other in one._fields:
            if other == name:
                assert_same_bits(getattr(one, name), getattr(every, name), name)
            else:
                assert getattr(one, other) is None


def test_parameters_are_views_that_keep_the_layer_alive() -> None:
    layer = make("plain", np.float32)
    parameters, gradients = layer.parameters(), layer.gradients
    assert list(parameters) == [
        "in_proj_weight",
        "in_proj_bias",
        "out_proj.weight",
        "out_proj.bias",
    ]
    for name, parameter in parameters.items():
        assert gradients[name].shape == parameter.shape
        assert parameter.flags.writeable
        assert parameter.ctypes.data % 64 == 0
    parameters["out_proj.weight"][...] = 0
    parameters["out_proj.bias"][...] = 7
    np.testing.assert_array_equal(
        layer(np.ones((S, E), np.float32)), np.full((S, E), 7, np.float32)
    )
    del layer
    assert parameters["out_proj.bias"][0] == 7


def test_kept_for_backward(rng: np.random.Generator) -> None:
    """backward goes through the last call that was kept, again and again, never through another."""
    layer, (x,) = make("plain", np.float32), inputs_of("plain", rng, 1, np.float32)
    with pytest.raises(ValueError, match="backward: there is no call"):
        layer.backward(x)
    layer(x)
    first = layer.backward(x)
    assert_same_bits(layer.backward(x), first)
    with pytest.raises(ValueError, match="mask"):
        layer(x, mask=np.ones((S, S + 1), bool))
    with pytest.raises(ValueError, match="backward: there is no call"):
        layer.backward(x)
    layer(x)
    assert layer.eval() is layer
    with pytest.raises(ValueError, match="backward: there is no call"):
        layer.backward(x)
    layer(x)
    with pytest.raises(ValueError, match="backward: there is no call"):
        layer.backward(x)
    layer.train()(x)
    assert_same_bits(layer.backward(x), first)


def test_many_callers(rng: np.random.Generator) -> None:
    layer = make("norm and rotary", np.float32).eval()
    xs = rng.standard_normal((4, B, 40, E), dtype=np.float32)
    expected = [layer(x) for x in xs]
    found: list[Array | None] = [None] * len(xs)

    def call(i: int) -> None:
        for _ in range(5):
            found[i] = layer(xs[i])

    at_once(len(xs), call)
    for ours, want in zip(found, expected, strict=True):
        assert ours is not None
        assert_same_bits(ours, want)


def test_seed() -> None:
    first, same, other = (attncore.MultiHeadAttention(E, H, seed=seed) for seed in (1, 1, 2))
    assert_same_bits(first.state_dict()["in_proj_weight"], same.state_dict()["in_proj_weight"])
    assert (
        first.state_dict()["in_proj_weight"] != other.state_dict()["in_proj_weight"]
    ).mean() > 0.99
    drawn = [attncore.MultiHeadAttention(E, H).state_dict()["in_proj_weight"] for _ in range(2)]
    assert (drawn[0] != drawn[1]).mean() > 0.99


def test_memory_is_linear_in_tokens() -> None:
    """The scores of this call would take 512 MB."""
    peak = run_child("""
        import resource
        import numpy as np, attncore
        layer = attncore.MultiHeadAttention(64, 2, seed=0)
        x = np.ones((1, 8192, 64), np.float32)
        layer.backward(layer(x[:, :64]))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        layer.backward(layer(x, causal=True))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """)
    assert int(peak) < 100_000
