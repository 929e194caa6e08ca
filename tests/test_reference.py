"""The reference itself: against numbers by hand, and against torch where it is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kit import inputs
from reference import Array, plain, reference
from rule import assert_close_by_rule


def one_key_each(scores: list[float], values: list[float]) -> tuple[Array, Array, Array]:
    """A query of one dim whose scores are given."""
    q = np.ones((1, 1, 1, 1))
    return q, np.array(scores).reshape(1, 1, -1, 1), np.array(values).reshape(1, 1, -1, 1)


def test_softmax_by_hand() -> None:
    q, k, v = one_key_each([np.log(1.0), np.log(3.0)], [10.0, 20.0])
    result = reference(q, k, v)
    np.testing.assert_allclose(result.weights.ravel(), [0.25, 0.75])
    np.testing.assert_allclose(result.out.ravel(), [17.5])
    np.testing.assert_allclose(result.lse.ravel(), [np.log(4.0)])


def test_sink_softcap_alibi_by_hand() -> None:
    q, k, v = one_key_each([0.0, 0.0], [1.0, 3.0])
    sunk = reference(q, k, v, sinks=np.array([np.log(2.0)]))
    np.testing.assert_allclose(sunk.out.ravel(), [1.0])
    np.testing.assert_allclose(sunk.lse.ravel(), [np.log(4.0)])
    q, k, v = one_key_each([5.0, -5.0], [1.0, 3.0])
    capped = reference(q, k, v, softcap=2.0)
    ratio = np.exp(4.0 * np.tanh(2.5))
    np.testing.assert_allclose(capped.weights.ravel()[0] / capped.weights.ravel()[1], ratio)
    q, k, v = one_key_each([0.0, 0.0], [1.0, 3.0])
    tilted = reference(q, k, v, alibi=np.array([0.5]))  # the query stands at key 1
    np.testing.assert_allclose(tilted.weights.ravel()[0] / tilted.weights.ravel()[1], np.exp(-0.5))


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({}, ["111", "111"]),
        ({"causal": True}, ["110", "111"]),
        ({"causal": True, "query_offset": 0}, ["100", "110"]),
        ({"causal": True, "query_offset": -1}, ["000", "100"]),
        ({"window": (0, 0)}, ["010", "001"]),
        ({"window": (1, None), "query_offset": 1}, ["111", "011"]),
        ({"window": (None, 0), "query_offset": 0}, ["100", "110"]),
        ({"causal": True, "key_lengths": [2]}, ["100", "110"]),
        ({"causal": True, "key_lengths": [2], "query_lengths": [1]}, ["110", "000"]),
        ({"mask": np.array([True, False, True])}, ["101", "101"]),
        ({"bias": np.array([0.0, -np.inf, 1.0])}, ["101", "101"]),
        (
            {"query_segments": np.array([[0, 7]]), "key_segments": np.array([[0, 0, 7]])},
            ["110", "001"],
        ),
    ],
)
def test_visible_by_hand(options: dict[str, Any], seen: list[str]) -> None:
    q, k, v = np.ones((1, 1, 2, 4)), np.ones((1, 1, 3, 4)), np.ones((1, 1, 3, 4))
    weights = reference(q, k, v, **options).weights[0, 0]
    assert ["".join("1" if w > 0 else "0" for w in row) for row in weights] == seen


def test_layouts_and_ranks(rng: np.random.Generator) -> None:
    q, k, v = inputs(rng, 5, 7, batch=1, heads=3, dtype=np.float64)
    whole = reference(q, k, v, causal=True)
    swapped = reference(*(a.transpose(0, 2, 1, 3) for a in (q, k, v)), causal=True, layout="bshd")
    np.testing.assert_array_equal(swapped.out.transpose(0, 2, 1, 3), whole.out)
    three = reference(q[0], k[0], v[0], causal=True)
    np.testing.assert_array_equal(three.out, whole.out[0])
    two = reference(q[0, 1], k[0, 1], v[0, 1], causal=True)
    np.testing.assert_array_equal(two.out, whole.out[0, 1])
    assert three.lse.shape == (3, 5)
    assert two.lse.shape == (5,)


def test_rule_refuses_a_wrong_result(rng: np.random.Generator) -> None:
    q, k, v = inputs(rng, 5, 7)
    exact, plainly = reference(q, k, v), plain(q, k, v)
    assert_close_by_rule(plainly.out, exact.out, plainly.out, exact.magnitude)
    for wrong in (plainly.out * np.float32(1.0001), plainly.out + np.float32("nan")):
        with pytest.raises(AssertionError):
            assert_close_by_rule(wrong, exact.out, plainly.out, exact.magnitude)


def test_against_torch(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    q, k, v = inputs(rng, 9, 13, batch=2, heads=6, kv_heads=2, dtype=np.float64)
    mask = rng.random((2, 1, 9, 13)) < 0.6
    bias = rng.standard_normal((6, 9, 13))
    tensors = [torch.from_numpy(a) for a in (q, k, v)]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    for ours, theirs in (
        ({}, {}),
        ({"causal": True, "query_offset": 0}, {"is_causal": True}),
        ({"mask": mask}, {"attn_mask": torch.from_numpy(mask)}),
        ({"bias": bias, "scale": 0.3}, {"attn_mask": torch.from_numpy(bias), "scale": 0.3}),
    ):
        expected = sdpa(*tensors, enable_gqa=True, **theirs).numpy()
        np.testing.assert_allclose(reference(q, k, v, **ours).out, expected, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_score_steps_against_torch_flex_attention(rng: np.random.Generator) -> None:
    pytest.importorskip("torch")
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    import torch

    q, k, v = inputs(rng, 9, 13, batch=2, heads=2, dtype=np.float64)
    slopes = torch.tensor([0.5, 0.25], dtype=torch.float64)
    ours = torch.tensor([[0] * 4 + [1] * 5, [0] * 6 + [1] * 3])
    theirs = torch.tensor([[0] * 6 + [1] * 7, [0] * 5 + [1] * 8])

    def score(s: Any, b: Any, h: Any, row: Any, key: Any) -> Any:
        at = row + 4
        s = 1.5 * torch.tanh(s / 1.5) - slopes[h] * (at - key).abs()
        seen = (key <= at) & (key >= at - 3) & (ours[b, row] == theirs[b, key])
        return torch.where(seen, s, -float("inf"))

    expected = flex.flex_attention(*(torch.from_numpy(a) for a in (q, k, v)), score_mod=score)
    result = reference(
        q,
        k,
        v,
        causal=True,
        window=(3, None),
        softcap=1.5,
        alibi=slopes.numpy(),
        query_segments=ours.numpy(),
        key_segments=theirs.numpy(),
    )
    np.testing.assert_allclose(result.out, np.nan_to_num(expected.numpy()), atol=1e-12)
