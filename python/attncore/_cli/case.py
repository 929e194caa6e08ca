"""A benchmark case: a named shape with its options, its random inputs and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attncore._cli import packages

Array = NDArray[Any]


@dataclass(frozen=True)
class Inputs:
    """What one call gets: three arrays and the options, by attncore's names."""

    query: Array
    key: Array
    value: Array
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A shape of attention; window counts the keys that a query sees, itself included."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    causal: bool = False
    window: int | None = None
    padding: bool = False  # a boolean mask (batch, 1, 1, keys) hides the end of each entry
    bias: bool = False  # one (1, heads, queries, keys) array is added to the scores
    training: bool = False  # the backward pass too
    dropout: float = 0.0

    @cached_property
    def lengths(self) -> Array:
        """The keys of each batch entry that its queries may see: from half of them to all."""
        if not self.padding:
            return np.full(self.batch, self.keys)
        return np.linspace(self.keys // 2, self.keys, self.batch).astype(np.int64)

    @cached_property
    def visible(self) -> int:
        """The (query, key) pairs of one head, over the batch, that take part."""
        position = np.arange(self.queries)[None] + self.keys - self.queries
        last = np.broadcast_to(self.lengths[:, None] - 1, (self.batch, self.queries))
        if self.causal or self.window:
            last = np.minimum(last, position)
        first = np.maximum(position - self.window + 1, 0) if self.window else 0
        return int(np.maximum(last - first + 1, 0).sum())

    @property
    def flops(self) -> int:
        """Multiplications and additions of the products over what is visible: two, and five."""
        products = 7 if self.training else 2
        return 2 * products * self.visible * self.heads * self.dim

    def bytes(self, item: int) -> int:
        """The memory that must be read or written once: inputs and output."""
        tensors = self.heads * self.queries * 2 + self.kv_heads * self.keys * 2
        passes = 3 if self.training else 1  # backward reads all of them, and writes the gradients
        bias = self.heads * self.queries * self.keys if self.bias else 0
        return (passes * self.batch * tensors * self.dim + bias) * item

    def inputs(self, dtype: np.dtype[Any], seed: int = 0) -> Inputs:
        """Standard normal arrays of the dtype, the same for a seed."""
        rng = np.random.default_rng(seed)

        def normal(*shape: int) -> Array:
            return rng.standard_normal(shape, np.float32).astype(dtype, copy=False)

        query = normal(self.batch, self.heads, self.queries, self.dim)
        key, value = (normal(self.batch, self.kv_heads, self.keys, self.dim) for _ in range(2))
        options: dict[str, Any] = {}
        if self.causal or self.window:
            options["causal"] = True
        if self.window:
            options["window"] = (self.window - 1, 0)
        if self.padding:
            options["mask"] = (np.arange(self.keys) < self.lengths[:, None])[:, None, None, :]
        if self.bias:
            options["bias"] = normal(1, self.heads, self.queries, self.keys)
        if self.dropout:
            options.update(dropout_p=self.dropout, seed=seed)
        return Inputs(query, key, value, options)


def dtype_named(name: str) -> np.dtype[Any]:
    """A dtype by name; bfloat16 comes from the package ml_dtypes."""
    if name == "bfloat16":
        packages.need(["ml_dtypes"], "pip install ml_dtypes")
        name = packages.load("ml_dtypes").bfloat16
    dtype: np.dtype[Any] = np.dtype(name)
    return dtype
