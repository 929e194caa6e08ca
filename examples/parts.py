"""What a Transformer has besides attention: small parts in NumPy, each with its backward.

A part is called with its input and keeps what ``backward`` needs; ``backward(d_y)`` returns d_x and
leaves the parameters' gradients in ``gradients``.  attncore.MultiHeadAttention is such a part too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import attncore

Array = NDArray[Any]


class Part(Protocol):
    """What a model is made of; a model is a part as well."""

    def parameters(self) -> Mapping[str, Array]: ...

    @property
    def gradients(self) -> Mapping[str, Array]: ...


class Leaf:
    """A part that holds arrays itself."""

    def __init__(self, **weights: Array) -> None:
        self.weights = {name: array.astype(np.float32) for name, array in weights.items()}
        self.gradients: dict[str, Array] = {}

    def parameters(self) -> dict[str, Array]:
        """The arrays to train, by name; training writes into them."""
        return self.weights


class Model:
    """A part made of parts: its attributes, and the items of those that are lists."""

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Every part with its name."""
        for name, value in vars(self).items():
            if isinstance(value, list):
                yield from ((f"{name}.{i}", part) for i, part in enumerate(value))
            elif hasattr(value, "parameters"):
                yield name, value

    def parameters(self) -> dict[str, Array]:
        """The parameters of all parts, "part.name"."""
        return {f"{at}.{n}": a for at, part in self.parts() for n, a in part.parameters().items()}

    @property
    def gradients(self) -> dict[str, Array]:
        """What the last backward found, under the same names."""
        return {f"{at}.{n}": a for at, part in self.parts() for n, a in part.gradients.items()}


class Embedding(Leaf):
    """A row of a table for each id: (batch, token) → (batch, token, dim)."""

    def __init__(self, count: int, dim: int, rng: np.random.Generator) -> None:
        super().__init__(table=rng.standard_normal((count, dim)) / math.sqrt(dim))

    def __call__(self, ids: Array) -> Array:
        self.ids = ids
        rows: Array = self.weights["table"][ids]
        return rows

    def backward(self, d_y: Array) -> None:
        """Each row's gradient is the sum over the places where its id stands."""
        order = np.argsort(self.ids, axis=None, kind="stable")
        ids, starts = np.unique(self.ids.ravel()[order], return_index=True)
        d_table = np.zeros_like(self.weights["table"])
        d_table[ids] = np.add.reduceat(d_y.reshape(-1, d_y.shape[-1])[order], starts)
        self.gradients["table"] = d_table


class Linear(Leaf):
    """y = x·Wᵀ + b: (…, inputs) → (…, outputs); Xavier's uniform weights."""

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator) -> None:
        bound = math.sqrt(6 / (inputs + outputs))
        weight = rng.uniform(-bound, bound, (outputs, inputs))
        super().__init__(weight=weight, bias=np.zeros(outputs))

    def __call__(self, x: Array) -> Array:
        self.x = x
        return attncore.linear(x, self.weights["weight"], self.weights["bias"])

    def backward(self, d_y: Array) -> Array:
        d: Any = attncore.linear_backward(d_y, self.x, self.weights["weight"])
        self.gradients.update(weight=d.weight, bias=d.bias)
        return d.x


class LayerNorm(Leaf):
    """y = gain · (x − mean) / deviation + bias, over the last axis (Ba et al. 2016)."""

    def __init__(self, dim: int) -> None:
        super().__init__(gain=np.ones(dim), bias=np.zeros(dim))

    def __call__(self, x: Array) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        self.inverse = 1 / np.sqrt(variance + 1e-5)  # (batch, token, 1)
        self.unit = centred * self.inverse
        y: Array = self.unit * self.weights["gain"] + self.weights["bias"]
        return y

    def backward(self, d_y: Array) -> Array:
        self.gradients["gain"] = (d_y * self.unit).sum(axis=(0, 1))
        self.gradients["bias"] = d_y.sum(axis=(0, 1))
        d_unit = d_y * self.weights["gain"]
        along = (d_unit * self.unit).mean(axis=-1, keepdims=True)
        d_x: Array = self.inverse * (
            d_unit - d_unit.mean(axis=-1, keepdims=True) - self.unit * along
        )
        return d_x


class RMSNorm(Leaf):
    """y = gain · x / √(mean of x²), over the last axis (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int) -> None:
        super().__init__(gain=np.ones(dim))

    def __call__(self, x: Array) -> Array:
        self.inverse = 1 / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-5)
        self.unit = x * self.inverse
        y: Array = self.unit * self.weights["gain"]
        return y

    def backward(self, d_y: Array) -> Array:
        self.gradients["gain"] = (d_y * self.unit).sum(axis=(0, 1))
        d_unit = d_y * self.weights["gain"]
        along = (d_unit * self.unit).mean(axis=-1, keepdims=True)
        d_x: Array = self.inverse * (d_unit - self.unit * along)
        return d_x


class MLP(Model):
    """Two linear maps with a ReLU between them, or its square (So et al. 2021)."""

    def __init__(
        self, dim: int, hidden: int, rng: np.random.Generator, *, squared: bool = False
    ) -> None:
        self.up = Linear(dim, hidden, rng)
        self.down = Linear(hidden, dim, rng)
        self.squared = squared

    def __call__(self, x: Array) -> Array:
        self.active = np.maximum(self.up(x), 0)  # (batch, token, hidden)
        return self.down(np.square(self.active) if self.squared else self.active)

    def backward(self, d_y: Array) -> Array:
        d_active = self.down.backward(d_y)
        d_active *= 2 * self.active if self.squared else self.active > 0
        return self.up.backward(d_active)


class Residual(Model):
    """y = x + inner(norm(x)): what a Transformer is a stack of.

    ``inner`` may be attention, also to a context; then it gets the context and options as well.
    """

    def __init__(self, norm: Any, inner: Any) -> None:
        self.norm, self.inner = norm, inner

    def __call__(self, x: Array, *context: Array, **options: Any) -> Array:
        y = self.inner(self.norm(x), *context, **options)
        if options.get("need_weights"):
            y, self.weights = y  # (batch, query, key)
        return x + y

    def backward(self, d_y: Array) -> Array:
        """d_x; the gradient of a context is left in ``d_context``."""
        d_x = self.inner.backward(d_y)
        if isinstance(d_x, tuple):
            d_x, self.d_context = d_x
        return d_y + self.norm.backward(d_x)


class Dropout:
    """Options of the next attention: none, or in training the probability and a seed of its own."""

    def __init__(self) -> None:
        self.restart()

    def restart(self, probability: float = 0.0, seed: int = 0) -> None:
        """Before each pass through the model; the default is no dropout."""
        self.probability, self.seeds = probability, itertools.count(seed)

    def __call__(self) -> dict[str, Any]:
        if self.probability == 0:
            return {}
        return {"dropout_p": self.probability, "seed": next(self.seeds)}


def sinusoids(count: int, dim: int) -> Array:
    """Positions as waves of many lengths (Vaswani et al. 2017): (count, dim), float32."""
    waves = 10000.0 ** (-np.arange(0, dim, 2) / dim)  # (dim / 2)
    angles = np.arange(count)[:, None] * waves
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(count, dim).astype("f4")


def cross_entropy(logits: Array, targets: Array, smoothing: float = 0.0) -> tuple[float, Array]:
    """The mean over tokens of −Σ q·log p, in nats, and its gradient.

    logits (…, classes), targets (…); q is 1 − smoothing at the target, and smoothing spread evenly
    over all classes (Szegedy et al. 2016).
    """
    classes = logits.shape[-1]
    scores = logits.reshape(-1, classes)
    at = np.arange(len(scores)), targets.reshape(-1)
    log_p = scores - scores.max(axis=-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=-1, keepdims=True))
    loss = -(1 - smoothing) * log_p[at].mean() - smoothing * log_p.mean()
    d_logits = np.exp(log_p)
    d_logits -= smoothing / classes
    d_logits[at] -= 1 - smoothing
    d_logits /= len(scores)
    return float(loss), d_logits.reshape(logits.shape)


class Adam:
    """Adam (Kingma and Ba 2015), with weight decay apart from the moments and a bound on the norm.

    The decay is for matrices only: gains and biases are left alone.
    """

    def __init__(
        self, parameters: Mapping[str, Array], *, betas: tuple[float, float] = (0.9, 0.98),
        decay: float = 0.0, bound: float = 1.0,
    ) -> None:  # fmt: skip
        self.parameters = parameters
        self.mean = {name: np.zeros_like(array) for name, array in parameters.items()}
        self.square = {name: np.zeros_like(array) for name, array in parameters.items()}
        self.betas, self.decay, self.bound = betas, decay, bound

    def update(self, step: int, rate: float, gradients: Mapping[str, Array]) -> None:
        """Take step number ``step``, from 1, at a learning rate."""
        norm = math.sqrt(sum(float(np.square(g).sum()) for g in gradients.values()))
        scale = min(1.0, self.bound / max(norm, 1e-12))
        first, second = (1 - beta for beta in self.betas)
        unbias_mean, unbias_square = (1 / (1 - beta**step) for beta in self.betas)
        for name in self.parameters:
            array, mean, square = self.parameters[name], self.mean[name], self.square[name]
            gradient = gradients[name] * scale
            mean += first * (gradient - mean)
            square += second * (np.square(gradient) - square)
            if array.ndim > 1:
                array *= 1 - rate * self.decay
            array -= rate * unbias_mean * mean / (np.sqrt(square * unbias_square) + 1e-9)


def inverse_root(step: int, *, peak: float, warmup: int) -> float:
    """The rate grows to its peak in ``warmup`` steps, then falls as 1/√step (Vaswani et al.)."""
    return peak * min(step / warmup, math.sqrt(warmup / step))


def cosine(step: int, *, peak: float, warmup: int, steps: int) -> float:
    """The rate grows to its peak in ``warmup`` steps, then falls along a cosine to a tenth."""
    done = max(0, step - warmup) / max(1, steps - warmup)
    return peak * min(step / warmup, 0.55 + 0.45 * math.cos(math.pi * min(1.0, done)))
