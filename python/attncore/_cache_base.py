"""What both caches can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from attncore._cache_file import SavedCache
from attncore._cache_settings import float_dtype
from attncore._inspect import _require_known
from attncore._types import Array, AttendOptions, Floats, Ints, Layout

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CacheMemory(NamedTuple):
    """In bytes: the address space of a cache, and what its tokens (or pages in use) take of it."""

    reserved: int
    used: int


class Cache(SavedCache):
    """What both caches can do."""

    _positional: int  # so many of the settings are positional arguments

    def append(
        self,
        key: Array,
        value: Array | None = None,
        *,
        entries: int | Ints | None = None,
        lengths: int | Ints | None = None,
        positions: Ints | None = None,
        layout: Layout = "bhsd",
    ) -> None:
        """Appends new tokens to entries.

        Args:
            key: (entries, kv_heads, tokens, dim), or (kv_heads, tokens, dim) for one entry;
                float32, float64, float16 or bfloat16, any strides.  It is rounded to the cache's
                dtype (by way of float32, for caches of float64 in float64).
            value: (entries, kv_heads, tokens, value_dim), or without the first axis.  A cache with
                value_in_key is given none.
            entries: Which, each once, in the order of key's first axis; default: all that there
                are, by their numbers.
            lengths: Ints (entries,): tokens past them are not appended.
            positions: Ints (tokens,) or (entries, tokens), for a cache with `rotary`: what keys are
                rotated by; a ValueError without.  Default: the entry's length, its length + 1, …
            layout: "bhsd", or "bshd" for key and value as (entries, tokens, kv_heads, dim).

        Raises:
            ValueError: A shape or value does not fit; or what is appended has a NaN or an infinity
                (after rounding to float32), and the cache is quantised.
            TypeError: A type or dtype does not fit.
            MemoryError: There is no room: an entry of a `KVCache` would exceed its capacity, a
                `PagedKVCache` needs more pages than are free.
            RuntimeError: Another thread is in the cache.

            Whatever is raised, every entry is as it was.

        Example:
            >>> import numpy as np, attncore
            >>> cache = attncore.KVCache(2, 1, 4, capacity=8)
            >>> cache.append(np.ones((2, 1, 3, 4)), np.ones((2, 1, 3, 4)), lengths=[3, 1])
            >>> cache.lengths
            array([3, 1])
        """
        self._core.append(key, value, entries, lengths, positions, layout)

    @overload
    def attend(
        self,
        query: Array,
        *,
        entries: int | Ints | None = ...,
        rotate_query: bool = ...,
        out: Array | None = ...,
        return_lse: Literal[False] = ...,
        **options: Unpack[AttendOptions],
    ) -> Array: ...
    @overload
    def attend(
        self,
        query: Array,
        *,
        entries: int | Ints | None = ...,
        rotate_query: bool = ...,
        out: Array | None = ...,
        return_lse: Literal[True],
        **options: Unpack[AttendOptions],
    ) -> tuple[Array, Floats]: ...
    def attend(
        self,
        query: Array,
        *,
        entries: int | Ints | None = None,
        rotate_query: bool = False,
        out: Array | None = None,
        return_lse: bool = False,
        **options: Unpack[AttendOptions],
    ) -> Array | tuple[Array, Floats]:
        """Attention of queries to all tokens of their entries, as `attention` computes it.

        The last query stands at the last token: the usual step appends keys and values of new
        tokens, then attends with their queries.  An entry with fewer tokens than queries has none
        for the first of these, whose result is 0.  For float caches the bits are those of
        `attention` on the entry's keys and values as they are stored.

        Args:
            query: (entries, heads, tokens, dim), or (heads, tokens, dim) for one entry; heads is a
                multiple of kv_heads.  float32, float16 or bfloat16 for caches of all dtypes but
                float64, which goes with float64.
            entries: Which, in the order of query's first axis; default: all that there are.
            rotate_query: Rotate queries too, by the positions of their tokens (in a tree: by their
                depth), as `append` has rotated keys by default.  Else they must have been, by
                ``rope(query, positions, rotary=...)``.
            out: Where to write the result.
            return_lse: Return (out, lse), as `attention` does.
            options: Those of `attention`: causal (but its default is True here; for keys of another
                sequence, as of an encoder, it must be False), window (a pair; cut to the cache's),
                mask, bias, alibi, relative_bias, softcap, sinks, scale,
                query_lengths (the number of new tokens of each entry), tree_parents (the new tokens
                form a tree: not together with windows), layout, precision (of float32 caches) and
                num_threads.  Masks and biases broadcast to (entries, heads, tokens, length of the
                longest of these entries).  Not query_offset, key_lengths and segments, which are
                the cache's.

        Returns:
            out, (entries, heads, tokens, value_dim) in query's dtype and rank; or (out, lse).

        Raises:
            ValueError: A shape or value does not fit; or a query would see tokens whose pages were
                given back.
            TypeError: A type, dtype or name does not fit.
            MemoryError: There is no memory for the workspace.
            RuntimeError: Another thread changes the cache.

        Example:
            >>> import numpy as np, attncore
            >>> cache = attncore.KVCache(1, 2, 4, capacity=8)
            >>> key, value = np.ones((2, 1, 2, 5, 4), np.float32)
            >>> cache.append(key, value)
            >>> cache.attend(np.ones((1, 8, 1, 4), np.float32)).shape
            (1, 8, 1, 4)
        """
        _require_known("attend", options, AttendOptions)
        return self._core.attend(
            query, entries, out, return_lse, rotate_query, {"causal": True, **options}
        )

    def truncate(self, lengths: int | Ints, *, entries: int | Ints | None = None) -> None:
        """Forgets tokens from `lengths` on: what speculative decoding rejects.

        Args:
            lengths: How many tokens are left, for all or for each entry: 0 … its length.
            entries: Which, each once; default: all that there are.

        Raises:
            ValueError: An entry has fewer tokens; or pages that what is left would need were given
                back (a `PagedKVCache` with a window).
            TypeError: A type or dtype does not fit.
            RuntimeError: Another thread is in the cache.

        Example:
            >>> import numpy as np, attncore
            >>> cache = attncore.KVCache(2, 1, 4, capacity=8)
            >>> cache.append(np.ones((2, 1, 3, 4)), np.ones((2, 1, 3, 4)))
            >>> cache.truncate([2, 0])
            >>> cache.lengths
            array([2, 0])
        """
        self._core.truncate(lengths, entries)

    def accept(
        self,
        branch: Ints | Sequence[Sequence[int]],
        new_tokens: int | Ints,
        *,
        entries: int | Ints | None = None,
    ) -> None:
        """Keeps one branch of the last tokens: what speculative decoding accepts of a tree.

        The tokens of the branch move up behind those before the new ones, as they are stored
        (rotated by the positions that they were appended with); the others are forgotten.

        Args:
            branch: Ints (entries, tokens), or (tokens,) for all entries: numbers among the new
                tokens, as in `tree_parents`, each greater than the one before; −1 ends a branch.
            new_tokens: How many of the last tokens are new, for all or for each entry.
            entries: Which, each once; default: all that there are.

        Raises:
            ValueError: A shape or value does not fit; or pages that what is left would need were
                given back (a `PagedKVCache` with a window).
            TypeError: A type or dtype does not fit.
            MemoryError: Tokens would move in pages that other entries share, and too few pages are
                free for copies; all entries are as they were.
            RuntimeError: Another thread is in the cache.

        Example:
            >>> import numpy as np, attncore
            >>> cache = attncore.KVCache(1, 1, 1, capacity=8)
            >>> tokens = np.arange(7.0).reshape(1, 1, 7, 1)
            >>> cache.append(tokens, tokens)  # two tokens, then a tree of five
            >>> cache.accept([0, 2, 4], 5)
            >>> cache.gather(0)[0].ravel()
            array([0., 1., 2., 4., 6.], dtype=float32)
        """
        self._core.accept(branch, new_tokens, entries)

    def gather(self, entry: int) -> tuple[Array, Array]:
        """A copy of an entry's tokens as the cache has them: rotated, rounded.

        Args:
            entry: Its number.

        Returns:
            key (kv_heads, tokens, dim) and value (kv_heads, tokens, value_dim), in the cache's
            dtype, or in float32 if that is quantised; tokens whose pages were given back are
            missing at the front.  With value_in_key, value is a view of key.

        Raises:
            ValueError: There is no such entry.
            TypeError: It is no int.
            RuntimeError: Another thread changes the cache.

        Example:
            >>> import numpy as np, attncore
            >>> cache = attncore.KVCache(1, 1, 2, capacity=8, dtype="int8")
            >>> cache.append(np.array([[[[1.0, 0.3]]]]), np.zeros((1, 1, 1, 2)))
            >>> cache.gather(0)[0].round(3)
            array([[[1.   , 0.299]]], dtype=float32)
        """
        return self._core.gather(entry, float_dtype(self.dtype))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The tokens of each entry, by its number: a copy; −1 for numbers that are free."""
        return self._core.lengths()

    def memory(self) -> CacheMemory:
        """How much address space is reserved, and how much of it is in use, in bytes.

        Example:
            >>> import attncore
            >>> attncore.KVCache(1, 2, 4, capacity=8, dtype="float16").memory().used
            0
        """
        return CacheMemory(*self._core.memory())

    @property
    def dtype(self) -> str:
        """The dtype of storage: "float32", "float64", "float16", "bfloat16", "int8", "int4" or
        "float8_e4m3fn"."""
        return self._settings["dtype"]

    def __repr__(self) -> str:
        settings = dict(self._settings)
        shown = [str(settings.pop(name)) for name in list(settings)[: self._positional]]
        on = {
            name: value
            for name, value in settings.items()
            if value is not None and value is not False
        }
        shown += [f"{name}={value!r}" for name, value in on.items()]
        return f"{type(self).__name__}({', '.join(shown)})"
