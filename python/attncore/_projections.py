"""The two ends of a multi-head attention layer, for those who attend in between by themselves."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from attncore._backward import _require_names
from attncore._state import Layer
from attncore._types import Array

_HEADS = ("query", "key", "value")


class Projections(Layer):
    """What the layer does before attention and after it."""

    def in_proj(
        self,
        x: Array | None,
        context: Array | None = None,
        value_context: Array | None = None,
        *,
        wanted: Collection[str] = _HEADS,
        num_threads: int | None = None,
    ) -> tuple[Any, Any, Any]:
        """Queries, keys and values of the heads: normed, if the layer does that, but not rotated.

        For caches, which rotate by the positions that they know (`PagedKVCache`'s ``rotary``, and
        ``rotate_query`` of `attend`).  What add_bias_kv and add_zero_attn append is not there, and
        nothing is kept for `backward`.

        Args:
            x: As for a call; None if no query is wanted.
            context: What keys and values are made from; default x.
            value_context: What values are made from; default context, which must be given beside it
                where keys are wanted.
            wanted: Which of "query", "key" and "value" are made.
            num_threads: For this call.

        Returns:
            (query, key, value), each (batch, heads, tokens, head_dim), or (heads, tokens, head_dim)
            if the inputs have no batch axis; None for what is not wanted.  What is made from the
            same input are views of one array.

        Raises:
            ValueError: A shape or name does not fit.
            TypeError: A type or dtype does not fit.

        Example:
            >>> import numpy as np, attncore
            >>> layer = attncore.MultiHeadAttention(32, 4, rotary=True)
            >>> cache = attncore.KVCache(2, 4, 8, capacity=16, rotary=True)
            >>> def step(x):
            ...     query, key, value = layer.in_proj(x)
            ...     cache.append(key, value)
            ...     return layer.out_proj(cache.attend(query, rotate_query=True))
            >>> x = np.random.default_rng(0).standard_normal((2, 6, 32), dtype=np.float32)
            >>> y = np.concatenate([step(x[:, :4]), step(x[:, 4:5]), step(x[:, 5:])], axis=1)
            >>> np.allclose(y, layer(x, causal=True), atol=1e-5)
            True
        """
        _require_names(wanted, _HEADS)
        which = tuple(name in wanted for name in _HEADS)
        return self._core.in_proj((x, context, value_context), which, num_threads)

    def out_proj(self, out: Array, *, num_threads: int | None = None) -> Array:
        """What becomes of the heads' outputs: y = concat(head₁, …)·W_oᵀ + b_o.

        Args:
            out: (batch, num_heads, queries, head_dim), or without the batch axis.
            num_threads: For this call.

        Returns:
            y, as a call gives it: (batch, queries, embed_dim), without batch_first (queries, batch,
            embed_dim), or (queries, embed_dim).

        Raises:
            ValueError: A shape does not fit.
            TypeError: A dtype does not fit.

        Example:
            >>> import numpy as np, attncore
            >>> layer = attncore.MultiHeadAttention(32, 4)
            >>> x = np.ones((2, 5, 32), np.float32)
            >>> y = layer.out_proj(attncore.attention(*layer.in_proj(x), causal=True))
            >>> np.allclose(y, layer(x, causal=True), atol=1e-5)
            True
        """
        return self._core.out_proj(out, num_threads)
