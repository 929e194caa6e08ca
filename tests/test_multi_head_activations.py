"""Activations: a layer that is called several times, or by several threads, before it is trained."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import numpy as np
import pytest

import attncore
from kit import assert_same_bits
from layer_kit import LAYERS, B, E, S, inputs_of, make
from reference import Array
from threads_kit import at_once


def copied(layer: attncore.MultiHeadAttention) -> dict[str, Array]:
    return {name: gradient.copy() for name, gradient in layer.gradients.items()}


@pytest.mark.parametrize("name", LAYERS)
def test_calls_that_interleave_have_the_bits_of_calls_in_turn(
    name: str, rng: np.random.Generator
) -> None:
    """Each with options of its own; the layer's own last call is a third one."""
    layer = make(name, np.float32)
    calls = [inputs_of(name, rng, 3, np.float32) for _ in range(3)]
    bias = rng.standard_normal((S, calls[0][1].shape[1]), dtype=np.float32)
    options: list[dict[str, Any]] = [{}, {"bias": bias}, {"dropout_p": 0.4, "seed": 3}]
    d_ys = [rng.standard_normal(arrays[0].shape, dtype=np.float32) for arrays in calls]
    expected = []
    for arrays, some, d_y in zip(calls, options, d_ys, strict=True):
        y = layer(*arrays, **some)
        wanted = ("x", "context", "value_context", *({"bias"} & set(some)))
        d = layer.backward(d_y, wanted=wanted)
        expected.append((y, d, layer.option_gradients.bias, copied(layer)))

    kept = [attncore.Activations(), attncore.Activations(), None]
    for arrays, some, own, (y, *_) in zip(calls, options, kept, expected, strict=True):
        assert_same_bits(layer(*arrays, activations=own, **some), y)
    for i in (1, 2, 0, 1):
        wanted = ("x", "context", "value_context", *({"bias"} & set(options[i])))
        d = layer.backward(d_ys[i], wanted=wanted, activations=kept[i])
        for ours, want in zip(d, expected[i][1], strict=True):
            assert_same_bits(ours, want)
        for parameter, gradient in layer.gradients.items():
            assert_same_bits(gradient, expected[i][3][parameter], parameter)
        of_bias = expected[i][2]
        if isinstance(of_bias, np.ndarray):
            assert_same_bits(np.asarray(layer.option_gradients.bias), of_bias)
        else:
            assert layer.option_gradients.bias is None


def test_shared_weights_get_the_sum(rng: np.random.Generator) -> None:
    """One layer on two inputs: the gradient of both as one batch."""
    layer = make("plain", np.float64)
    both, d_y = rng.standard_normal((2, 2, S, E))
    layer(both)
    d_both = layer.backward(d_y)
    expected = copied(layer)
    kept = [attncore.Activations() for _ in range(2)]
    for own, x in zip(kept, both, strict=True):
        layer(x, activations=own)
    for i, own in enumerate(kept):
        d_x = layer.backward(d_y[i], activations=own, accumulate=i > 0)
        assert_same_bits(d_x, d_both[i])
    for name, gradient in layer.gradients.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-12, atol=1e-12)


def test_kept_whatever_training_is(rng: np.random.Generator) -> None:
    layer, x = make("plain", np.float32).eval(), rng.standard_normal((B, S, E), dtype=np.float32)
    own = attncore.Activations()
    assert own.nbytes == 0
    with pytest.raises(ValueError, match="backward: there is no call"):
        layer.backward(x, activations=own)
    y = layer(x, activations=own)
    assert own.nbytes >= 4 * x.nbytes  # queries, keys, values, outputs
    d_x = layer.backward(y, activations=own)
    layer.train()(x)
    assert_same_bits(layer.backward(y), d_x)
    with pytest.raises(ValueError, match="mask"):
        layer(x, mask=np.ones((S, S + 1), bool), activations=own)
    with pytest.raises(ValueError, match="backward: there is no call"):
        layer.backward(x, activations=own)
    assert_same_bits(layer.backward(y), d_x)


def test_of_another_layer(rng: np.random.Generator) -> None:
    layer, other = make("plain", np.float32), make("plain", np.float32)
    own = attncore.Activations()
    y = layer(rng.standard_normal((B, S, E), dtype=np.float32), activations=own)
    with pytest.raises(ValueError, match="activations"):
        other.backward(y, activations=own)
    for _ in range(20):  # the next one often gets the memory of the last
        del layer
        layer = make("plain", np.float32)
        with pytest.raises(ValueError, match="activations: are those of another layer"):
            layer.backward(y, activations=own)


@pytest.mark.parametrize("given", [1, {}, attncore.MultiHeadAttention(8, 2)])
def test_something_else(given: Any) -> None:
    layer, x = make("plain", np.float32), np.ones((B, S, E), np.float32)
    with pytest.raises(TypeError, match=r"activations: is \w+, must be Activations"):
        layer(x, activations=given)
    with pytest.raises(TypeError, match=r"activations: is \w+, must be Activations"):
        layer.backward(x, activations=given)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_no_copies(duplicate: Any) -> None:
    with pytest.raises(TypeError, match="neither copied nor pickled"):
        duplicate(attncore.Activations())


def test_threads_with_activations_of_their_own(rng: np.random.Generator) -> None:
    """One at a time goes back; what each gets is its own call's."""
    layer = make("norm and rotary", np.float32)
    xs = rng.standard_normal((4, B, 60, E), dtype=np.float32)
    expected = []
    for x in xs:
        layer(x)
        expected.append(layer.backward(x))
    going_back = threading.Lock()
    failures: list[int] = []

    def train(i: int) -> None:
        own = attncore.Activations()
        for _ in range(20):
            layer(xs[i], activations=own, num_threads=1)
            with going_back:
                d_x = layer.backward(xs[i], activations=own, num_threads=1)
            if not np.array_equal(d_x, expected[i]):
                failures.append(i)

    at_once(len(xs), train)
    assert not failures


def test_two_threads_in_backward(rng: np.random.Generator) -> None:
    """The second one is told so at once, and adds nothing."""
    layer = attncore.MultiHeadAttention(256, 4, seed=0)
    x = rng.standard_normal((2, 256, 256), dtype=np.float32)
    kept = [attncore.Activations() for _ in range(2)]
    for own in kept:
        layer(x, activations=own)
    layer.backward(x, activations=kept[0])
    once = copied(layer)
    done, refused = [0, 0], [0, 0]

    def go_back(i: int) -> None:
        while done[i] < 10 or (not any(refused) and done[i] < 10_000):
            try:
                layer.backward(x, activations=kept[i], num_threads=1)
                done[i] += 1
            except RuntimeError as error:
                if "another backward" not in str(error):
                    raise
                refused[i] += 1

    at_once(2, go_back)
    assert any(refused)
    layer.backward(x, activations=kept[1])
    for name, gradient in layer.gradients.items():
        assert_same_bits(gradient, once[name], name)


def test_names_stand_for_arrays_that_are_changed_in_place() -> None:
    layer = make("plain", np.float32)
    for mapping in (layer.parameters(), layer.gradients):
        with pytest.raises(TypeError, match="does not support item assignment"):
            mapping["out_proj.bias"] = np.ones(E)  # type: ignore[index]
        mapping["out_proj.bias"][...] = 2
    assert (layer.parameters()["out_proj.bias"] == 2).all()
