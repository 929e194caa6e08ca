"""What both caches can do."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from attncore import _cache_file
from attncore._cache_settings import float_dtype
from attncore._inspect import _require_known
from attncore._types import Array, AttendOptions, Floats, Ints, Layout, Rotary

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CacheMemory(NamedTuple):
    """In bytes: the address space of a cache, and what its tokens (or pages in use) take of it."""

    reserved: int
    used: int


class Cache:
    """What both caches can do."""

    _core: Any
    _settings: dict[str, Any]  # every default in place
    _kind: str  # in files
    _positional: int  # so many of them are positional arguments
    _room: tuple[str, ...]  # those that may differ between a file and the cache that loads it

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
        out: Array | None = ...,
        return_lse: Literal[True],
        **options: Unpack[AttendOptions],
    ) -> tuple[Array, Floats]: ...
    def attend(
        self,
        query: Array,
        *,
        entries: int | Ints | None = None,
        out: Array | None = None,
        return_lse: bool = False,
        **options: Unpack[AttendOptions],
    ) -> Array | tuple[Array, Floats]:
        """Attention of queries to all tokens of their entries, as `attention` computes it.

        The last query stands at the last token: the usual step appends keys and values of new
        tokens, then attends with their queries.  (A cache with `rotary` rotates keys alone: rotate
        queries by the same positions, with `rope`.)  For float caches the bits are those of
        `attention` on the entry's keys and values as they are stored.

        Args:
            query: (entries, heads, tokens, dim), or (heads, tokens, dim) for one entry; heads is a
                multiple of kv_heads.  float32, float16 or bfloat16 for caches of all dtypes but
                float64, which goes with float64.
            entries: Which, in the order of query's first axis; default: all that there are.
            out: Where to write the result.
            return_lse: Return (out, lse), as `attention` does.
            options: Those of `attention`: causal (but its default is True here), window (cut to the
                cache's), mask, bias, alibi, relative_bias, softcap, sinks, scale,
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
        return self._core.attend(query, entries, out, return_lse, {"causal": True, **options})

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all tokens as a safetensors file, whole or not at all; its format is in `load`.

        Args:
            path: The file, which is replaced if it is there.

        Raises:
            ImportError: The package safetensors is not installed: attncore[layers].
            RuntimeError: Another thread changes the cache.
        """
        _cache_file.write(path, self._kind, self._file_settings(), self._core.state())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replaces all that the cache holds by what `save` wrote.

        The cache must have the file's settings; capacity and the number of pages may differ, if
        there is room.  The file's metadata is "attncore" ("KVCache" or "PagedKVCache"), "version"
        ("1") and "settings" (JSON).  Its arrays:

        - key (kv_heads, tokens, dim) and value: the tokens of entry 0, then those of entry 1, …; of
          a paged cache the filled slots of page 0, of page 1, … (numbered without the free ones).
          float32, float64, float16 and int8 are stored as such, bfloat16 as the bits in uint16,
          float8_e4m3fn as those in uint8, int4 as pairs in uint8, the first in the low half.
        - key_scale, value_scale (kv_heads, tokens): float32, for int8, int4 and float8_e4m3fn; a
          number is the stored one times its scale.  With value_in_key neither value nor value_scale.
        - lengths (entries,): int64; −1 for numbers that are free.
        - For a paged cache page_lengths (pages,), the filled slots of each page; tables, the pages
          of each entry, one entry after another, −1 where a window has given them back; given_back
          (entries,), how many those are.

        Raises:
            ImportError: The package safetensors is not installed: attncore[layers].
            ValueError: It is no such file, or the settings differ; the cache is as it was.
            MemoryError: There is no room; the cache is as it was.
            RuntimeError: Another thread is in the cache.

        Example:
            >>> import attncore
            >>> cache = attncore.KVCache(1, 1, 4, capacity=8)
            >>> cache.save("cache.safetensors")  # doctest: +SKIP
            >>> cache.load("cache.safetensors")  # doctest: +SKIP
        """
        self._core.restore(_cache_file.read(path, self._kind, self._file_settings()))

    def _file_settings(self) -> dict[str, Any]:
        """What must be the same in a file and in the cache that loads it."""
        rotary: Rotary | None = self._settings["rotary"]
        same = {name: value for name, value in self._settings.items() if name not in self._room}
        return same | {"rotary": None if rotary is None else asdict(rotary)}

    def __reduce__(self) -> Any:
        raise TypeError(f"a {self._kind} is not copied or pickled; save and load go through a file")

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
