"""Exact attention on NumPy arrays: softmax(scale · Q Kᵀ + bias) V, fast, in O(N) memory."""

from __future__ import annotations

from attncore._api import attention
from attncore._inspect import attention_weights, explain
from attncore._merge import merge
from attncore._runtime import (
    available_isas,
    get_cmake_dir,
    get_include,
    get_num_threads,
    isa,
    set_num_threads,
    show_config,
    use_isa,
    version,
)
from attncore._torch_like import scaled_dot_product_attention
from attncore._types import Plan

__version__ = version()

__all__ = [
    "Plan",
    "__version__",
    "attention",
    "attention_weights",
    "available_isas",
    "explain",
    "get_cmake_dir",
    "get_include",
    "get_num_threads",
    "isa",
    "merge",
    "scaled_dot_product_attention",
    "set_num_threads",
    "show_config",
    "use_isa",
]
