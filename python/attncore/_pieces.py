"""What AttentionState keeps of its options, and the files that pieces lie in."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt

from attncore._types import Array, RelativeBias, ScoreOptions

_FLOATS = ("alibi", "sinks", "relative_bias")
_INTS = ("query_offset", "query_segments", "query_lengths")


def shown(option: Any) -> str:
    """An option in a repr."""
    if isinstance(option, np.ndarray):
        return f"<{option.dtype} {option.shape}>"
    return str(option) if not isinstance(option, str) else repr(option)


def in_dtype(option: Any, query: Any, dtype: np.dtype[Any]) -> Any:
    """Slopes, sinks or a table in query's dtype become those of the state's."""
    theirs = isinstance(option, np.ndarray) and option.dtype == getattr(query, "dtype", None)
    return option.astype(dtype) if theirs and dtype in (np.float32, np.float64) else option


def bias_in_dtype(relative_bias: Any, query: Any, dtype: np.dtype[Any]) -> Any:
    """The same of a relative bias's table; a tuple becomes a RelativeBias."""
    if not (isinstance(relative_bias, tuple) and len(relative_bias) == 3):
        return relative_bias
    return RelativeBias(in_dtype(relative_bias[0], query, dtype), *relative_bias[1:])


def kept(options: ScoreOptions) -> dict[str, Any]:
    """Copies of valid options, to be saved: the caller's arrays may change."""
    own: dict[str, Any] = dict(options)
    for name in _FLOATS:
        option = own[name]
        if isinstance(option, RelativeBias):
            own[name] = RelativeBias(
                _copy(option.table, np.float32),
                bool(option.bidirectional),
                int(option.max_distance),
            )
        elif option is not None:
            own[name] = _copy(option, np.float32)
    for name in _INTS:
        if own[name] is not None:
            own[name] = np.array(own[name], np.int64, order="C")
    for name in ("softcap", "scale"):
        if own[name] is not None:
            own[name] = float(own[name])
    if own["window"] is not None:
        own["window"] = tuple(None if end is None else int(end) for end in own["window"])
    own["causal"] = bool(own["causal"])
    return own


def _copy(given: Any, dtype: npt.DTypeLike) -> Array:
    """An array's copy; what is no array becomes one of the dtype."""
    return np.array(given, None if isinstance(given, np.ndarray) else dtype, order="C")


def mapping(array: Any) -> npt.NDArray[np.uint8] | None:
    """The bytes of the mapped file that an array lies in, if its pages may be given back."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            # Private pages that were written exist nowhere else.
            mapped = getattr(array, "_mmap", None)
            shared = array.mode in ("r", "r+", "w+")
            return np.frombuffer(mapped, np.uint8) if mapped is not None and shared else None
        array = cast("Any", array.base)
    return None
