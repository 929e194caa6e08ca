"""Exact attention on NumPy arrays: softmax(scale · Q Kᵀ + bias) V, fast, in O(N) memory."""

from __future__ import annotations

from attncore._api import attention
from attncore._attention_state import AttentionState
from attncore._backward import attention_backward, dropout_mask
from attncore._cache import KVCache, PagedKVCache
from attncore._cache_base import CacheMemory
from attncore._inspect import attention_weights, explain
from attncore._inspect_varlen import attention_weights_varlen, explain_varlen
from attncore._layers import LinearGradients, linear, linear_backward, rope
from attncore._merge import merge
from attncore._multi_head_attention import MultiHeadAttention
from attncore._paged import append_paged, attention_paged, explain_paged
from attncore._rotary import Rotary
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
from attncore._state import Activations
from attncore._torch_like import scaled_dot_product_attention
from attncore._types import Gradients, Plan, RelativeBias
from attncore._varlen import attention_varlen, attention_varlen_backward

__version__ = version()

__all__ = [
    "Activations",
    "AttentionState",
    "CacheMemory",
    "Gradients",
    "KVCache",
    "LinearGradients",
    "MultiHeadAttention",
    "PagedKVCache",
    "Plan",
    "RelativeBias",
    "Rotary",
    "__version__",
    "append_paged",
    "attention",
    "attention_backward",
    "attention_paged",
    "attention_varlen",
    "attention_varlen_backward",
    "attention_weights",
    "attention_weights_varlen",
    "available_isas",
    "dropout_mask",
    "explain",
    "explain_paged",
    "explain_varlen",
    "get_cmake_dir",
    "get_include",
    "get_num_threads",
    "isa",
    "linear",
    "linear_backward",
    "merge",
    "rope",
    "scaled_dot_product_attention",
    "set_num_threads",
    "show_config",
    "use_isa",
]
