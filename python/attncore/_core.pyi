"""The C++ core; `attncore` documents it."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

_Rotary: TypeAlias = tuple[float, int | None, bool, tuple[float, ...] | None, float]

def attention(
    query: npt.NDArray[Any],
    key: npt.NDArray[Any],
    value: npt.NDArray[Any],
    out: npt.NDArray[Any] | None,
    return_lse: bool,
    options: Mapping[str, Any],
    /,
) -> Any: ...
def attention_weights(
    query: npt.NDArray[Any],
    key: npt.NDArray[Any],
    rows: npt.NDArray[np.int64] | None,
    top_k: int | None,
    options: Mapping[str, Any],
    /,
) -> Any: ...
def attention_backward(
    query: npt.NDArray[Any],
    key: npt.NDArray[Any],
    value: npt.NDArray[Any],
    out: npt.NDArray[Any],
    lse: npt.NDArray[Any],
    d_out: npt.NDArray[Any],
    d_lse: npt.NDArray[Any] | None,
    results: tuple[Any, ...],
    options: Mapping[str, Any],
    /,
) -> None: ...
def attention_paged(
    query: npt.NDArray[Any],
    pools: tuple[Any, ...],
    block_table: Any,
    page_layout: str,
    cu_query_lengths: Any,
    out: npt.NDArray[Any] | None,
    return_lse: bool,
    options: Mapping[str, Any],
    /,
) -> Any: ...
def attention_varlen(
    query: npt.NDArray[Any],
    key: npt.NDArray[Any],
    value: npt.NDArray[Any],
    cu_query_lengths: Any,
    cu_key_lengths: Any,
    out: npt.NDArray[Any] | None,
    return_lse: bool,
    options: Mapping[str, Any],
    /,
) -> Any: ...
def attention_varlen_backward(
    query: npt.NDArray[Any],
    key: npt.NDArray[Any],
    value: npt.NDArray[Any],
    cu_query_lengths: Any,
    cu_key_lengths: Any,
    out: npt.NDArray[Any],
    lse: npt.NDArray[Any],
    d_out: npt.NDArray[Any],
    d_lse: npt.NDArray[Any] | None,
    results: tuple[Any, ...],
    options: Mapping[str, Any],
    /,
) -> None: ...
def append_paged(
    tokens: tuple[Any, ...],
    pools: tuple[Any, ...],
    block_table: Any,
    key_lengths: Any,
    lengths: Any,
    cu_lengths: Any,
    layout: str,
    page_layout: str,
    /,
) -> None: ...
def dropout_mask(
    arg0: int,
    arg1: float,
    arg2: npt.NDArray[np.int64] | None,
    arg3: npt.NDArray[np.bool_],
    /,
) -> None: ...
def explain(
    query: npt.NDArray[Any],
    key: npt.NDArray[Any],
    value: npt.NDArray[Any],
    options: Mapping[str, Any],
    /,
) -> dict[str, Any]: ...
def attention_weights_varlen(
    query: npt.NDArray[Any],
    key: npt.NDArray[Any],
    cu_query_lengths: Any,
    cu_key_lengths: Any,
    longest: tuple[int, int],
    rows: npt.NDArray[np.int64] | None,
    top_k: int | None,
    options: Mapping[str, Any],
    /,
) -> Any: ...
def explain_varlen(
    query: npt.NDArray[Any],
    key: npt.NDArray[Any],
    value: npt.NDArray[Any],
    cu_query_lengths: Any,
    cu_key_lengths: Any,
    options: Mapping[str, Any],
    /,
) -> dict[str, Any]: ...
def explain_paged(
    query: npt.NDArray[Any],
    pools: tuple[Any, ...],
    block_table: Any,
    page_layout: str,
    cu_query_lengths: Any,
    options: Mapping[str, Any],
    /,
) -> dict[str, Any]: ...
def linear(
    x: npt.NDArray[Any],
    weight: npt.NDArray[Any],
    bias: npt.NDArray[Any] | None,
    out: npt.NDArray[Any] | None,
    num_threads: int | None,
    /,
) -> npt.NDArray[Any]: ...
def linear_backward(
    d_y: npt.NDArray[Any],
    x: npt.NDArray[Any],
    weight: npt.NDArray[Any],
    wanted: tuple[bool, ...],
    into: tuple[npt.NDArray[Any] | None, ...],
    num_threads: int | None,
    /,
) -> tuple[Any, Any, Any]: ...
def rope(
    x: npt.NDArray[Any],
    positions: Any,
    rotary: _Rotary,
    inverse: bool,
    layout: str,
    out: npt.NDArray[Any] | None,
    num_threads: int | None,
    /,
) -> npt.NDArray[Any]: ...

class Activations:
    def __init__(self) -> None: ...
    @property
    def bytes(self) -> int: ...

class MultiHeadAttention:
    def __init__(
        self,
        sizes: tuple[Any, ...],
        bias: bool,
        add_bias_kv: bool,
        add_zero_attn: bool,
        rotary: _Rotary | None,
        qk_norm: float | None,
        dtype: np.dtype[Any],
        seed: int,
        batch_first: bool,
        /,
    ) -> None: ...
    def parameters(self) -> list[tuple[str, npt.NDArray[Any], npt.NDArray[Any]]]: ...
    def forward(
        self,
        given: tuple[Any, ...],
        keep: bool,
        own: Activations | None,
        weights_by_head: bool | None,
        options: Mapping[str, Any],
        /,
    ) -> Any: ...
    def kept_options(self, own: Activations | None, /) -> dict[str, Any]: ...
    def backward(
        self,
        d_y: npt.NDArray[Any],
        wanted: tuple[bool, ...],
        options: tuple[Any, ...],
        accumulate: bool,
        own: Activations | None,
        num_threads: int | None,
        /,
    ) -> tuple[Any, Any, Any, int]: ...
    def in_proj(
        self, given: tuple[Any, ...], wanted: tuple[bool, ...], num_threads: int | None, /
    ) -> tuple[Any, Any, Any]: ...
    def out_proj(self, out: npt.NDArray[Any], num_threads: int | None, /) -> npt.NDArray[Any]: ...
    def forget(self) -> None: ...

class AttentionState:
    def __init__(
        self,
        query: npt.NDArray[Any],
        dtype: np.dtype[Any],
        value_dim: int | None,
        options: Mapping[str, Any],
        /,
    ) -> None: ...
    def update(
        self,
        arrays: tuple[Any, ...],
        first_key: Any,
        mapped: list[npt.NDArray[np.uint8]],
        options: Mapping[str, Any],
        /,
    ) -> None: ...
    def merge(self, other: AttentionState, num_threads: int | None, /) -> None: ...
    def result(self, num_threads: int | None, /) -> tuple[Any, Any]: ...
    def query(self) -> npt.NDArray[Any]: ...
    def parts(self) -> dict[str, npt.NDArray[Any]]: ...
    def set_parts(self, parts: dict[str, npt.NDArray[Any]], /) -> None: ...
    def value_dim(self) -> int: ...
    def rank(self) -> int: ...

class _Cache:
    def append(
        self,
        key: npt.NDArray[Any],
        value: npt.NDArray[Any] | None,
        entries: Any,
        lengths: Any,
        positions: Any,
        layout: str,
        /,
    ) -> None: ...
    def attend(
        self,
        query: npt.NDArray[Any],
        entries: Any,
        out: npt.NDArray[Any] | None,
        return_lse: bool,
        rotate_query: bool,
        options: Mapping[str, Any],
        /,
    ) -> Any: ...
    def truncate(self, lengths: Any, entries: Any, /) -> None: ...
    def accept(self, branch: Any, new_tokens: Any, entries: Any, /) -> None: ...
    def gather(
        self, entry: int, dtype: np.dtype[Any], /
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]: ...
    def state(self) -> dict[str, npt.NDArray[Any]]: ...
    def restore(self, arrays: dict[str, npt.NDArray[Any]], /) -> None: ...
    def lengths(self) -> npt.NDArray[np.int64]: ...
    def memory(self) -> tuple[int, int]: ...

class KVCache(_Cache):
    def __init__(self, batch: int, capacity: int, /, *rest: Any) -> None: ...

class PagedKVCache(_Cache):
    def __init__(self, pages: int, page_size: int, /, *rest: Any) -> None: ...
    def add(self) -> int: ...
    def fork(self, entry: int, /) -> int: ...
    def free(self, entry: int, /) -> None: ...
    def free_pages(self) -> int: ...
    def entries(self) -> npt.NDArray[np.int64]: ...
    def block_table(self, entry: int, /) -> npt.NDArray[np.int64]: ...
    def reference_counts(self) -> npt.NDArray[np.int64]: ...

def version() -> str: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def use_isa(arg0: str, /) -> None: ...
def get_num_threads() -> int: ...
def set_num_threads(arg0: int, /) -> None: ...
def config() -> list[tuple[str, str]]: ...
def fma_peak(arg0: str, arg1: int, arg2: bool = ..., /) -> float: ...
def read_bandwidth(arg0: int, arg1: int, /) -> float: ...
