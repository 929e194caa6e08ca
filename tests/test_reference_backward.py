"""The reference's gradients: against central differences of the reference, and against torch's autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from kit import inputs
from reference import Array, accumulation, as_tuple, reference
from reference_backward import plain_backward, reference_backward
from rule import assert_close_by_rule

B, H, HK, ROWS, KEYS = 2, 4, 2, 5, 7


class Table(NamedTuple):
    """A relative bias, as far as the reference looks."""

    table: Array
    bidirectional: bool = True
    max_distance: int = 6


def normal(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape)


MASK = np.random.default_rng(7).random((ROWS, KEYS)) < 0.7
MASK[3] = False
HIDING = np.where(np.random.default_rng(8).random((H, ROWS, KEYS)) < 0.8, 0.3, -np.inf)
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "causal": {"causal": True},
    "window and offset": {"window": (2, 1), "query_offset": np.array([1, 4])},
    "mask": {"mask": MASK},
    "a bias": {"bias": normal(H, ROWS, KEYS)},
    "hiding bias": {"bias": HIDING},
    "biases": {"bias": (normal(KEYS), normal(B, 1, 1, KEYS), normal(H, 1, 1), normal(1))},
    "alibi": {"alibi": normal(H)},
    "alibi of each entry": {"alibi": normal(B, H), "causal": True},
    "softcap": {"softcap": 0.8, "scale": 1.3},
    "sinks": {"sinks": normal(H), "mask": MASK},
    "lengths": {"query_lengths": np.array([3, 5]), "key_lengths": np.array([7, 4])},
    "segments": {
        "query_segments": np.array([[0, 0, 1, 1, 2], [0, 1, 1, 1, 1]]),
        "key_segments": np.array([[0, 0, 1, 1, 1, 1, 3], [0, 0, 0, 0, 1, 1, 2]]),
    },
    "relative bias": {"relative_bias": Table(normal(H, 8))},
    "relative bias of the past": {"relative_bias": Table(normal(H, 4), False), "causal": True},
    "dropout": {"dropout_p": 0.4, "seed": 2**40 + 3},
    "everything": {
        "causal": True,
        "softcap": 2.0,
        "scale": 0.6,
        "mask": MASK,
        "bias": (normal(H, 1, KEYS), HIDING),
        "alibi": normal(H),
        "relative_bias": Table(normal(H, 8)),
        "sinks": normal(H),
        "key_lengths": np.array([6, 7]),
        "query_offset": 2,
        "dropout_p": 0.25,
        "seed": 9,
    },
}


def leaves(arrays: dict[str, Array], options: dict[str, Any]) -> dict[str, Array]:
    """What has a gradient, by the reference's names."""
    found = dict(arrays)
    found |= {f"bias {i}": one for i, one in enumerate(as_tuple(options.get("bias")))}
    found |= {name: options[name] for name in ("alibi", "sinks") if name in options}
    if "relative_bias" in options:
        found["relative_bias"] = options["relative_bias"].table
    return found


def moved(options: dict[str, Any], name: str, by: Array) -> dict[str, Any]:
    """The options with one leaf moved."""
    if name == "relative_bias":
        table = options[name].table + by
        return {**options, name: options[name]._replace(table=table)}
    if name.startswith("bias"):
        biases = list(as_tuple(options["bias"]))
        biases[int(name.split()[1])] = biases[int(name.split()[1])] + by
        return {**options, "bias": tuple(biases)}
    return {**options, name: options[name] + by}


def finite(lse: Array) -> Array:
    return np.where(np.isfinite(lse), lse, 0)


@pytest.mark.parametrize("name", OPTIONS)
def test_central_differences(name: str, rng: np.random.Generator) -> None:
    """Each element of each leaf, where there are few; else of a random choice."""
    options = OPTIONS[name]
    made = inputs(rng, ROWS, KEYS, batch=B, heads=H, kv_heads=HK, dim=3, value_dim=2, dtype=float)
    arrays = dict(zip(("query", "key", "value"), made, strict=True))
    d_out, d_lse = normal(B, H, ROWS, 2), normal(B, H, ROWS)
    ours = reference_backward(d_out, **arrays, d_lse=d_lse, **options)
    assert ours.keys() == leaves(arrays, options).keys()

    def loss(changed: str, by: Array) -> Any:
        its = arrays
        given = options
        if changed in arrays:
            its = {**arrays, changed: arrays[changed].astype(np.longdouble) + by}
        else:
            given = moved(options, changed, by)
        result = reference(**{k: np.asarray(a, np.longdouble) for k, a in its.items()}, **given)
        return (result.out * d_out).sum() + (finite(result.lse) * d_lse).sum()

    step = np.longdouble(2.0**-16)
    for leaf, array in leaves(arrays, options).items():
        chosen = rng.permutation(array.size)[:12]
        for i in chosen:
            by = np.zeros(array.shape, np.longdouble)
            by.flat[i] = step
            expected = (loss(leaf, by) - loss(leaf, -by)) / (2 * step)
            got = ours[leaf].value.flat[i]
            assert abs(got - expected) < 1e-8, f"{leaf} {i}: {got}, not {expected}"


@pytest.mark.parametrize("name", OPTIONS)
def test_plain_is_near(name: str, rng: np.random.Generator) -> None:
    made = inputs(rng, ROWS, KEYS, batch=B, heads=H, kv_heads=HK, dim=3, value_dim=2)
    d_out, d_lse = np.float32(normal(B, H, ROWS, 2)), np.float32(normal(B, H, ROWS))
    exact = reference_backward(d_out, *made, d_lse=d_lse, **OPTIONS[name])
    plainly = plain_backward(d_out, *made, d_lse=d_lse, **OPTIONS[name])
    for leaf, one in exact.items():
        scale = max(1.0, one.magnitude)
        np.testing.assert_allclose(plainly[leaf].value, one.value, rtol=0, atol=2e-5 * scale)
        assert one.magnitude >= 0.999 * np.abs(one.value).max(initial=0)
        got, dtype = plainly[leaf].value, accumulation(plainly[leaf].value.dtype)
        exactly = one.value.astype(np.float64)
        assert_close_by_rule(got.astype(dtype), exactly, got.astype(dtype), one.magnitude, leaf)


def test_poison_that_nobody_sees(rng: np.random.Generator) -> None:
    made = inputs(rng, ROWS, KEYS, batch=B, heads=H, kv_heads=HK, dtype=np.float64)
    d_out, d_lse = rng.standard_normal(made[0].shape), normal(B, H, ROWS)
    options: dict[str, Any] = {"query_lengths": [4, 3], "key_lengths": [6, 5], "causal": True}
    clean = reference_backward(d_out, *made, d_lse=d_lse, **options)
    for b in range(B):
        for array in (made[0], d_out):
            array[b, :, options["query_lengths"][b] :] = np.nan
        for array in made[1:]:
            array[b, :, options["key_lengths"][b] :] = np.nan
    dirty = reference_backward(d_out, *made, d_lse=d_lse, **options)
    for leaf, one in clean.items():
        np.testing.assert_allclose(dirty[leaf].value, one.value, rtol=0, atol=1e-15)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"bias": True}, {"mask": True}])
def test_torch(options: dict[str, Any], rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    made = inputs(rng, ROWS, KEYS, batch=B, heads=H, kv_heads=HK, dtype=np.float64)
    d_out = rng.standard_normal(made[0].shape)
    tensors = [torch.from_numpy(a).requires_grad_() for a in made]
    seen: Array = np.ones((ROWS, KEYS), bool)
    ours: dict[str, Any] = {}
    if "causal" in options:
        seen, ours = np.tri(ROWS, KEYS, KEYS - ROWS, dtype=bool), {"causal": True}
    if "mask" in options:
        seen = MASK | (np.arange(KEYS) == 2)
        ours = {"mask": seen}
    mask = torch.where(torch.from_numpy(seen), 0.0, -torch.inf).double()
    if "bias" in options:
        ours = {"bias": normal(H, 1, KEYS)}
        bias = torch.from_numpy(ours["bias"]).requires_grad_()
        tensors.append(bias)
        mask = mask + bias
    sdpa = torch.nn.functional.scaled_dot_product_attention
    out = sdpa(*tensors[:3], attn_mask=mask, enable_gqa=True)
    theirs = torch.autograd.grad(out, tensors, torch.from_numpy(d_out))
    got = reference_backward(d_out, *made, **ours)
    for one, expected in zip(got.values(), theirs, strict=True):
        np.testing.assert_allclose(one.value, expected.numpy(), rtol=0, atol=1e-12)
