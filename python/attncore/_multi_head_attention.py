"""The multi-head attention layer."""

from __future__ import annotations

import secrets
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from attncore import _core
from attncore._backward import _given_options, _require_names, _targets
from attncore._inspect import _require_known
from attncore._projections import Projections
from attncore._rotary import Rotary, fields_of, rotary_of
from attncore._state import Activations, core_of, dtype_named
from attncore._types import (
    Array,
    CrossGradients,
    CrossValueGradients,
    Gradients,
    Ints,
    ScoreOptions,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MultiHeadAttention(Projections):
    """Multi-head attention with learned projections (Vaswani et al. 2017), on NumPy arrays.

    y = concat(head₁, …)·W_oᵀ + b_o with headₕ = attention(x·W_qᵀ, context·W_kᵀ, context·W_vᵀ)ₕ.
    Parameters have the names, shapes and initial values of torch.nn.MultiheadAttention, and give its
    results and gradients.  Unlike there, batch_first is True and need_weights False by default, and
    True in a mask lets attend.  Memory is O(tokens): no scores are kept, also for training.

    Args:
        embed_dim: Width of x and of y.
        num_heads: Query heads.
        num_kv_heads: Heads of keys and values, a divisor of num_heads (Ainslie et al. 2023);
            default num_heads.
        key_dim: Width of the context that keys are made from (torch's kdim); default embed_dim.
        value_dim: Width of what values are made from (torch's vdim); default embed_dim.
        head_dim: Default embed_dim / num_heads.
        bias: Whether the projections have one.
        add_bias_kv: A learned key and value that every query sees.
        add_zero_attn: A key and value of zeros that every query sees.
        rotary: Rotates queries and keys by their positions (Su et al. 2021): a `Rotary`, or True
            for its defaults.
        qk_norm: ε, or True for 1e-6: root mean square norm (Zhang & Sennrich 2019) of queries and
            keys over head_dim, with learned gains q_norm.weight and k_norm.weight, before they are
            rotated (Dehghani et al. 2023).
        batch_first: Arrays are (batch, token, width); else (token, batch, width).
        dtype: Of parameters, inputs and outputs: float32, float64, float16 or bfloat16.
        seed: Of the initial values; default: another one each time.

    Raises:
        ValueError: A width or number does not fit; the message names the argument.
        TypeError: A type or dtype does not fit.

    Example:
        >>> import numpy as np, attncore
        >>> layer = attncore.MultiHeadAttention(32, 4, seed=0)
        >>> x = np.random.default_rng(0).standard_normal((2, 5, 32), dtype=np.float32)
        >>> y, weights = layer(x, causal=True, need_weights=True)
        >>> y.shape, weights.shape
        ((2, 5, 32), (2, 5, 5))
        >>> d_x = layer.backward(np.ones_like(y))
        >>> for name, parameter in layer.parameters().items():
        ...     parameter -= np.float32(0.1) * layer.gradients[name]
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        rotary: Rotary | bool | None = None,
        qk_norm: float | bool | None = None,
        batch_first: bool = True,
        dtype: npt.DTypeLike = np.float32,
        seed: int | None = None,
    ) -> None:
        if isinstance(qk_norm, (bool, np.bool_)):
            qk_norm = 1e-6 if qk_norm else None
        self._settings: dict[str, Any] = {
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "key_dim": key_dim,
            "value_dim": value_dim,
            "head_dim": head_dim,
            "bias": bias,
            "add_bias_kv": add_bias_kv,
            "add_zero_attn": add_zero_attn,
            "rotary": rotary_of(rotary),
            "qk_norm": qk_norm,
            "batch_first": batch_first,
            "dtype": dtype_named(dtype),
        }
        self._make(secrets.randbits(64) if seed is None else seed)
        self.training = True
        self.option_gradients = Gradients()

    def _make(self, seed: int) -> None:
        s = self._settings
        rotary: Rotary | None = s["rotary"]
        self._core = _core.MultiHeadAttention(
            tuple(s[name] for name in list(s)[:6]),
            s["bias"],
            s["add_bias_kv"],
            s["add_zero_attn"],
            None if rotary is None else fields_of(rotary),
            s["qk_norm"],
            s["dtype"],
            seed,
            s["batch_first"],
        )

    def __call__(
        self,
        x: Array,
        context: Array | None = None,
        value_context: Array | None = None,
        *,
        positions: Ints | None = None,
        key_positions: Ints | None = None,
        need_weights: bool | Literal["average", "heads"] = False,
        dropout_p: float = 0.0,
        seed: int = 0,
        activations: Activations | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Any:
        """Self-attention of x, or attention of x to a context.

        While `training` is True, what `backward` needs is kept until the next call: arrays of the
        size of x, and the arguments themselves, which must not change meanwhile.

        Args:
            x: (batch, queries, embed_dim), or without batch_first (queries, batch, embed_dim), or
                (queries, embed_dim), of the layer's dtype; any strides, nothing is copied.
            context: (batch, keys, key_dim), what keys and values are made from; default x.
            value_context: (batch, keys, value_dim), what values are made from; default context.
            positions: Ints (queries,) or (batch, queries), for a rotary layer; default 0, 1, …
            key_positions: Those of the context, which must be given; default 0, 1, …
            need_weights: Return the attention probabilities too, before dropout: True or "average"
                for their mean over the heads, "heads" for all.
            dropout_p: As for `attention`, 0 ≤ dropout_p < 1; it applies after `eval()` too.
            seed: As for `attention`; pass a new one for each call (of each layer, if they are to
                drop different weights).
            activations: Keeps what `backward` needs there, whatever `training` is, and leaves the
                layer's own last call alone.
            options: Those of `attention`, over (batch, heads, queries, keys), but layout, out and
                return_lse.  In self-attention the default query_offset is 0.  What add_bias_kv and
                add_zero_attn append has no mask, bias, length nor position: every query sees it.

        Returns:
            y, of x's shape; with need_weights the pair (y, weights), weights being
            (batch[, heads], queries, keys) in float32 (float64 for float64); what add_bias_kv and
            add_zero_attn append has the last columns.

        Raises:
            ValueError: A shape or value does not fit.
            TypeError: A type or dtype does not fit.
            MemoryError: There is no memory for what is kept.

        Example:
            >>> import numpy as np, attncore
            >>> layer = attncore.MultiHeadAttention(16, 2, key_dim=6, value_dim=6)
            >>> x, memory = np.ones((3, 16), np.float32), np.ones((9, 6), np.float32)
            >>> layer(x, memory).shape
            (3, 16)
        """
        if "layout" in options:
            raise TypeError("MultiHeadAttention() got an unexpected keyword argument 'layout'")
        by_head = None
        asked: Any = need_weights
        if isinstance(asked, np.bool_):
            asked = bool(asked)
        if asked is not False:
            if asked not in (True, "average", "heads"):
                raise ValueError(
                    f"need_weights: is {asked!r}, must be a bool, 'average' or 'heads'"
                )
            by_head = asked == "heads"
        _require_known("MultiHeadAttention", options)
        return self._core.forward(
            (x, context, value_context, positions, key_positions),
            self.training,
            core_of(activations),
            by_head,
            {**options, "dropout_p": dropout_p, "seed": seed},
        )

    def backward(
        self,
        d_y: Array,
        *,
        wanted: Collection[str] = ("x", "context", "value_context"),
        accumulate: bool = False,
        activations: Activations | None = None,
        num_threads: int | None = None,
    ) -> Any:
        """The gradients of the last call, given the gradient with respect to its y.

        Those of parameters are written to `gradients`, those of options to `option_gradients`,
        which holds this call's alone.

        Args:
            d_y: Like y.
            wanted: Names of inputs and options whose gradients are computed; options are bias,
                alibi, sinks and relative_bias, if the call had them.
            accumulate: Add to `gradients` instead of overwriting them; each sum is rounded to the
                layer's dtype.
            activations: Go back through the call that they were given to last.
            num_threads: For this call.

        Returns:
            The gradient with respect to x; with a context the named tuple (x, context), and with a
            value context (x, context, value_context).  None for what is not wanted.

        Raises:
            ValueError: There was no call to go back through; a shape or name does not fit.
            RuntimeError: Another thread is in `backward` of this layer.
            TypeError: A type or dtype does not fit.

        Example:
            >>> import numpy as np, attncore
            >>> layer = attncore.MultiHeadAttention(16, 2)
            >>> x, memory = np.ones((1, 3, 16), np.float32), np.ones((1, 9, 16), np.float32)
            >>> d = layer.backward(np.ones_like(layer(x, memory)))
            >>> d.x.shape, d.context.shape
            ((1, 3, 16), (1, 9, 16))
        """
        own = core_of(activations)
        given = _given_options(cast("ScoreOptions", self._core.kept_options(own)))
        inputs = CrossValueGradients._fields
        _require_names(wanted, (*inputs, *given))
        targets = _targets(given, [name for name in wanted if name in given], None)
        bias = targets.bias
        x, context, value_context, count = self._core.backward(
            d_y,
            tuple(name in wanted for name in inputs),
            (
                (bias,) if isinstance(bias, np.ndarray) else bias,
                targets.alibi,
                targets.sinks,
                targets.relative_bias,
            ),
            accumulate,
            own,
            num_threads,
        )
        self.option_gradients = targets
        if count == 1:
            return x
        if count == 2:
            return CrossGradients(x, context)
        return CrossValueGradients(x, context, value_context)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of parameters, inputs and outputs."""
        return np.dtype(self._settings["dtype"])

    def __repr__(self) -> str:
        plain = MultiHeadAttention.__init__.__kwdefaults__ or {}
        settings = dict(self._settings)
        shown = [str(settings.pop("embed_dim")), str(settings.pop("num_heads"))]
        shown += [
            f"{name}={value!s}"
            for name, value in settings.items()
            if name not in plain or value != plain[name]
        ]
        return f"MultiHeadAttention({', '.join(shown)})"
