"""The shapes in messages are those of the caller's arrays, in every layout."""

from __future__ import annotations

from typing import Any

import pytest

import attncore
from kit import zeros
from reference import Array

# By layout and rank: what out is and must be, as the caller's arrays are.
SHAPES = {
    "bhsd": ("bhsd", 4, r"\(2, 4, 5, 8\), must be \(2, 4, 6, 8\) \(batch, head, token, dim\)"),
    "bshd": ("bshd", 4, r"\(2, 5, 4, 8\), must be \(2, 6, 4, 8\) \(batch, token, head, dim\)"),
    "bhsd without batch": ("bhsd", 3, r"\(4, 5, 8\), must be \(4, 6, 8\) \(head, token, dim\)"),
    "bshd without batch": ("bshd", 3, r"\(5, 4, 8\), must be \(6, 4, 8\) \(token, head, dim\)"),
    "without heads": ("bshd", 2, r"\(5, 8\), must be \(6, 8\) \(token, dim\)"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_shapes_in_messages_are_those_of_the_arrays(case: str) -> None:
    layout, rank, message = SHAPES[case]

    def array(tokens: int) -> Array:
        shape = (2, tokens, 4, 8) if layout == "bshd" else (2, 4, tokens, 8)
        return zeros(*(shape if rank == 4 else shape[1:] if rank == 3 else (tokens, 8)))

    x, wrong = array(6), array(5)
    options: Any = {"layout": layout}
    out, lse = attncore.attention(x, x, x, return_lse=True, **options)
    with pytest.raises(ValueError, match=f"^out: shape is {message}$"):
        attncore.attention(x, x, x, out=wrong, **options)
    with pytest.raises(ValueError, match=f"^d_out: shape is {message}$"):
        attncore.attention_backward(wrong, x, x, x, out, lse, **options)
    with pytest.raises(ValueError, match=f"^value: shape is {message}$"):
        attncore.attention(x, x, wrong, **options)
    with pytest.raises(ValueError, match=f"^out: shape is {message}$"):
        attncore.rope(x, out=wrong, **options)


def test_shapes_of_packed_arrays_in_messages() -> None:
    x, wrong = zeros(6, 4, 8), zeros(4, 6, 8)
    with pytest.raises(
        ValueError, match=r"^out: shape is \(4, 6, 8\), must be \(6, 4, 8\) \(token, head, dim\)$"
    ):
        attncore.attention_varlen(x, x, x, [0, 2, 6], [0, 2, 6], out=wrong)
