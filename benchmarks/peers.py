"""Other libraries on the same inputs: torch, onnxruntime and openvino, where installed.

Each peer gets what suits it: views without a copy, its own layout prepared before the clock
starts, its masks in the form that it takes, our number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import training
from attncore._cli.case import Array, Case, Inputs
from attncore._cli.measure import Contender
from attncore._cli.memory import available_bytes
from attncore._cli.packages import load, present
from protobuf import Port, one_node
from training import as_array, torch_tensor

Unsupported = training.Unsupported


def band(case: Case) -> Array:
    """The window as a boolean (1, 1, queries, keys) mask, for peers that know no windows."""
    assert case.window is not None
    position = np.arange(case.queries)[:, None] + case.keys - case.queries
    distance = np.arange(case.keys) - position
    return ((distance <= 0) & (distance > -case.window))[None, None]


def additive(mask: Array) -> Array:
    """A boolean mask as float32 numbers to add."""
    numbers: Array = np.where(mask, np.float32(0), np.float32(-np.inf))
    return numbers


def room_for_scores(case: Case) -> None:
    """Raise Unsupported where a peer that keeps all scores, and weights beside them, would fill the memory."""
    needed = 2 * case.batch * case.heads * case.queries * case.keys * 4
    room = available_bytes()
    if room is not None and needed > 0.6 * room:
        raise Unsupported(f"keeps all scores: {needed / 1e9:.0f} GB")


def torch(case: Case, inputs: Inputs, threads: int) -> Contender:
    """torch.nn.functional.scaled_dot_product_attention."""
    library = load("torch")
    library.set_num_threads(threads)

    options: dict[str, Any] = {}
    if case.kv_heads != case.heads:
        options["enable_gqa"] = True
    if case.window:
        dtype = torch_tensor(inputs.query).dtype
        options["attn_mask"] = library.from_numpy(additive(band(case))).to(dtype)
    elif case.causal:
        options["is_causal"] = True
    elif case.padding:
        options["attn_mask"] = torch_tensor(inputs.options["mask"])
    elif case.bias:
        options["attn_mask"] = torch_tensor(inputs.options["bias"])
    query, key, value = (torch_tensor(x) for x in (inputs.query, inputs.key, inputs.value))
    sdpa = library.nn.functional.scaled_dot_product_attention

    return Contender("torch", lambda: sdpa(query, key, value, **options), as_array)


def _session(model: bytes, feeds: Mapping[str, Array], threads: int) -> Callable[[], Array]:
    """A call of an ONNX model by onnxruntime, which allocates the output."""
    library = load("onnxruntime")
    settings = library.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 4
    try:
        session = library.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for each status
        reason = str(error).strip().splitlines()[0].rpartition(" : ")[2][:60]
        raise Unsupported(reason) from error
    names = ["out"]
    return lambda: session.run(names, feeds)[0]


def ort_attention(case: Case, inputs: Inputs, threads: int) -> Contender:
    """onnxruntime's operator Attention of the ONNX standard (opset 23)."""
    room_for_scores(case)
    dtype = inputs.query.dtype.name
    feeds = {"q": inputs.query, "k": inputs.key, "v": inputs.value}
    if case.window:
        feeds["mask"] = band(case)[0, 0]
    elif case.padding:  # the kernel wants a mask that names every query
        shape = (case.batch, 1, case.queries, case.keys)
        feeds["mask"] = np.ascontiguousarray(np.broadcast_to(inputs.options["mask"], shape))
    elif case.bias:
        feeds["mask"] = inputs.options["bias"]
    if dtype == "bfloat16":
        raise Unsupported("no bfloat16 from NumPy")
    ports = [Port(name, array.dtype.name, array.shape) for name, array in feeds.items()]
    attributes = {"is_causal": int(case.causal), "scale": 1 / math.sqrt(case.dim)}
    model = one_node("Attention", "", 23, ports, Port("out", dtype, inputs.query.shape), attributes)
    return Contender("ort", _session(model, feeds, threads))


def ort_multi_head(case: Case, inputs: Inputs, threads: int) -> Contender:
    """onnxruntime's own operator MultiHeadAttention, in its layout (batch, token, head · dim)."""
    dtype = inputs.query.dtype.name
    if case.kv_heads != case.heads:
        raise Unsupported("no grouped heads")
    if dtype == "bfloat16":
        raise Unsupported("no bfloat16 from NumPy")
    if case.causal or case.window or case.padding or case.bias:
        room_for_scores(case)

    def packed(x: Array) -> Array:
        return np.ascontiguousarray(x.swapaxes(1, 2)).reshape(case.batch, x.shape[2], -1)

    feeds = {"q": packed(inputs.query), "k": packed(inputs.key), "v": packed(inputs.value)}
    ports = [Port(name, dtype, array.shape) for name, array in feeds.items()]
    extra: Array | None = None
    if case.padding:
        extra = inputs.options["mask"][:, 0, 0].astype(np.int32)
        ports += [Port(""), Port("mask", "int32", extra.shape)]
    elif case.window or case.bias:
        extra = additive(band(case)) if case.window else inputs.options["bias"]
        ports += [Port(""), Port(""), Port("mask", dtype, extra.shape)]
    if extra is not None:
        feeds["mask"] = extra
    attributes: dict[str, float] = {
        "num_heads": case.heads,
        "unidirectional": int(case.causal),
        "scale": 1 / math.sqrt(case.dim),
    }
    model = one_node(
        "MultiHeadAttention", "com.microsoft", 1, ports,
        Port("out", dtype, feeds["q"].shape), attributes,
    )  # fmt: skip
    shape = (case.batch, case.queries, case.heads, case.dim)
    return Contender(
        "ort-mha", _session(model, feeds, threads), lambda out: out.reshape(shape).swapaxes(1, 2)
    )


def openvino(case: Case, inputs: Inputs, threads: int) -> Contender:
    """openvino's ScaledDotProductAttention; its output buffer is reused, which favours it."""
    if case.kv_heads != case.heads:
        raise Unsupported("no grouped heads")
    library, opset = load("openvino"), load("openvino.opset13")
    names = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
    dtype = names.get(inputs.query.dtype.name)
    if dtype is None:
        raise Unsupported(f"no {inputs.query.dtype.name}")
    mask: Array | None = None
    if case.window:
        mask = band(case)
    elif case.padding or case.bias:
        mask = inputs.options["mask" if case.padding else "bias"]
    arrays = [inputs.query, inputs.key, inputs.value, *([] if mask is None else [mask])]
    kinds = [library.Type.boolean if x.dtype == bool else getattr(library.Type, dtype)
             for x in arrays]  # fmt: skip
    nodes = [opset.parameter(list(x.shape), kind) for x, kind in zip(arrays, kinds, strict=True)]
    # a mask given, the operator's own causal flag must be off, and our window is causal already
    node = opset.scaled_dot_product_attention(*nodes, causal=case.causal and not case.window)
    model = library.Model([node], nodes, "attention")
    settings = {
        "INFERENCE_PRECISION_HINT": dtype,  # else float32 may run as bfloat16
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "ENABLE_HYPER_THREADING": True,
        "ENABLE_CPU_PINNING": False,
    }
    request = library.compile_model(model, "CPU", settings).create_infer_request()
    if dtype == "bf16":
        arrays = [x if x.dtype == bool else x.view(np.uint16) for x in arrays]
    arrays = [np.ascontiguousarray(x) for x in arrays]  # a tensor only points at its array
    for index, (x, kind) in enumerate(zip(arrays, kinds, strict=True)):
        request.set_input_tensor(index, library.Tensor(x, list(x.shape), kind))

    def call(_: list[Array] = arrays) -> None:
        request.infer()

    def array(_: Any) -> Array:
        out = request.get_output_tensor(0)
        data: Array = out.data
        return data.view(inputs.query.dtype) if dtype == "bf16" else data

    return Contender("openvino", call, array)


#: name → (package, how to set it up)
PEERS: dict[str, tuple[str, Callable[[Case, Inputs, int], Contender]]] = {
    "torch": ("torch", torch),
    "ort": ("onnxruntime", ort_attention),
    "ort-mha": ("onnxruntime", ort_multi_head),
    "openvino": ("openvino", openvino),
}


def installed() -> list[str]:
    """The peers whose package is here."""
    return [name for name, (package, _) in PEERS.items() if present(package)]


def contender(name: str, case: Case, inputs: Inputs, threads: int) -> Contender:
    """A peer, ready to run; Unsupported where it cannot run the case."""
    if case.causal and case.queries != case.keys:
        raise Unsupported("causal counts from the first key")
    if case.training:
        if name != "torch":
            raise Unsupported("no gradients")
        return training.torch(case, inputs, threads)
    return PEERS[name][1](case, inputs, threads)
