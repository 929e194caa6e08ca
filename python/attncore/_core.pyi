"""The C++ core; `attncore` documents it."""

from typing import Any

import numpy as np
import numpy.typing as npt

def attention(
    query: npt.NDArray[Any],
    key: npt.NDArray[Any],
    value: npt.NDArray[Any],
    out: npt.NDArray[Any] | None,
    return_lse: bool,
    /,
    *options: Any,
) -> Any: ...
def attention_weights(
    query: npt.NDArray[Any],
    key: npt.NDArray[Any],
    rows: npt.NDArray[np.int64] | None,
    top_k: int | None,
    /,
    *options: Any,
) -> Any: ...
def explain(
    query: npt.NDArray[Any], key: npt.NDArray[Any], value: npt.NDArray[Any], /, *options: Any
) -> dict[str, Any]: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def use_isa(arg0: str, /) -> None: ...
def get_num_threads() -> int: ...
def set_num_threads(arg0: int, /) -> None: ...
def config() -> list[tuple[str, str]]: ...
def fma_peak(arg0: str, arg1: int, /) -> float: ...
