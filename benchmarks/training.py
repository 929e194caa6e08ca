"""Forward and backward together: ours and torch's, and the check before they are timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

import attncore
from attncore._cli.case import Array, Case, Inputs
from attncore._cli.measure import TOLERANCE, Contender, WrongOutput
from attncore._cli.packages import load

Results = tuple[Array, ...]  # out, d_query, d_key, d_value


class Unsupported(Exception):
    """The peer has no such attention, or no room for it; the message says which."""


def torch_tensor(array: Array) -> Any:
    """The same memory as a tensor."""
    library = load("torch")
    if array.dtype.name == "bfloat16":
        return library.from_numpy(array.view(np.int16)).view(library.bfloat16)
    return library.from_numpy(array)


def as_array(out: Any) -> Array:
    """A result as an array; a tensor's bfloat16, which torch does not give to NumPy, as float32."""
    if isinstance(out, np.ndarray):
        return out
    array: Array = (out.float() if str(out.dtype) == "torch.bfloat16" else out).numpy()
    return array


def d_out_of(inputs: Inputs) -> Array:
    """A standard normal gradient by out."""
    rng = np.random.default_rng(1)
    return rng.standard_normal(inputs.query.shape, np.float32).astype(inputs.query.dtype)


def ours(inputs: Inputs, isa: str, threads: int) -> Contender:
    """attncore on an ISA; it allocates its outputs, as torch does."""
    qkv = (inputs.query, inputs.key, inputs.value)
    options = {**inputs.options, "num_threads": threads}
    d_out = d_out_of(inputs)

    def call() -> Results:
        out, lse = attncore.attention(*qkv, return_lse=True, **options)
        d = attncore.attention_backward(d_out, *qkv, out, lse, **options)
        return out, *(x for x in (d.query, d.key, d.value) if x is not None)

    return Contender(f"attncore@{isa}", call, isa=isa)


def torch(case: Case, inputs: Inputs, threads: int) -> Contender:
    """torch's scaled_dot_product_attention and its backward pass."""
    library = load("torch")
    library.set_num_threads(threads)
    leaves = [torch_tensor(x).requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
    d_out = torch_tensor(d_out_of(inputs))
    if case.window or case.padding or case.bias:
        raise Unsupported("not written")
    sdpa = library.nn.functional.scaled_dot_product_attention

    def call(dropout: float = case.dropout) -> tuple[Any, ...]:
        with library.enable_grad():
            for leaf in leaves:
                leaf.grad = None
            out = sdpa(*leaves, is_causal=case.causal, dropout_p=dropout,
                       enable_gqa=case.heads != case.kv_heads)  # fmt: skip
            out.backward(d_out)
        return out.detach(), *(leaf.grad for leaf in leaves)

    if case.dropout:  # its coins are its own: what it computes is checked without them
        plain = Case(case.name, *shape_of(case), causal=case.causal, training=True)
        without = Inputs(*(inputs.query, inputs.key, inputs.value), options={})
        check(plain, without, as_arrays(call(0.0)), "torch")
    return Contender("torch", call, as_arrays)  # type: ignore[arg-type]


def shape_of(case: Case) -> tuple[int, int, int, int, int, int]:
    """A case's extents in their order."""
    return case.batch, case.heads, case.kv_heads, case.queries, case.keys, case.dim


def as_arrays(tensors: tuple[Any, ...]) -> Results:
    """torch's results."""
    return tuple(as_array(tensor) for tensor in tensors)


def reference_head(case: Case, inputs: Inputs, batch: int, kv_head: int) -> Results:
    """Out and gradients of one KV head and its query heads, in float64."""
    group = case.heads // case.kv_heads
    heads = slice(kv_head * group, (kv_head + 1) * group)
    query, d_out = (x[batch, heads].astype(np.float64) for x in (inputs.query, d_out_of(inputs)))
    key, value = (x[batch, kv_head].astype(np.float64) for x in (inputs.key, inputs.value))
    scale = 1 / math.sqrt(case.dim)
    scores = query @ key.T * scale
    if case.causal:
        ahead = np.arange(case.keys) - np.arange(case.queries)[:, None]
        scores[:, ahead > case.keys - case.queries] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    coins = np.ones(1)
    if case.dropout:
        whole = (case.batch, case.heads, case.queries, case.keys)
        keep = attncore.dropout_mask(inputs.options["seed"], case.dropout, whole)[batch, heads]
        coins = keep / (1 - round(case.dropout * 65536) / 65536)
    out = (weights * coins) @ value
    delta = (d_out * out).sum(axis=-1, keepdims=True)
    d_scores = weights * (coins * (d_out @ value.T) - delta) * scale
    d_key = np.einsum("hqk,hqd->kd", d_scores, query)
    d_value = np.einsum("hqk,hqd->kd", weights * coins, d_out)
    return out, d_scores @ key, d_key[None], d_value[None]


def check(case: Case, inputs: Inputs, results: Results, who: str) -> float:
    """The largest relative error over the first and the last KV head; WrongOutput if too large."""
    worst = 0.0
    group = case.heads // case.kv_heads
    for batch, kv_head in {(0, 0), (case.batch - 1, case.kv_heads - 1)}:
        exact = reference_head(case, inputs, batch, kv_head)
        for name, got, right in zip(
            ("out", "d_query", "d_key", "d_value"), results, exact, strict=True
        ):
            count = group if name in ("out", "d_query") else 1
            part = got[batch, kv_head * count : (kv_head + 1) * count].astype(np.float64)
            if part.shape != right.shape:
                raise WrongOutput(f"{case.name}: {who} gave {name} the shape {got.shape}")
            error = float(np.linalg.norm(part - right) / np.linalg.norm(right))
            if not error <= TOLERANCE[inputs.query.dtype.name]:
                raise WrongOutput(f"{case.name}: {name} of {who} is off by {error:.1e}")
            worst = max(worst, error)
    return worst


def verified(case: Case, inputs: Inputs, contender: Contender) -> float:
    """Run a contender once and check what it gives; its relative error."""
    with contender.ready():
        results: Callable[[], Any] = contender.call
        arrays = contender.array(results()) if contender.isa is None else results()
    if contender.isa is None and case.dropout:
        return 0.0  # checked without dropout, when it was made
    return check(case, inputs, arrays, contender.name)  # type: ignore[arg-type]
