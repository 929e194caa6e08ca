"""The gradients of the reference, by the formulas of Dao et al. (2022), with the whole score matrix.

With weights P, kept where D > 0, and out = (P·D) V, for given gradients dO of out and dL of lse:

    dV = (P·D)ᵀ dO      dP = (dO Vᵀ)·D      dZ = P · (dP − rowsum(dO·out) + dL)      dS = dZ · softcap'
    dQ = scale · dS K   dK = scale · dSᵀ Q   d(sink) = Σ P_sink · (dL − rowsum(dO·out))

and whatever is added to scores gets the sum of dZ over what it repeats.  `reference_backward` and `plain_backward` are
this text in the arithmetic of `reference` and `plain`; the latter rounds P and dS to the input's dtype before products,
and each gradient at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from reference import (
    Array,
    Scored,
    Softmaxed,
    accumulation,
    as_tuple,
    from_bhsd,
    relative_buckets,
    score,
    softmax,
    to_bhsd,
    visible_product,
    widest,
)
from rule import EPS


@dataclass(frozen=True)
class Gradient:
    """`magnitude` is the largest sum of the absolute values of what cancels in an element, `noise` the largest error
    that rounding `out` to its dtype typically costs: a root of a sum of squares over rows."""

    value: Array
    magnitude: float
    noise: float


Backward = dict[
    str, Gradient
]  # by name: query, key, value, bias 0, bias 1, …, alibi, sinks, relative_bias


def reference_backward(
    d_out: Array, query: Array, key: Array, value: Array, **options: Any
) -> Backward:
    exact = widest(query, key)
    return _backward(d_out, query, key, value, exact, exact, **options)


def plain_backward(
    d_out: Array, query: Array, key: Array, value: Array, **options: Any
) -> Backward:
    made = _backward(d_out, query, key, value, accumulation(query.dtype), query.dtype, **options)
    return {name: _rounded(name, one, query, options) for name, one in made.items()}


def _rounded(name: str, one: Gradient, query: Array, options: dict[str, Any]) -> Gradient:
    """A gradient has the dtype of what it belongs to."""
    owner = query
    if name.startswith("bias"):
        owner = np.asarray(as_tuple(options["bias"])[int(name.split()[1])])
    elif name == "relative_bias":
        owner = np.asarray(options["relative_bias"].table)
    elif name in ("alibi", "sinks"):
        owner = np.asarray(options[name])
    return Gradient(one.value.astype(owner.dtype), one.magnitude, one.noise)


@dataclass(frozen=True)
class ScoreGradient:
    """dZ and dS, (batch, head, row, key), and the sums of absolute values that they are rounded from."""

    after_cap: Array
    before_cap: Array
    size: Array
    size_before_cap: Array
    slope: Array
    row: Array  # dL − rowsum(dO · out)
    row_size: Array
    row_noise: Array  # of rowsum(dO · out)


def _backward(
    d_out: Array,
    query: Array,
    key: Array,
    value: Array,
    accumulate: np.dtype[Any],
    operand: np.dtype[Any],
    *,
    d_lse: Array | None = None,
    sinks: Array | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> Backward:
    layout = options.get("layout", "bhsd")
    with np.errstate(all="ignore"):
        scored = score(query, key, value, accumulate, **options)
        soft = softmax(scored, sinks, operand, dropout_p, seed)
        d_o = to_bhsd(d_out, layout).astype(accumulate)
        d_l = np.zeros(soft.lse.shape, accumulate)
        if d_lse is not None:
            d_l = np.where(scored.exists, d_lse.astype(accumulate).reshape(d_l.shape), 0)
        eps = EPS[str(query.dtype)]
        d_scores = _d_scores(scored, soft, d_o, d_l, eps, options.get("softcap"))
        made = _of_operands(scored, soft, d_o, d_scores, query, key, operand, layout)
        made |= _of_options(scored, soft, d_scores, sinks, options)
    return made


def _d_scores(
    scored: Scored, soft: Softmaxed, d_o: Array, d_l: Array, eps: float, softcap: float | None
) -> ScoreGradient:
    visible, weights, kind = scored.visible, soft.weights, soft.weights.dtype
    sees: Array = np.any(visible, axis=-1)
    terms = np.where(sees[..., None], d_o * soft.out.astype(kind), 0)
    row = d_l - terms.sum(axis=-1)
    d_p = d_o @ scored.v.swapaxes(2, 3) * soft.keep
    d_z = np.where(visible, weights * (d_p + row[..., None]), 0)

    o, q, k, v = (np.abs(np.nan_to_num(a)) for a in (d_o, scored.q, scored.k, scored.v))
    size = o @ v.swapaxes(2, 3) * soft.keep
    row_size = np.abs(np.nan_to_num(d_l)) + np.where(sees, (o * (soft.dropped @ v)).sum(axis=-1), 0)
    row_noise = eps / 2 * np.sqrt((np.nan_to_num(terms) ** 2).sum(axis=-1))
    size = np.where(visible, weights * (size + row_size[..., None]), 0)
    slope, size_before_cap = np.ones((), kind), size
    if softcap is not None:
        capped = np.tanh(scored.products / kind.type(softcap))
        slope = np.where(visible, 1 - capped**2, 0)
        # An error of a unit in the last place of the products bends the slope by 2 tanh (1 − tanh²) / c as much.
        bend = (
            np.abs(capped * slope) * 2 / softcap * (q @ k.swapaxes(2, 3)) * abs(scored.scale) / 16
        )
        size_before_cap = size * slope + np.abs(np.where(visible, d_z * bend, 0))
    d_s = np.where(visible, d_z * slope, 0)
    return ScoreGradient(d_z, d_s, size, size_before_cap, slope, row, row_size, row_noise)


def _of_operands(
    scored: Scored,
    soft: Softmaxed,
    d_o: Array,
    d_scores: ScoreGradient,
    query: Array,
    key: Array,
    operand: np.dtype[Any],
    layout: str,
) -> Backward:
    visible, kind, scale = scored.visible, scored.scores.dtype, scored.scale
    across = visible.swapaxes(2, 3)
    d_s, d_s_across = (
        a.astype(operand).astype(kind)
        for a in (d_scores.before_cap, d_scores.before_cap.swapaxes(2, 3))
    )
    d_q = visible_product(d_s, scored.k, visible) * scale
    d_k = visible_product(d_s_across, scored.q, across) * scale
    d_v = visible_product(soft.dropped.swapaxes(2, 3), d_o, across)

    q, k, o, size = (
        np.abs(np.nan_to_num(a)) for a in (scored.q, scored.k, d_o, d_scores.size_before_cap)
    )
    sizes = size @ k, size.swapaxes(2, 3) @ q, soft.dropped.swapaxes(2, 3) @ o
    of_row = np.nan_to_num(soft.weights) * d_scores.slope * d_scores.row_noise[..., None]
    noise_q = of_row @ np.nan_to_num(scored.k)
    noise_k = (of_row.swapaxes(2, 3) ** 2) @ q**2
    group = scored.q.shape[1] // to_bhsd(key, layout).shape[1]

    def owned(array: Array) -> Array:
        """The sum over the query heads that read a KV head."""
        batch, heads, *rest = array.shape
        total: Array = array.reshape(batch, heads // group, group, *rest).sum(axis=2)
        return total

    def gradient(value: Array, size: Array, squares: Array) -> Gradient:
        return Gradient(from_bhsd(value, query.ndim, layout), _largest(size), _root(squares))

    factor = float(abs(scale))
    return {
        "query": gradient(d_q, sizes[0] * factor, (noise_q * factor) ** 2),
        "key": gradient(owned(d_k), owned(sizes[1]) * factor, owned(noise_k) * factor**2),
        "value": gradient(owned(d_v), owned(sizes[2]), np.zeros(1)),
    }


def _of_options(
    scored: Scored,
    soft: Softmaxed,
    d_scores: ScoreGradient,
    sinks: Array | None,
    options: dict[str, Any],
) -> Backward:
    """Of what is added to the scores, and of the sinks."""
    d_z, size, noise = d_scores.after_cap, np.nan_to_num(d_scores.size), d_scores.row_noise
    weights = np.nan_to_num(soft.weights)
    made: Backward = {}
    for i, one in enumerate(as_tuple(options.get("bias"))):
        one_key = np.shape(one)[-1:] in ((), (1,))  # errors of a row are all the same: they add up
        errors = (weights.sum(axis=3, keepdims=True) if one_key else weights) * noise[..., None]
        made[f"bias {i}"] = _gradient(d_z, size, errors**2, np.shape(one))
    alibi, relative_bias = options.get("alibi"), options.get("relative_bias")
    if alibi is not None:
        far = np.abs(scored.distance).astype(d_z.dtype)
        squares = ((far * weights).sum(axis=3) * noise) ** 2
        made["alibi"] = _gradient(
            (-far * d_z).sum(axis=(2, 3)),
            (far * size).sum(axis=(2, 3)),
            squares.sum(axis=2),
            np.shape(alibi),
        )
    if sinks is not None:
        made["sinks"] = _gradient(
            (soft.sink * d_scores.row).sum(axis=2),
            np.nan_to_num(soft.sink * d_scores.row_size).sum(axis=2),
            np.nan_to_num((soft.sink * noise) ** 2).sum(axis=2),
            np.shape(sinks),
        )
    if relative_bias is not None:
        buckets = relative_buckets(relative_bias, scored.distance)
        count = np.shape(relative_bias.table)[1]

        def by_bucket(array: Array, of_rows: Any = lambda sums: sums) -> Array:
            """(head, bucket): sums over a row's keys, what of_rows makes of them, summed over rows."""
            sums = np.zeros((*array.shape[:3], count), array.dtype)
            b, h, i, _ = np.ogrid[tuple(slice(n) for n in array.shape)]
            np.add.at(sums, (b, h, i, buckets), array)
            total: Array = of_rows(sums).sum(axis=(0, 2))
            return total

        value, squares = (
            by_bucket(d_z),
            by_bucket(weights, lambda sums: (sums * noise[..., None]) ** 2),
        )
        made["relative_bias"] = _gradient(value, by_bucket(size), squares, value.shape)
    return made


def _gradient(value: Array, size: Array, squares: Array, shape: tuple[int, ...]) -> Gradient:
    """Of something of this shape that was added: sums over what it repeats."""
    value, size, squares = (_reduced(a, shape) for a in (value, size, squares))
    return Gradient(value, _largest(size), _root(squares))


def _reduced(array: Array, shape: tuple[int, ...]) -> Array:
    """Summed over the axes that an array of `shape` repeats."""
    wide = (1,) * (array.ndim - len(shape)) + shape
    repeated = tuple(i for i, n in enumerate(wide) if n == 1)
    total: Array = array.sum(axis=repeated, keepdims=True)
    return total.reshape(shape)


def _largest(sizes: Array) -> float:
    return float(np.max(sizes, initial=0.0))


def _root(squares: Array) -> float:
    return float(np.sqrt(_largest(squares)))
