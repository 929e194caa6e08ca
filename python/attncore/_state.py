"""A layer's parameters: reading, writing, files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from attncore import _checkpoint
from attncore._types import Array

if TYPE_CHECKING:
    from typing_extensions import Self


class LoadedKeys(NamedTuple):
    """What a state dict lacked and what it had too much, as `load_state_dict` saw it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Layer:
    """What has named parameters and their gradients."""

    _core: Any  # its parameters() are triples (name, value, gradient)
    training: bool

    def train(self, mode: bool = True) -> Self:
        """Keep what `backward` needs (the default), or don't; returns the layer."""
        self.training = mode
        if not mode:
            self._core.forget()
        return self

    def eval(self) -> Self:
        """Keep nothing for `backward`: the same as train(False)."""
        return self.train(False)

    def parameters(self) -> dict[str, Array]:
        """The parameters by name: views of the layer's memory, to be read and written."""
        return {name: value for name, value, _ in self._core.parameters()}

    @property
    def gradients(self) -> dict[str, Array]:
        """The gradients of the parameters by name: views, written by `backward`, zeros before."""
        return {name: gradient for name, _, gradient in self._core.parameters()}

    def state_dict(self) -> dict[str, Array]:
        """A copy of the parameters, by the names that torch.nn.MultiheadAttention has."""
        return {name: value.copy() for name, value in self.parameters().items()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> LoadedKeys:
        """Takes over parameters; nothing is changed if anything does not fit.

        Args:
            state: Arrays, or what NumPy makes arrays of, or torch's tensors and parameters, by name;
                floats of any dtype, rounded to the layer's.
            strict: All parameters must be there, and nothing else.

        Returns:
            The named tuple (missing_keys, unexpected_keys).

        Raises:
            ValueError: Names are missing or not known (if strict), shapes differ: all are named.
            TypeError: An array does not hold floats.

        Example:
            >>> import attncore
            >>> first, second = (attncore.MultiHeadAttention(8, 2) for _ in range(2))
            >>> second.load_state_dict(first.state_dict())
            LoadedKeys(missing_keys=[], unexpected_keys=[])
        """
        parameters = self.parameters()
        missing = [name for name in parameters if name not in state]
        unexpected = [name for name in state if name not in parameters]
        faults = []
        if strict and missing:
            faults.append(f"{', '.join(missing)}: not there")
        if strict and unexpected:
            faults.append(
                f"{', '.join(unexpected)}: not known, accepted are {', '.join(parameters)}"
            )
        arrays = {name: _floats(name, state[name]) for name in parameters if name in state}
        for name, array in arrays.items():
            if array.shape != parameters[name].shape:
                faults.append(f"{name}: shape is {array.shape}, must be {parameters[name].shape}")
        if faults:
            raise ValueError("state: " + "; ".join(faults))
        # All are copies before any is written: they may be views of parameters, or raise as they are rounded.
        rounded = {name: array.astype(parameters[name].dtype) for name, array in arrays.items()}
        for name, array in rounded.items():
            parameters[name][...] = array
        return LoadedKeys(missing, unexpected)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the parameters as a safetensors file, whole or not at all.

        Raises:
            ImportError: The package safetensors is not installed: attncore[layers].
        """
        _checkpoint.write(path, self.state_dict())

    def load(self, path: str | os.PathLike[str], strict: bool = True) -> LoadedKeys:
        """`load_state_dict` of a safetensors file.

        Raises:
            ImportError: The package safetensors is not installed: attncore[layers].
            ValueError: It is no such file, or as `load_state_dict`.
        """
        return self.load_state_dict(_checkpoint.read(path)[0], strict)


def _floats(name: str, given: Any) -> Array:
    """An array of floats; np.asarray shares memory where it can."""
    array = None
    # As it is; torch's parameters; those in bfloat16, which float32 holds exactly.
    ways: tuple[Callable[[Any], Any], ...]
    ways = (lambda x: x, lambda x: x.detach(), lambda x: x.detach().float())
    for convert in ways:
        with contextlib.suppress(AttributeError, TypeError, ValueError, RuntimeError):
            array = np.asarray(convert(given))
            break
    if array is None:
        raise TypeError(f"state: {name} is {type(given).__name__}, must be an array of floats")
    if isinstance(array, np.ma.MaskedArray) or isinstance(given, np.ma.MaskedArray):
        raise TypeError(f"state: {name} is a masked array, must be a plain one")
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise TypeError(f"state: {name}: dtype is {array.dtype}, accepted are floats")
    return array
