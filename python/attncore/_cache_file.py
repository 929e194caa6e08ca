"""Caches in files; `Cache.load` documents the format."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from attncore._checkpoint import unpack
from attncore._checkpoint import write as write_arrays
from attncore._rotary import Rotary, in_file
from attncore._types import Array

_VERSION = "1"
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "U16": np.uint16,
    "U8": np.uint8,
    "I8": np.int8,
    "I64": np.int64,
}


def write(
    path: str | os.PathLike[str], kind: str, settings: Mapping[str, Any], state: Mapping[str, Array]
) -> None:
    metadata = {"attncore": kind, "version": _VERSION, "settings": json.dumps(settings)}
    write_arrays(path, state, metadata)


def read(path: str | os.PathLike[str], kind: str, settings: Mapping[str, Any]) -> dict[str, Array]:
    """The arrays of a file that was written by the same kind of cache with the same settings."""
    arrays, metadata = _read(path)
    where = os.fspath(path)
    if metadata.get("attncore") != kind or metadata.get("version") != _VERSION:
        raise ValueError(f"path: {where} is no {kind} of version {_VERSION}")
    try:
        theirs = json.loads(metadata["settings"])
        different = [name for name in settings if theirs.get(name) != settings[name]]
    except (KeyError, ValueError, AttributeError):
        raise ValueError(f"path: {where} has no settings") from None
    if different:
        what = ", ".join(f"{n}={theirs.get(n)!r}, not {settings[n]!r}" for n in different)
        raise ValueError(f"path: {where} has {what}")
    for name, dtype, ndim in _expected(kind, settings):
        array = arrays.get(name)
        if array is None:
            raise ValueError(f"path: {where} has no {name}")
        if array.dtype != dtype or array.ndim != ndim:
            raise ValueError(
                f"path: {where}: {name} is {array.ndim}-D of {array.dtype}, must be {ndim}-D of {dtype}"
            )
    return arrays


def _expected(kind: str, settings: Mapping[str, Any]) -> list[tuple[str, np.dtype[Any], int]]:
    """The arrays of a file: name, dtype, number of axes."""
    storage: str = settings["dtype"]
    bits = {"bfloat16": "uint16", "int4": "uint8", "float8_e4m3fn": "uint8"}.get(storage, storage)
    stored = ("key",) if settings["value_in_key"] else ("key", "value")
    arrays = [(name, np.dtype(bits), 3) for name in stored]
    if storage in ("int8", "int4", "float8_e4m3fn"):
        arrays += [(f"{name}_scale", np.dtype(np.float32), 2) for name in stored]
    names = ["lengths"]
    if kind == "PagedKVCache":
        names += ["page_lengths", "tables", "given_back"]
    return arrays + [(name, np.dtype(np.int64), 1) for name in names]


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Array], dict[str, str]]:
    items, metadata = unpack(path)
    arrays = {}
    for name, item in items:
        if item["dtype"] not in _DTYPES:
            raise ValueError(f"path: {os.fspath(path)}: {name} is of {item['dtype']}")
        arrays[name] = np.frombuffer(item["data"], _DTYPES[item["dtype"]]).reshape(item["shape"])
    return arrays, metadata


class SavedCache:
    """What caches have to do with files."""

    _core: Any
    _settings: dict[str, Any]  # every default in place
    _kind: str  # in files
    _room: tuple[str, ...]  # settings that may differ between a file and the cache that loads it

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all tokens as a safetensors file, whole or not at all; its format is in `load`.

        Args:
            path: The file, which is replaced if it is there.

        Raises:
            ImportError: The package safetensors is not installed: attncore[layers].
            RuntimeError: Another thread changes the cache.
        """
        write(path, self._kind, self._file_settings(), self._core.state())

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
        self._core.restore(read(path, self._kind, self._file_settings()))

    def _file_settings(self) -> dict[str, Any]:
        """What must be the same in a file and in the cache that loads it."""
        rotary: Rotary | None = self._settings["rotary"]
        same = {name: value for name, value in self._settings.items() if name not in self._room}
        return same | {"rotary": None if rotary is None else in_file(rotary)}

    def __reduce__(self) -> Any:
        raise TypeError(f"a {self._kind} is not copied or pickled; save and load go through a file")
