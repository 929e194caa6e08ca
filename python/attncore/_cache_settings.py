"""The settings of caches: checked, named, as the core takes them."""

from __future__ import annotations

import contextlib
from typing import Any, Literal, TypeAlias

import numpy as np

from attncore._rotary import Rotary, fields_of, plain_rotary, rotary_of

CacheDType: TypeAlias = Literal[
    "float32", "float64", "float16", "bfloat16", "int8", "int4", "float8_e4m3", "float8_e4m3fn"
]
_FLOATS = ("float32", "float64", "float16", "bfloat16")
_DTYPES = (*_FLOATS, "int8", "int4", "float8_e4m3fn")
_NO_INTS = ("value_in_key", "dtype", "rotary")


def storage_name(dtype: Any) -> str:
    """The name of a dtype of storage, given by name, as a NumPy dtype or a scalar type."""
    if isinstance(dtype, str):  # ml_dtypes' float8_e4m3 is another format
        name = "float8_e4m3fn" if dtype == "float8_e4m3" else dtype
    else:
        name = repr(dtype)
        if dtype is not None:
            with contextlib.suppress(TypeError):
                kind = np.dtype(dtype)
                name = kind.name if kind.isnative else kind.str
    if name not in _DTYPES:
        raise TypeError(f"dtype: is {name}, accepted is {', '.join(_DTYPES)}")
    return name


def float_dtype(storage: str) -> np.dtype[Any]:
    """What `gather` returns."""
    if storage == "bfloat16":
        import ml_dtypes  # noqa: PLC0415  (optional)

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(storage if storage in _FLOATS else np.float32)


def shared_settings(
    value_dim: int | None,
    value_in_key: bool,
    dtype: Any,
    rotary: Rotary | bool | None,
    window: int | None,
) -> dict[str, Any]:
    """The settings that both caches have."""
    return {
        "value_dim": value_dim,
        "value_in_key": value_in_key,
        "dtype": storage_name(dtype),
        "rotary": rotary_of(rotary),
        "window": window,
    }


def for_core(shared: dict[str, Any]) -> tuple[Any, ...]:
    rotary: Rotary | None = shared["rotary"]
    fields = None if rotary is None else fields_of(rotary)
    return tuple((shared | {"rotary": fields}).values())


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """With every default in place, and Python's ints and bools."""
    value_dim = settings["dim"] if settings["value_dim"] is None else settings["value_dim"]
    rotary: Rotary | None = settings["rotary"]
    settings |= {"value_dim": value_dim, "value_in_key": bool(settings["value_in_key"])}
    settings |= {"rotary": None if rotary is None else plain_rotary(rotary)}
    return {n: v if v is None or n in _NO_INTS else int(v) for n, v in settings.items()}
