"""What runs: instruction sets, threads, the build."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Literal, overload

from attncore import _core
from attncore._types import is_int


def version() -> str:
    """The version of the C++ library."""
    return _core.version()


def isa() -> str:
    """The instruction set that kernels use now; `show_config` says why ("isa_reason").

    Example:
        >>> import attncore
        >>> attncore.isa() in attncore.available_isas()
        True
    """
    return _core.isa()


def available_isas() -> tuple[str, ...]:
    """The instruction sets that this build and machine have, the best first.

    Example:
        >>> import attncore
        >>> attncore.available_isas()[-1]
        'baseline'
    """
    return tuple(_core.available_isas())


class use_isa:
    """Use the instruction set `name` from now on, in the whole process.

    As a context manager, until the block ends.  The environment variable ATTNCORE_ISA does the same
    from the start.

    Raises:
        ValueError: It is not available.
        TypeError: It is no str.

    Example:
        >>> import attncore
        >>> with attncore.use_isa("baseline"):
        ...     print(attncore.isa())
        baseline
    """

    def __init__(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"isa: must be a str, is {type(name).__name__}")
        self._before = _core.isa()
        _core.use_isa(name)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _core.use_isa(self._before)


def get_num_threads() -> int:
    """Threads that a call may use.

    As `set_num_threads` said, else OMP_NUM_THREADS, else the cores that this process may use.

    Example:
        >>> import attncore
        >>> attncore.get_num_threads() >= 1
        True
    """
    return _core.get_num_threads()


def set_num_threads(num_threads: int) -> None:
    """Set the threads that a call may use, in the whole process; more than 1024 count as 1024.

    Raises:
        ValueError: Fewer than 1.
        TypeError: It is no int.

    Example:
        >>> import attncore
        >>> attncore.set_num_threads(attncore.get_num_threads())
    """
    if not is_int(num_threads):
        raise TypeError(f"num_threads: must be an int, is {type(num_threads).__name__}")
    _core.set_num_threads(min(num_threads, 2**16))


@overload
def show_config(mode: Literal["stdout"] = ...) -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, str | int | list[str]]: ...
def show_config(
    mode: Literal["stdout", "dicts"] = "stdout",
) -> dict[str, str | int | list[str]] | None:
    """Print what was built and what was found, or return it with mode="dicts".

    Raises:
        ValueError: Another mode.

    Example:
        >>> import attncore
        >>> attncore.show_config(mode="dicts")["cuda"]
        'not built'
    """
    config = dict(_core.config())
    if mode == "dicts":
        return {name: _typed(name, setting) for name, setting in config.items()}
    if mode != "stdout":
        raise ValueError(f"mode: is {mode!r}, must be 'stdout' or 'dicts'")
    width = max(map(len, config))
    for name, setting in config.items():
        print(f"{name:{width}}  {setting}")
    return None


def _typed(name: str, setting: str) -> str | int | list[str]:
    if name in ("available_isas", "cpu_features"):
        return setting.split()
    return int(setting) if name in ("cores", "num_threads") else setting


def get_include() -> str:
    """The directory of the C++ headers; ImportError where the package lacks it."""
    return str(_installed("include"))


def get_cmake_dir() -> str:
    """The directory for CMake's attncore_DIR; ImportError where the package lacks it."""
    return str(_installed("share/cmake/attncore"))


def _installed(folder: str) -> Path:
    """Beside the compiled core, which an editable install keeps elsewhere than this file."""
    for root in (Path(__file__).parent, Path(_core.__file__).parent):
        if (root / folder).is_dir():
            return root / folder
    raise ImportError(f"attncore was installed without its folder {folder}")
