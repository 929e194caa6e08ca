"""Corners of gradients that a review found: shared inputs, empty axes, rows that see nothing, calls inside calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import inputs, run_child
from kit_backward import d_outputs, gradients
from reference_backward import plain_backward, reference_backward
from rule import EPS


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("special", [{}, {"rotary": True}, {"qk_norm": True}], ids=str)
def test_self_attention_adds_all_three_projections(
    isa: str, kv_heads: int, special: dict[str, Any], rng: Any
) -> None:
    """d_x is that of x as queries and as context, whatever projections run as one product."""
    layer = attncore.MultiHeadAttention(
        16, 4, num_kv_heads=kv_heads, dtype=np.float64, seed=0, **special
    )
    x, d_y = rng.standard_normal((2, 2, 5, 16))
    layer(x)
    d_x = layer.backward(d_y)
    gradients = {name: gradient.copy() for name, gradient in layer.gradients.items()}
    layer(x, x.copy())
    apart = layer.backward(d_y)
    np.testing.assert_allclose(d_x, apart.x + apart.context, rtol=0, atol=1e-13)
    for name, gradient in layer.gradients.items():
        np.testing.assert_allclose(gradients[name], gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "shape"),
    [
        (2, 0, 5, (2, 1, 1, 5)),
        (1, 0, 5, (5,)),
        (2, 3, 0, (2, 1, 3, 1)),
        (0, 3, 4, (3, 4)),
        (0, 3, 4, (1, 1, 3, 4)),
        (2, 0, 0, (2, 1, 1, 1)),
    ],
)
def test_sums_over_empty_axes_are_zero(
    batch: int, queries: int, keys: int, shape: tuple[int, ...], rng: Any
) -> None:
    q, k, v = inputs(rng, queries, keys, batch=batch)
    bias = np.zeros(shape, np.float32)
    out, lse = attncore.attention(q, k, v, bias=bias, return_lse=True)
    into = attncore.Gradients(bias=np.full(shape, 7, np.float32))
    made = attncore.attention_backward(
        out, q, k, v, out, lse, bias=bias, wanted=["bias"], into=into
    )
    assert isinstance(made.bias, np.ndarray)
    assert (made.bias == 0).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_sink_of_a_row_that_sees_nothing(isa: str, poison: float, rng: Any) -> None:
    """Its d_out does not matter, even to the sink."""
    q, k, v = inputs(rng, 3, 4)
    sinks = rng.standard_normal(2).astype(np.float32)
    mask = np.ones((3, 4), bool)
    mask[1] = False
    out, lse = attncore.attention(q, k, v, mask=mask, sinks=sinks, return_lse=True)
    d_out = rng.standard_normal(out.shape).astype(np.float32)
    d_out[:, :, 1] = 0
    clean = attncore.attention_backward(d_out, q, k, v, out, lse, mask=mask, sinks=sinks)
    d_out[:, :, 1] = poison
    dirty = attncore.attention_backward(d_out, q, k, v, out, lse, mask=mask, sinks=sinks)
    for one, other in zip(clean, dirty, strict=True):
        if isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, other)


def test_layer_called_during_its_own_backward() -> None:
    """From a signal's handler: the activations that backward reads stay.

    A handler that ran before backward began has left it another call to go back through: that is
    refused (a ValueError), and tried again.
    """
    run_child("""
        import signal
        import numpy as np
        import attncore
        layer = attncore.MultiHeadAttention(64, 4, seed=0)
        x = np.ones((1, 3000, 64), np.float32)
        calls = []
        def handler(*_):
            calls.append(layer(np.ones((1, 4500, 64), np.float32)))
        signal.signal(signal.SIGALRM, handler)
        y = layer(x)
        expected = layer.backward(y)

        def disturbed(delay):
            layer(x)
            before = len(calls)
            signal.setitimer(signal.ITIMER_REAL, delay)
            try:
                got = layer.backward(y)
            except ValueError:
                return False
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert (got == expected).all()
            return len(calls) > before

        left = 3
        for delay in (0.002, 0.01, 0.03) * 20:
            left -= disturbed(delay)
            if not left:
                break
        assert not left
    """)


@pytest.mark.parametrize(
    ("rows", "kv_heads", "keys"), [(1, 4, 300), (1, 1, 300), (3, 4, 40), (4, 4, 17), (2, 2, 90)]
)
@pytest.mark.parametrize("dim", [128, 41])
def test_few_rows_of_concentrated_weights(
    isa: str, rows: int, kv_heads: int, keys: int, dim: int, rng: Any
) -> None:
    """Where keys lie, scores must have the roundings that lse has: another order of their sums would be an error of whole
    rows, four times that of a plain evaluation.  Norms, since single items are near 0 by luck."""
    arrays = inputs(rng, rows, keys, heads=4, kv_heads=kv_heads, dim=dim)
    d_out, _ = d_outputs(rng, arrays[0], arrays[2])
    ours = gradients(d_out, arrays, scale=1.0)
    exact = reference_backward(d_out, *arrays, scale=1.0)
    plainly = plain_backward(d_out, *arrays, scale=1.0)
    for name, one in ours.items():
        wanted = exact[name].value
        error, floor = (np.linalg.norm(x - wanted) for x in (one, plainly[name].value))
        assert error <= 2 * floor + 8 * EPS["float32"] * np.linalg.norm(wanted), name
