"""Named arrays in files, by the package safetensors."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attncore._types import Array

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "I64": "int64"}


def _safetensors() -> Any:
    try:
        import safetensors.numpy  # noqa: PLC0415  (optional)
    except ImportError:
        raise ImportError(
            "saving and loading need the package safetensors: pip install 'attncore[layers]'"
        ) from None
    return safetensors


def write(
    path: str | os.PathLike[str],
    arrays: Mapping[str, Array],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """The file is there with all of its content, or as it was before: also after a power cut.

    A link stays, and what it names is written.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise ValueError(f"path: {os.fspath(path)!r} is no regular file, and cannot be replaced")
    content = _safetensors().numpy.save(dict(arrays), None if metadata is None else dict(metadata))
    fresh = target.parent / f".{target.name[:32]}.{secrets.token_hex(8)}"
    try:
        mode = None
        with contextlib.suppress(OSError):
            mode = stat.S_IMODE(target.stat().st_mode)  # open() would have left it
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(fresh, flags, 0o666 if mode is None else 0o600), "wb") as file:
            if mode is not None:
                fresh.chmod(mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(target)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


class Arrays(Mapping[str, Array]):
    """The arrays of a file, each made when it is asked for: others' dtypes don't matter."""

    def __init__(self, items: list[tuple[str, Mapping[str, Any]]]) -> None:
        self._items = dict(items)

    def __getitem__(self, name: str) -> Array:
        return _array(name, self._items[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def read(path: str | os.PathLike[str]) -> tuple[Arrays, dict[str, str]]:
    """A file's arrays, of which bfloat16 needs ml_dtypes, and the metadata that `write` was given."""
    items, metadata = unpack(path)
    return Arrays(items), metadata


def unpack(
    path: str | os.PathLike[str],
) -> tuple[list[tuple[str, Mapping[str, Any]]], dict[str, str]]:
    """Names with dtype, shape and data, as they stand in a file; and its metadata."""
    package = _safetensors()
    content = Path(path).read_bytes()
    try:
        items = package.deserialize(content)
    except package.SafetensorError as error:
        raise ValueError(f"path: {os.fspath(path)} is no safetensors file: {error}") from None
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return items, header.get("__metadata__", {})


def _array(name: str, item: Mapping[str, Any]) -> Array:
    if item["dtype"] == "BF16":
        import ml_dtypes  # noqa: PLC0415  (optional)

        dtype = np.dtype(ml_dtypes.bfloat16)
    elif item["dtype"] in _DTYPES:
        dtype = np.dtype(_DTYPES[item["dtype"]])
    else:
        raise TypeError(
            f"{name}: dtype is {item['dtype']}, accepted is float32, float64, float16 or bfloat16"
        )
    return np.frombuffer(item["data"], dtype).reshape(item["shape"])
