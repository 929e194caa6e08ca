"""Named arrays in files, by the package safetensors."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
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
    """The file is there with all of its content, or as it was before: also after a power cut."""
    content = _safetensors().numpy.save(dict(arrays), None if metadata is None else dict(metadata))
    target = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{target.name[:32]}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(_mode(target))
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _mode(target: Path) -> int:
    """As open() would have left or made it."""
    with contextlib.suppress(OSError):
        return stat.S_IMODE(target.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


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


def read(path: str | os.PathLike[str]) -> Arrays:
    """The arrays of a file; bfloat16 needs ml_dtypes."""
    package = _safetensors()
    try:
        items = package.deserialize(Path(path).read_bytes())
    except package.SafetensorError as error:
        raise ValueError(f"path: {os.fspath(path)} is no safetensors file: {error}") from None
    return Arrays(items)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata that `write` was given, of a file that `read` takes."""
    with _safetensors().safe_open(path, "np") as file:
        return file.metadata() or {}


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
