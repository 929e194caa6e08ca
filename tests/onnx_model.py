"""One ONNX Attention node as a model, written by hand: the package onnx is not needed for that."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from reference import Array

ELEMENT = {"float32": 1, "int64": 7, "bool": 9, "float16": 10, "float64": 11}
INPUTS = ("query", "key", "value", "mask", "past_key", "past_value", "nonpad_kv_seqlen")


def varint(value: int) -> bytes:
    done = bytearray()
    while value > 127:
        done.append(value & 127 | 128)
        value >>= 7
    return bytes([*done, value])


def field(number: int, value: Any) -> bytes:
    """One field of a protobuf message: an int, a float, text, or a message already written."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + bytes(data)


def tensor(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    dims = b"".join(field(1, field(1, extent)) for extent in shape)
    kind = field(1, ELEMENT[dtype]) + (field(2, dims) if shape else b"")
    return field(1, name) + field(2, field(1, kind))


def attribute(name: str, value: float) -> bytes:
    number, kind = (2, 1) if type(value) is float else (3, 2)
    return field(1, name) + field(number, value) + field(20, kind)


def attention_model(arrays: dict[str, Array], attributes: dict[str, float], opset: int) -> bytes:
    last = max(i for i, name in enumerate(INPUTS) if name in arrays)
    names = [name if name in arrays else "" for name in INPUTS[: last + 1]]
    outputs = ["out", "present_key", "present_value"] if "past_key" in arrays else ["out"]
    node = b"".join(field(1, name) for name in names)
    node += b"".join(field(2, name) for name in outputs) + field(4, "Attention")
    node += b"".join(field(5, attribute(*item)) for item in attributes.items())
    graph = field(1, node) + field(2, "attention")
    for name, array in arrays.items():
        graph += field(11, tensor(name, str(array.dtype), array.shape))
    for name in outputs:
        kind = field(1, ELEMENT[str(arrays["query"].dtype)])
        graph += field(12, field(1, name) + field(2, field(1, kind)))
    return field(1, 10) + field(7, graph) + field(8, field(2, opset))


def run(runtime: Any, arrays: dict[str, Array], attributes: dict[str, float], opset: int) -> Array:
    model = attention_model(arrays, attributes, opset)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    given = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    out: Array = session.run(["out"], given)[0]
    return out
