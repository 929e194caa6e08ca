"""What stands around attention in a model: linear maps and rotary position embedding."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from attncore import _core
from attncore._rotary import Rotary, RotaryFields, fields_of
from attncore._types import Array, Ints, Layout


class LinearGradients(NamedTuple):
    """The gradients of `linear`'s arguments; None for what was not wanted."""

    x: Array | None
    weight: Array | None
    bias: Array | None


def linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    out: Array | None = None,
    num_threads: int | None = None,
) -> Array:
    """y = x weightᵀ + bias, for every row of x.

    Sums are in float32 (float64 for float64) and rounded once.  The bits of a row of y depend on
    that row of x, weight and bias: not on other rows, their number or threads.  x is read
    where it lies if its axes but the last merge into at most two of one stride each, as in every
    contiguous array and every slice of one with up to three axes; else it is copied.

    Args:
        x: (..., in_features), float32, float64, float16 or bfloat16 (of ml_dtypes).
        weight: (out_features, in_features) of x's dtype, any strides.
        bias: (out_features,) of x's dtype.
        out: Where to write y; must not overlap an input.
        num_threads: For this call.

    Returns:
        y: (..., out_features) in x's dtype.

    Raises:
        ValueError: A shape or value does not fit; the message names the argument.
        TypeError: A type or dtype does not fit.

    Example:
        >>> import numpy as np, attncore
        >>> x, weight = np.eye(2, 3), np.arange(12.0).reshape(4, 3)
        >>> attncore.linear(x, weight, np.ones(4))
        array([[ 1.,  4.,  7., 10.],
               [ 2.,  5.,  8., 11.]])
    """
    return _core.linear(x, weight, bias, out, num_threads)


def linear_backward(
    d_y: Array,
    x: Array,
    weight: Array,
    *,
    wanted: Collection[str] = ("x", "weight", "bias"),
    into: LinearGradients | None = None,
    num_threads: int | None = None,
) -> LinearGradients:
    """The gradients of a loss, given its gradient with respect to y = linear(x, weight, bias).

    d_x = d_y weight, d_weight = d_yᵀ x, d_bias = the sum of d_y's rows, each accumulated in float32
    (float64 for float64) and rounded once.  The bits do not depend on threads.

    Args:
        d_y: (..., out_features) of x's dtype.
        x: (..., in_features), read as by `linear`.
        weight: (out_features, in_features) of x's dtype.
        wanted: Which gradients; the others cost nothing.
        into: Where to write them, of x's dtype; None allocates.  Must not overlap the inputs or each
            other.
        num_threads: For this call.

    Returns:
        The gradients, each like its argument, None for what is not wanted.

    Raises:
        ValueError: A shape or value does not fit; the message names the argument.
        TypeError: A type or dtype does not fit.

    Example:
        >>> import numpy as np, attncore
        >>> x, weight = np.ones((5, 3)), np.ones((4, 3))
        >>> gradients = attncore.linear_backward(np.ones((5, 4)), x, weight, wanted=["x", "bias"])
        >>> gradients.x.shape, gradients.weight, gradients.bias
        ((5, 3), None, array([5., 5., 5., 5.]))
    """
    names = LinearGradients._fields
    if isinstance(wanted, str) or not isinstance(wanted, Collection):
        raise TypeError(f"wanted: must be a collection of names, is {type(wanted).__name__}")
    for name in wanted:
        if name not in names:
            raise ValueError(f"wanted: has {name!r}, accepted are {', '.join(names)}")
    places = LinearGradients(None, None, None) if into is None else into
    if not isinstance(places, LinearGradients):
        raise TypeError(f"into: must be a LinearGradients or None, is {type(into).__name__}")
    chosen = tuple(name in wanted for name in names)
    for name, place, is_wanted in zip(names, places, chosen, strict=True):
        if place is not None and not is_wanted:
            raise ValueError(f"into: has {name}, which is not wanted")
    return LinearGradients(
        *_core.linear_backward(d_y, x, weight, chosen, tuple(places), num_threads)
    )


def rope(
    x: Array,
    positions: Ints | Sequence[Sequence[int]] | None = None,
    *,
    base: float = Rotary.base,
    dims: int | None = None,
    interleaved: bool = False,
    rotary: Rotary | None = None,
    inverse: bool = False,
    layout: Layout = "bhsd",
    out: Array | None = None,
    num_threads: int | None = None,
) -> Array:
    """Rotary position embedding (Su et al. 2021): pairs of dims turn by position · frequency.

    Pair i of `dims` has the frequency base^(−2i / dims), a float64, and is (i, i + dims / 2), or
    with `interleaved` (2i, 2i + 1); a `Rotary` can have other frequencies.  The angle is taken
    exactly, its sine and cosine in float64, so that any position up to 2^53 is fine.  A rotation's
    gradient is the rotation back: the gradient by x is
    ``rope(d_out, positions, inverse=True, ...)``.

    Args:
        x: (batch, head, token, dim), or (head, token, dim), or (token, dim); float32, float64,
            float16 or bfloat16 (of ml_dtypes); any strides.
        positions: Ints (token,) or (batch, token), negative ones too; default 0, 1, ….
        base: At least 1e-100.
        dims: The first so many dims are rotated, an even number; the others are copied.  Default:
            all.
        interleaved: Pairs are neighbours (as in GPT-J), else halves (as in GPT-NeoX and Llama).
        rotary: A `Rotary`, as a layer or a cache has it, instead of base, dims and interleaved.
        inverse: Rotate back; a `Rotary.factor` multiplies then too, as it does a gradient.
        layout: "bhsd", or "bshd" for x and out as (batch, token, head, dim).
        out: Where to write the result; may be x itself, else must not overlap it.
        num_threads: For this call.

    Returns:
        x rotated, in its shape and dtype.

    Raises:
        ValueError: A shape or value does not fit; the message names the argument.
        TypeError: A type or dtype does not fit.

    Example:
        >>> import numpy as np, attncore
        >>> x = np.array([[1.0, 0.0], [1.0, 0.0]])
        >>> attncore.rope(x, [0, 1]).round(3)
        array([[1.   , 0.   ],
               [0.54 , 0.841]])
    """
    if rotary is None:
        fields: RotaryFields = (base, dims, interleaved, None, 1.0)
    elif not isinstance(rotary, Rotary):
        raise TypeError(f"rotary: must be a Rotary or None, is {type(rotary).__name__}")
    elif not (base is Rotary.base and dims is None and interleaved is False):
        raise ValueError("rotary: comes without base, dims and interleaved, which it has")
    else:
        fields = fields_of(rotary)
    return _core.rope(x, positions, fields, inverse, layout, out, num_threads)
