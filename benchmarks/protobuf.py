"""ONNX models of one node, written byte by byte: the package onnx is not needed for that."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: onnx.TensorProto.DataType
ELEMENT = {"float32": 1, "int32": 6, "bool": 9, "float16": 10, "float64": 11, "bfloat16": 16}


@dataclass(frozen=True)
class Port:
    """A named input or output of the model; an empty name is an input left out."""

    name: str
    dtype: str = "float32"
    shape: Sequence[int] = ()


def one_node(
    op: str,
    domain: str,
    opset: int,
    inputs: Sequence[Port],
    output: Port,
    attributes: Mapping[str, float],
) -> bytes:
    """A ModelProto with a single node."""
    node = b"".join(_text(1, port.name) for port in inputs)
    node += _text(2, output.name) + _text(4, op) + _text(7, domain)
    node += b"".join(_bytes(5, _attribute(name, value)) for name, value in attributes.items())
    graph = _bytes(1, node) + _text(2, "attention")
    graph += b"".join(_bytes(11, _value_info(port)) for port in inputs if port.name)
    graph += _bytes(12, _value_info(output))
    opsets = {"": 23, domain: opset}
    imports = b"".join(
        _bytes(8, _text(1, name) + _int(2, version)) for name, version in opsets.items()
    )
    return _int(1, 10) + imports + _bytes(7, graph)


def _attribute(name: str, value: float) -> bytes:
    if isinstance(value, int):
        return _text(1, name) + _int(3, value) + _int(20, 2)
    return _text(1, name) + _varint(2 << 3 | 5) + struct.pack("<f", value) + _int(20, 1)


def _value_info(port: Port) -> bytes:
    shape = b"".join(_bytes(1, _int(1, size)) for size in port.shape)
    tensor = _int(1, ELEMENT[port.dtype]) + _bytes(2, shape)
    return _text(1, port.name) + _bytes(2, _bytes(1, tensor))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _int(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())
