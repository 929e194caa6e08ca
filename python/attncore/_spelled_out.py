"""Functions whose many options cost nothing where they are not given."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


def spells_out(call: Callable[..., Any]) -> Callable[[Function], Function]:
    """A function's name, signature and text for `call`, which takes its options as ``**options``.

    Python looks up the default of each keyword that a call leaves out: for the 22 of `attention`
    0.3 µs, a third of what its smallest calls take.
    """

    def decorate(documented: Function) -> Function:
        return cast("Function", wraps(documented)(call))

    return decorate
