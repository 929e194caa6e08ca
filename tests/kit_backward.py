"""What the tests of gradients share: a forward and a backward call, gradients by name, their comparison."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

import attncore
from kit import assert_same_bits, compare_results, normal
from reference import (
    Array,
    Result,
    accumulation,
    as_tuple,
    from_bhsd,
    plain,
    reference,
    to_bhsd,
)
from reference_backward import Backward, plain_backward, reference_backward
from rule import assert_close_by_rule

OPERANDS = ("query", "key", "value")
OF_THE_CALL = ("wanted", "into", "num_threads")  # no matter of the gradients' values

Named = dict[str, Array]
attention_backward: Any = (
    attncore.attention_backward
)  # of unpacked arrays, whose number mypy does not know


def named(gradients: Any) -> Named:
    """The gradients that are there, by the reference's names."""
    found = gradients._asdict()
    assert tuple(found) == (*OPERANDS, "bias", "alibi", "sinks", "relative_bias")
    bias = found.pop("bias")
    found |= {f"bias {i}": one for i, one in enumerate(as_tuple(bias))}
    return {name: one for name, one in found.items() if one is not None}


def owners(arrays: Any, options: Mapping[str, Any]) -> Named:
    """What gradients belong to, by the same names."""
    found: Named = dict(zip(OPERANDS, arrays, strict=True))
    found |= {f"bias {i}": one for i, one in enumerate(as_tuple(options.get("bias")))}
    given = {name: options.get(name) for name in ("alibi", "sinks")}
    table = getattr(options.get("relative_bias"), "table", None)
    for name, one in (*given.items(), ("relative_bias", table)):
        if one is not None:
            found[name] = np.array(one, np.float32) if isinstance(one, list) else one
    return found


def d_outputs(
    rng: np.random.Generator, query: Array, value: Array, layout: str = "bhsd"
) -> tuple[Array, Array]:
    """Standard normal d_out and d_lse of a call."""
    batch, heads, rows, _ = to_bhsd(query, layout).shape
    dim = to_bhsd(value, layout).shape[3]
    d_out = normal(rng, batch, heads, rows, dim, dtype=query.dtype)
    d_lse = rng.standard_normal((batch, heads, rows)).astype(accumulation(query.dtype))
    return from_bhsd(d_out, query.ndim, layout), d_lse[(0,) * (4 - query.ndim)]


def differentiate(
    d_out: Array,
    arrays: Any,
    *,
    d_lse: Array | None = None,
    **options: Any,
) -> tuple[Any, Array, Array]:
    """Gradients, out and lse on the ISA in force."""
    forward = {name: options[name] for name in options if name not in ("wanted", "into")}
    out, lse = attncore.attention(*arrays, return_lse=True, **forward)
    made = attention_backward(d_out, *arrays, out, lse, d_lse=d_lse, **options)
    assert isinstance(made, attncore.Gradients)
    return made, out, lse


def gradients(d_out: Array, arrays: Any, **options: Any) -> Named:
    return named(differentiate(d_out, arrays, **options)[0])


Expected = tuple[Result, Result, Backward, Backward]


def expect(d_out: Array, arrays: Any, *, d_lse: Array | None = None, **options: Any) -> Expected:
    """What the reference and the plain evaluation give; without the weights, which would fill the memory."""
    exact, plainly = (
        replace(whole, weights=np.empty(0))
        for whole in (reference(*arrays, **options), plain(*arrays, **options))
    )
    return (
        exact,
        plainly,
        reference_backward(d_out, *arrays, d_lse=d_lse, **options),
        plain_backward(d_out, *arrays, d_lse=d_lse, **options),
    )


_expected: dict[bytes, Expected] = {}


def _expect_once(d_out: Array, arrays: Any, **options: Any) -> Expected:
    """Each ISA has the same: the last ones are kept, by all that goes in."""
    content = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, np.ndarray):
            content.update(f"{item.dtype} {item.shape}".encode() + item.tobytes())
        elif isinstance(item, (tuple, list)):
            content.update(f"{type(item).__name__} {len(item)}".encode())
            for one in item:
                add(one)
        else:
            content.update(repr(item).encode())

    add([d_out, *arrays, *(part for pair in sorted(options.items()) for part in pair)])
    key = content.digest()
    if key not in _expected:
        while len(_expected) >= 200:
            del _expected[next(iter(_expected))]
        _expected[key] = expect(d_out, arrays, **options)
    return _expected[key]


def check_backward(d_out: Array, arrays: Any, **options: Any) -> Named:
    """Run attention and its backward and hold both against the reference; the gradients."""
    passed_on = {name: options[name] for name in options if name not in OF_THE_CALL}
    return compare_backward(_expect_once(d_out, arrays, **passed_on), d_out, arrays, **options)


def compare_backward(expected: Expected, d_out: Array, arrays: Any, **options: Any) -> Named:
    made, out, lse = differentiate(d_out, arrays, **options)
    exact, plainly, exact_gradients, plain_gradients = expected
    compare_results(out, lse, exact, plainly)
    ours, belong_to = named(made), owners(arrays, options)
    assert ours.keys() == exact_gradients.keys() == belong_to.keys()
    assert isinstance(made.bias, tuple) == isinstance(options.get("bias"), (tuple, list))
    for name, one in ours.items():
        assert one.dtype == belong_to[name].dtype, f"{name}: {one.dtype}"
        wanted = exact_gradients[name]
        its = wanted.magnitude, f"d_{name}", wanted.noise
        assert_close_by_rule(one, wanted.value, plain_gradients[name].value, *its)
    return ours


def assert_same_gradients(ours: Named, theirs: Named, what: str = "") -> None:
    assert ours.keys() == theirs.keys()
    for name, one in ours.items():
        assert_same_bits(one, theirs[name], f"d_{name} {what}")
