"""Caches in files; `Cache.load` documents the format."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attncore._checkpoint import _safetensors
from attncore._checkpoint import write as write_arrays
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
    package = _safetensors()
    content = Path(path).read_bytes()
    try:
        items = package.deserialize(content)
    except package.SafetensorError as error:
        raise ValueError(f"path: {os.fspath(path)} is no safetensors file: {error}") from None
    arrays = {}
    for name, item in items:
        if item["dtype"] not in _DTYPES:
            raise ValueError(f"path: {os.fspath(path)}: {name} is of {item['dtype']}")
        arrays[name] = np.frombuffer(item["data"], _DTYPES[item["dtype"]]).reshape(item["shape"])
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return arrays, header.get("__metadata__", {})
