"""Layers that several test files use."""

from __future__ import annotations

from typing import Any

import numpy as np

import attncore
from kit import normal
from reference import Array

B, S, K, E, H = 2, 6, 9, 20, 4

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "one kv head": {"num_kv_heads": 1, "head_dim": 7, "bias": False},
    "wide heads": {"head_dim": 12},
    "rotary": {"head_dim": 8, "rotary": True},
    "rotary pairs, partial": {
        "head_dim": 8,
        "num_kv_heads": 2,
        "rotary": attncore.Rotary(base=50.0, dims=6, interleaved=True),
    },
    "norm": {"head_dim": 8, "qk_norm": 1e-3},
    "norm and rotary": {"head_dim": 8, "num_kv_heads": 2, "qk_norm": True, "rotary": True},
    "appended": {"num_kv_heads": 2, "add_bias_kv": True, "add_zero_attn": True, "qk_norm": True},
    "other widths": {"key_dim": 11, "value_dim": 13, "num_kv_heads": 2, "head_dim": 6},
}
SELF = [name for name in LAYERS if name != "other widths"]


def make(name: str, dtype: Any = np.float64, seed: int = 0) -> attncore.MultiHeadAttention:
    """A layer whose biases and gains too are random."""
    layer = attncore.MultiHeadAttention(E, H, dtype=dtype, seed=seed, **LAYERS[name])
    rng = np.random.default_rng(seed)
    for parameter in layer.parameters().values():
        noise = rng.uniform(-0.3, 0.3, parameter.shape).astype(np.float32)
        parameter[...] = parameter + noise.astype(dtype)
    return layer


def inputs_of(
    name: str, rng: np.random.Generator, count: int, dtype: Any = np.float64
) -> list[Array]:
    widths = (E, LAYERS[name].get("key_dim", E), LAYERS[name].get("value_dim", E))
    shapes = [(B, S if i == 0 else K, widths[i]) for i in range(count)]
    return [normal(rng, *shape, dtype=dtype) for shape in shapes]
