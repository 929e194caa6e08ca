"""A layer's parameters: reading, writing, files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from attncore import _checkpoint, _core
from attncore._cache_settings import float_dtype
from attncore._types import Array, Gradients

if TYPE_CHECKING:
    from typing_extensions import Self

_MADE = ("_core", "option_gradients")  # what a copy of a layer makes anew


class LoadedKeys(NamedTuple):
    """What a state dict lacked and what it had too much, as `load_state_dict` saw it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Activations:
    """What a call of a layer keeps for `backward`, apart from the layer's own last call.

    For a layer that is called several times before it is trained, as where its weights are shared,
    or by several threads: ``layer(x, activations=a)``, then ``layer.backward(d_y, activations=a)``.
    A later call with the same activations reuses their memory.

    Example:
        >>> import numpy as np, attncore
        >>> layer = attncore.MultiHeadAttention(16, 2)
        >>> one, other = attncore.Activations(), attncore.Activations()
        >>> x = np.ones((2, 3, 16), np.float32)
        >>> y = layer(x, activations=one) + layer(2 * x, activations=other)
        >>> d_one = layer.backward(np.ones_like(y), activations=one)
        >>> d_other = layer.backward(np.ones_like(y), activations=other, accumulate=True)
    """

    def __init__(self) -> None:
        self._core = _core.Activations()

    @property
    def nbytes(self) -> int:
        """Of memory that they hold, beside the arguments of the call."""
        return self._core.bytes

    def __reduce__(self) -> Any:
        raise TypeError("Activations: can be neither copied nor pickled")


def core_of(activations: Activations | None) -> _core.Activations | None:
    """What the core knows them as."""
    if activations is None:
        return None
    if not isinstance(activations, Activations):
        raise TypeError(f"activations: is {type(activations).__name__}, must be Activations")
    return activations._core


def dtype_named(dtype: Any) -> np.dtype[Any]:
    """A layer's dtype; NumPy knows the name of bfloat16 once ml_dtypes is imported."""
    if dtype is None:
        raise TypeError("dtype: is None, accepted are float32, float64, float16, bfloat16")
    return float_dtype(dtype) if isinstance(dtype, str) and dtype == "bfloat16" else np.dtype(dtype)


class Layer:
    """What has named parameters and their gradients."""

    _core: Any  # its parameters() are triples (name, value, gradient)
    training: bool
    option_gradients: Gradients

    def train(self, mode: bool = True) -> Self:
        """Keep what `backward` needs (the default), or don't; returns the layer."""
        self.training = mode
        if not mode:
            self._core.forget()
        return self

    def eval(self) -> Self:
        """Keep nothing for `backward`: the same as train(False)."""
        return self.train(False)

    def parameters(self) -> Mapping[str, Array]:
        """The parameters by name: views of the layer's memory, to be read and written in place."""
        return MappingProxyType({name: value for name, value, _ in self._core.parameters()})

    @property
    def gradients(self) -> Mapping[str, Array]:
        """The gradients of the parameters by name: views, written by `backward`, zeros before."""
        return MappingProxyType({name: gradient for name, _, gradient in self._core.parameters()})

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

    def _make(self, seed: int) -> None:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        own = {name: value for name, value in self.__dict__.items() if name not in _MADE}
        return {**own, "parameters": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        parameters = state.pop("parameters")
        self.__dict__.update(state)
        self.option_gradients = Gradients()
        self._make(0)
        self.load_state_dict(parameters)


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
