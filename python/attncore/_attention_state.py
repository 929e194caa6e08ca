"""Exact attention over keys that come in pieces."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from attncore import _checkpoint, _core
from attncore._pieces import bias_in_dtype, in_dtype, kept, mapping, shown
from attncore._types import (
    Array,
    Floats,
    Ints,
    Layout,
    Precision,
    RelativeBias,
    ScoreOptions,
    Window,
)

if TYPE_CHECKING:
    from typing_extensions import Self


class AttentionState:
    """Attention of some queries to keys that come piece by piece, in any number of pieces.

    Of all keys so far a query keeps the largest score, Σ exp(score) and Σ exp(score) · value
    (Milakov & Gimelshein 2018; Rabe & Staats 2021), in twice the precision of `dtype`: a million
    small pieces cost no more accuracy than one.  `result` is `attention` over all keys.  States of
    disjoint keys, also from other processes, are joined by `merge`.

    Args:
        query: (batch, heads, queries, dim), or fewer axes as for `attention`; float32, float64,
            float16 or bfloat16.  It is copied.
        dtype: float32 or float64, of the query that is kept and of results; default: float64 for
            a float64 query, else float32.
        value_dim: Of the values to come; default: query's dim.
        causal, window, alibi, relative_bias: As for `attention`; they need a query_offset.
        query_offset: Position of query 0 among all keys, an int or one a batch entry.  There is no
            default: which key will be the last is not known yet.
        softcap, scale, query_segments, query_lengths, layout: As for `attention`.
        sinks: As for `attention`; added once, in `result`.
        precision: As for `attention`, of a float32 state and float32 pieces.

    Raises:
        ValueError: A shape or value does not fit; the message names the argument.
        TypeError: A type or dtype does not fit.
        RuntimeError: From any method while another thread changes the state, and from those that
            change it while one reads it.  Any number may read at once.

    Example:
        >>> import numpy as np, attncore
        >>> rng = np.random.default_rng(0)
        >>> query = rng.standard_normal((2, 3, 8), dtype=np.float32)
        >>> state = attncore.AttentionState(query)
        >>> for _ in range(10):  # from a file, a socket, …
        ...     key, value = rng.standard_normal((2, 2, 5, 8), dtype=np.float32)
        ...     state.update(key, value)
        >>> out, lse = state.result()
        >>> out.shape, lse.shape, state.next_key
        ((2, 3, 8), (2, 3), array([50]))
    """

    def __init__(
        self,
        query: Array,
        *,
        dtype: npt.DTypeLike | None = None,
        value_dim: int | None = None,
        causal: bool = False,
        window: Window | None = None,
        query_offset: int | Ints | None = None,
        alibi: Array | Sequence[float] | None = None,
        relative_bias: RelativeBias | None = None,
        softcap: float | None = None,
        sinks: Array | Sequence[float] | None = None,
        scale: float | None = None,
        query_segments: Ints | None = None,
        query_lengths: int | Ints | None = None,
        layout: Layout = "bhsd",
        precision: Precision = "highest",
    ) -> None:
        if dtype is None:
            double = getattr(query, "dtype", None) == np.float64
            dtype = np.float64 if double else np.float32
        options: ScoreOptions = {
            "layout": layout,
            "causal": causal,
            "window": window,
            "query_offset": query_offset,
            "alibi": in_dtype(alibi, query, np.dtype(dtype)),
            "relative_bias": bias_in_dtype(relative_bias, query, np.dtype(dtype)),
            "softcap": softcap,
            "sinks": in_dtype(sinks, query, np.dtype(dtype)),
            "scale": scale,
            "query_segments": query_segments,
            "query_lengths": query_lengths,
            "precision": precision,
        }
        self._dtype: np.dtype[Any] = np.dtype(dtype)
        self._core = _core.AttentionState(query, self._dtype, value_dim, options)
        self._options = kept(options)

    def update(
        self,
        key: Array,
        value: Array,
        *,
        mask: npt.NDArray[np.bool_] | None = None,
        bias: Array | Sequence[Array] | None = None,
        key_segments: Ints | None = None,
        key_lengths: int | Ints | None = None,
        first_key: int | Ints | None = None,
        key_scale: Array | None = None,
        value_scale: Array | None = None,
        num_threads: int | None = None,
    ) -> None:
        """Takes a piece of keys and their values into account.

        The arrays are read where they lie and are not kept.  Of a NumPy memmap (not of one that is
        copied on write) pages that were read are given back on the way, so that a file larger than
        memory is no burden.  A call that fails, or is interrupted, leaves the state as it was.

        Args:
            key: (batch, kv_heads, keys, dim) with query's axes and layout, any number of keys.  For
                a float32 state float32, float16, bfloat16, int8, float8_e4m3fn (of ml_dtypes), or
                uint8 for int4: two numbers in a byte, the first in its low half.  For a float64
                state float64, float32, float16 or bfloat16.
            value: (batch, kv_heads, keys, value_dim), a dtype of its own likewise.
            mask, bias: As for `attention`, over the keys of this piece; a bias has float32 or the
                state's dtype.
            key_segments, key_lengths: Of this piece.
            first_key: Position of the piece's first key, an int or one a batch entry; default:
                after all keys so far, those past key_lengths not counted.
            key_scale: float32, key's shape without dim: each key is what is stored times this.
            value_scale: The same of the values.
            num_threads: For this call.

        Raises:
            ValueError, TypeError, RuntimeError: As the class.
            MemoryError: There is no memory for the workspace.
            KeyboardInterrupt: Ctrl-C.

        Example:
            >>> import numpy as np, attncore
            >>> x = np.eye(4, dtype=np.float32)
            >>> state = attncore.AttentionState(x, causal=True, query_offset=0)
            >>> state.update(x[2:], x[2:], first_key=2)
            >>> state.update(x[:2], x[:2], first_key=0)
            >>> np.allclose(state.result()[0], attncore.attention(x, x, x, causal=True))
            True
        """
        options: ScoreOptions = {
            "layout": self._options["layout"],
            "mask": mask,
            "bias": bias,
            "key_segments": key_segments,
            "key_lengths": key_lengths,
            "num_threads": num_threads,
        }
        mapped = [m for m in map(mapping, (key, value)) if m is not None]
        arrays = (key, value, key_scale, value_scale)
        self._core.update(arrays, first_key, mapped, options)

    def merge(self, other: AttentionState, *, num_threads: int | None = None) -> None:
        """Adds what another state has seen; it stays as it is.

        Args:
            other: A state of the same query and options (but precision) that has seen other keys.
            num_threads: For this call.

        Raises:
            ValueError: The query or an option differs.
            TypeError: It is no AttentionState.

        Example:
            >>> import numpy as np, attncore
            >>> query, key, value = np.random.default_rng(0).standard_normal((3, 9, 4))
            >>> first, second = (attncore.AttentionState(query) for _ in range(2))
            >>> first.update(key[:4], value[:4])
            >>> second.update(key[4:], value[4:])
            >>> first.merge(second)
            >>> np.allclose(first.result()[0], attncore.attention(query, key, value))
            True
        """
        if not isinstance(other, AttentionState):
            raise TypeError(f"other: must be an AttentionState, is {type(other).__name__}")
        if other is not self and other._options["layout"] != self._options["layout"]:
            raise ValueError("other: has another layout, must be a state of the same")
        self._core.merge(other._core, num_threads)

    def result(self, *, num_threads: int | None = None) -> tuple[Floats, Floats]:
        """Attention to all keys so far; the state can go on after it.

        Returns:
            out: (batch, heads, queries, value_dim) with query's axes and layout, and
            lse: (batch, heads, queries), the logarithm of the softmax's denominator; both of
            `dtype`.  Where nothing was seen, 0 and −inf (or the sink's logit).

        Example:
            >>> import numpy as np, attncore
            >>> attncore.AttentionState(np.ones((1, 4), np.float32)).result()[1]
            array([-inf], dtype=float32)
        """
        return self._core.result(num_threads)

    @property
    def next_key(self) -> npt.NDArray[np.int64]:
        """Where the next piece begins unless it says so, (batch,)."""
        return self._core.parts()["next_key"].ravel()

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of results."""
        return self._dtype

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all, from which `load` goes on.

        Raises:
            ImportError: The package safetensors is not installed: attncore[layers].
        """
        state = self.__getstate__()
        arrays, notes = state["arrays"], state["notes"]
        _checkpoint.write(path, arrays, {"attncore.AttentionState": json.dumps(notes)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The state that `save` wrote; it goes on to the bit as if there had been no break.

        Raises:
            ImportError: The package safetensors is not installed: attncore[layers].
            ValueError: The file holds no AttentionState.

        Example:
            >>> import numpy as np, attncore, tempfile, pathlib
            >>> state = attncore.AttentionState(np.ones((5, 4), np.float32), softcap=30.0)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     state.save(pathlib.Path(folder) / "state.safetensors")
            ...     attncore.AttentionState.load(pathlib.Path(folder) / "state.safetensors")
            AttentionState(query=(5, 4), dtype=float32, value_dim=4, softcap=30.0)
        """
        arrays, metadata = _checkpoint.read(path)
        notes = metadata.get("attncore.AttentionState")
        if notes is None:
            raise ValueError(f"path: {os.fspath(path)} holds no AttentionState")
        state = cls.__new__(cls)
        try:
            state.__setstate__({"arrays": arrays, "notes": json.loads(notes)})
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"path: {os.fspath(path)} holds no whole AttentionState") from error
        return state

    def __getstate__(self) -> dict[str, Any]:
        arrays = {"query": self._core.query(), **self._core.parts()}
        notes: dict[str, Any] = {"rank": self._core.rank(), "value_dim": self._core.value_dim()}
        for name, option in self._options.items():
            if isinstance(option, RelativeBias):
                arrays["option.relative_bias"] = option.table
                notes[name] = [option.bidirectional, option.max_distance]
            elif isinstance(option, np.ndarray):
                arrays[f"option.{name}"] = option
            else:
                notes[name] = option
        return {"arrays": arrays, "notes": notes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrays, options = dict(state["arrays"]), dict(state["notes"])
        query = arrays.pop("query")
        query = query[(0,) * (4 - options.pop("rank"))]
        if options["layout"] == "bshd" and query.ndim > 2:
            query = np.swapaxes(query, -2, -3)
        given = {n[7:]: arrays.pop(n) for n in list(arrays) if n.startswith("option.")}
        if "relative_bias" in given:
            bidirectional, farthest = options["relative_bias"]
            given["relative_bias"] = RelativeBias(given["relative_bias"], bidirectional, farthest)
        if options["window"] is not None:
            options["window"] = tuple(options["window"])
        AttentionState.__init__(self, query, dtype=query.dtype, **{**options, **given})
        self._core.set_parts(arrays)

    def __repr__(self) -> str:
        shape = self._core.query().shape[4 - self._core.rank() :]
        if self._options["layout"] == "bshd" and len(shape) > 2:
            shape = (*shape[:-3], shape[-2], shape[-3], shape[-1])
        options = {n: o for n, o in self._options.items() if o is not None and o is not False}
        for name, default in (("layout", "bhsd"), ("precision", "highest")):
            if options[name] == default:
                del options[name]
        sizes = {"query": shape, "dtype": self._dtype, "value_dim": self._core.value_dim()}
        texts = [f"{name}={shown(option)}" for name, option in {**sizes, **options}.items()]
        return f"AttentionState({', '.join(texts)})"
