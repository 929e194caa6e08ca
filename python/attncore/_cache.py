"""Keys and values of the tokens so far: what generation attends to."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from attncore import _core
from attncore._cache_base import Cache
from attncore._cache_settings import CacheDType, for_core, plain, shared_settings
from attncore._rotary import Rotary


class KVCache(Cache):
    """Keys and values of one layer, in one contiguous buffer each: (entry, kv_head, token, dim).

    Entries are numbered 0 … batch − 1 and begin empty.  `append` adds tokens, `attend` is attention
    to all of them, `truncate` takes tokens back.  Nothing is ever copied to make room: address space
    for `capacity` tokens an entry is reserved at once, and becomes memory where tokens are written
    (in huge pages, where the system has them and they would be at least half full).  What was
    written stays with the cache, for the next tokens.

    int8, int4 and float8_e4m3fn ("float8_e4m3" is the same) store a float32 scale for each token
    and head beside the numbers: max|x| / 127, / 7 and / 448 (1 where all are 0, and at least
    2⁻¹²⁶); numbers are rounded to nearest, ties to even.  A number x of float32 comes back as
    stored · scale with an error of at most scale / 2 for int8 and int4, and of |x| / 16 or scale /
    1024, whichever is more, for float8.

    Threads: any number may read a cache at once (`attend`, `gather`, `save`, …).  A call that
    changes it (`append`, `truncate`, `accept`, `load`, …) must be alone: it raises RuntimeError if
    it finds another thread in the cache, and so does every call that finds it; none waits.

    Args:
        batch: Entries.
        kv_heads: Heads of keys and values.
        dim: Width of a key.
        capacity: The most tokens of an entry.
        value_dim: Width of a value; default dim.
        value_in_key: Values are the first value_dim dims of keys (latent attention): only keys are
            appended, and stored once.
        dtype: Of storage: "float32", "float64", "float16", "bfloat16", "int8", "int4" (even widths)
            or "float8_e4m3fn".
        rotary: Rotate keys by their positions as they are appended: a `Rotary`, or True for its
            defaults.  With value_in_key, only the dims past the values are rotated, and
            `Rotary.dims` counts from there.
        window: A query sees its own key and at most so many before it.  This cache keeps all
            tokens; a `PagedKVCache` gives pages back.

    Raises:
        ValueError: A number does not fit; the message names the argument.
        TypeError: A type or dtype does not fit.
        MemoryError: There is no such address space.

    Example:
        >>> import numpy as np, attncore
        >>> rng = np.random.default_rng(0)
        >>> cache = attncore.KVCache(2, kv_heads=2, dim=16, capacity=100)
        >>> key, value = rng.standard_normal((2, 2, 2, 5, 16), dtype=np.float32)
        >>> cache.append(key, value)  # 5 tokens of each of 2 entries
        >>> query = rng.standard_normal((2, 8, 5, 16), dtype=np.float32)
        >>> out = cache.attend(query)
        >>> bool((out == attncore.attention(query, key, value, causal=True)).all())
        True
        >>> cache.lengths, cache.memory().used
        (array([5, 5]), 2560)
    """

    _kind = "KVCache"
    _positional = 3
    _room = ("capacity",)

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        dim: int,
        *,
        capacity: int,
        value_dim: int | None = None,
        value_in_key: bool = False,
        dtype: CacheDType | npt.DTypeLike = "float32",
        rotary: Rotary | bool | None = None,
        window: int | None = None,
    ) -> None:
        shared = shared_settings(value_dim, value_in_key, dtype, rotary, window)
        self._core = _core.KVCache(batch, capacity, kv_heads, dim, *for_core(shared))
        own = {"batch": batch, "kv_heads": kv_heads, "dim": dim, "capacity": capacity}
        self._settings = plain(own | shared)

    @property
    def batch(self) -> int:
        """The number of entries."""
        return self._settings["batch"]

    @property
    def capacity(self) -> int:
        """The most tokens of an entry."""
        return self._settings["capacity"]


class PagedKVCache(Cache):
    """Keys and values of one layer, in pages of a pool (Kwon et al. 2023).

    A pool has `pages` pages, each of `page_size` tokens of all heads: (page, kv_head, slot, dim).  An
    entry is a table of pages; `add` makes an empty one, `free` gives its pages back, and `fork` makes
    another one of the same tokens, which shares the pages: beams and common prompts cost no memory.
    What others have is never written to: who appends to a shared page that is partly filled gets a
    copy of it first.  (If all that share it are appended to in one call, the longest keeps it.)

    The pool is reserved as address space, and becomes memory where tokens are written.  A call that
    would need more pages than are free raises MemoryError, and leaves every entry as it was.

    With a window, `append` gives pages back to the pool once no query from the first new token on
    sees any token of theirs.  Appending n tokens at a time, an entry has at most
    ⌈(window + 2n) / page_size⌉ + 1 pages.  `truncate` can then only go back as far as all tokens that
    a query would see are still there: at least to where the last append began.

    What dtypes store, and what threads may do, is as in `KVCache`.

    Args:
        pages: Of the pool.
        page_size: Tokens of a page, at least 1.
        kv_heads: Heads of keys and values.
        dim: Width of a key.
        value_dim: Width of a value; default dim.
        value_in_key: Values are the first value_dim dims of keys, as in `KVCache`.
        dtype: Of storage, as in `KVCache`.
        rotary: Rotate keys by their positions as they are appended, as in `KVCache`.
        window: A query sees its own key and at most so many before it.

    Raises:
        ValueError: A number does not fit; the message names the argument.
        TypeError: A type or dtype does not fit.
        MemoryError: There is no such address space.

    Example:
        >>> import numpy as np, attncore
        >>> rng = np.random.default_rng(0)
        >>> cache = attncore.PagedKVCache(100, page_size=16, kv_heads=2, dim=8)
        >>> prompt, other = cache.add(), cache.add()
        >>> key, value = rng.standard_normal((2, 2, 40, 8), dtype=np.float32)
        >>> cache.append(key, value, entries=prompt)
        >>> best = [cache.fork(prompt) for _ in range(3)]
        >>> cache.pages - cache.free_pages  # all four share them
        3
        >>> step = rng.standard_normal((3, 2, 1, 8), dtype=np.float32)
        >>> cache.append(step, step, entries=best)
        >>> cache.attend(rng.standard_normal((3, 4, 1, 8), dtype=np.float32), entries=best).shape
        (3, 4, 1, 8)
        >>> for entry in best[1:]:
        ...     cache.free(entry)
        >>> cache.entries, cache.lengths
        ([0, 1, 2], array([40,  0, 41, -1, -1]))
    """

    _kind = "PagedKVCache"
    _positional = 4
    _room = ("pages",)

    def __init__(
        self,
        pages: int,
        page_size: int,
        kv_heads: int,
        dim: int,
        *,
        value_dim: int | None = None,
        value_in_key: bool = False,
        dtype: CacheDType | npt.DTypeLike = "float32",
        rotary: Rotary | bool | None = None,
        window: int | None = None,
    ) -> None:
        shared = shared_settings(value_dim, value_in_key, dtype, rotary, window)
        self._core = _core.PagedKVCache(pages, page_size, kv_heads, dim, *for_core(shared))
        own = {"pages": pages, "page_size": page_size, "kv_heads": kv_heads, "dim": dim}
        self._settings = plain(own | shared)

    def add(self) -> int:
        """Makes a new entry, without tokens: its number, the smallest that is free.

        Raises:
            RuntimeError: Another thread is in the cache.
        """
        return self._core.add()

    def fork(self, entry: int) -> int:
        """Makes a new entry of the same tokens, which shares their pages: its number.

        Raises:
            ValueError: There is no such entry.
            RuntimeError: Another thread is in the cache.

        Example:
            >>> import numpy as np, attncore
            >>> cache = attncore.PagedKVCache(4, page_size=2, kv_heads=1, dim=4)
            >>> prompt = cache.add()
            >>> cache.append(np.ones((1, 1, 3, 4)), np.ones((1, 1, 3, 4)))
            >>> beam = cache.fork(prompt)
            >>> cache.reference_counts().tolist(), cache.block_table(beam).tolist()
            ([2, 2, 0, 0], [0, 1])
            >>> cache.free(prompt)
            >>> cache.entries, cache.free_pages
            ([1], 2)
        """
        return self._core.fork(entry)

    def free(self, entry: int) -> None:
        """Ends an entry: its number is free, and so are its pages, but those that others share.

        Raises:
            ValueError: There is no such entry.
            RuntimeError: Another thread is in the cache.
        """
        self._core.free(entry)

    @property
    def pages(self) -> int:
        """The number of pages of the pool."""
        return self._settings["pages"]

    @property
    def page_size(self) -> int:
        """The tokens of a page."""
        return self._settings["page_size"]

    @property
    def free_pages(self) -> int:
        """How many pages no entry has."""
        return self._core.free_pages()

    @property
    def entries(self) -> list[int]:
        """The numbers of the entries, rising."""
        return self._core.entries().tolist()

    def block_table(self, entry: int) -> npt.NDArray[np.int64]:
        """A copy of an entry's table: token t is in slot t mod page_size of page
        table[t // page_size]; −1 for pages that were given back.

        Raises:
            ValueError: There is no such entry.
        """
        return self._core.block_table(entry)

    def reference_counts(self) -> npt.NDArray[np.int64]:
        """How many entries have each page, (pages,); 0: it is free."""
        return self._core.reference_counts()
