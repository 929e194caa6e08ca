"""Options by name: their defaults, and what is said of wrong arguments."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

import attncore
from kit import assert_same_bits, inputs

DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(attncore.attention).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
}
X = np.ones((1, 1, 1, 4), np.float32)
CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "attention": (attncore.attention, (X, X, X)),
    "attention_paged": (attncore.attention_paged, (X, X, X, [[0]], [1])),
}


@pytest.mark.parametrize("keyword", DEFAULTS)
def test_defaults_given(keyword: str, rng: Any) -> None:
    """What the signature says, by a name that Python has not interned."""
    arrays = inputs(rng, 3, 5)
    out = attncore.attention(*arrays, **{"".join(list(keyword)): DEFAULTS[keyword]})
    assert_same_bits(out, attncore.attention(*arrays))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("positional", "keywords", "said"),
    [
        (0, {"rows": 3}, r"got an unexpected keyword argument 'rows'$"),
        (0, {"rowsé": 3}, r"got an unexpected keyword argument 'rowsé'$"),
        (0, {"query": X}, r"got multiple values for argument 'query'$"),
        (1, {}, r"takes \d positional arguments but \d were given$"),
        (-1, {}, r"missing 1 required positional argument: '\w+'$"),
        (-1, {"causal": True}, r"missing 1 required positional argument: '\w+'$"),
    ],
)
def test_wrong_arguments(name: str, positional: int, keywords: dict[str, Any], said: str) -> None:
    """As of any function of Python."""
    function, arrays = CALLS[name]
    given = (*arrays, X)[: len(arrays) + positional]
    with pytest.raises(TypeError, match=rf"^{name}\(\) {said}"):
        function(*given, **keywords)


@pytest.mark.parametrize("name", CALLS)
def test_identity(name: str) -> None:
    """The functions that take options by name are called as their signatures say."""
    function, arrays = CALLS[name]
    assert (function.__name__, function.__qualname__) == (name, name)
    assert function is getattr(attncore, name)
    assert function.__doc__
    parameters = inspect.signature(function).parameters
    assert set(DEFAULTS) - {"key_lengths"} <= set(parameters)
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
    assert function(*arrays).shape == X.shape
