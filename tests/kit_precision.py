"""What the tests of precision= share."""

from __future__ import annotations

from typing import Any

import attncore
from kit import Inputs, assert_same_bits
from reference import Array

TILES = ("amx", "amx_f32")  # the ISAs whose "high" is two bfloat16 parts'
ROUNDING = ("avx512_bf16", *TILES)  # the ISAs whose "medium" is bfloat16's
FEW = 8  # query rows a KV head, up to which it is float32's, and 16 where keys are many
MEDIUM: dict[str, Any] = {"precision": "medium"}


def run(made: Inputs, **options: Any) -> tuple[Array, Array]:
    return attncore.attention(*made, return_lse=True, **options)


def assert_same(ours: tuple[Array, Array], theirs: tuple[Array, Array]) -> None:
    assert_same_bits(ours[0], theirs[0])
    assert_same_bits(ours[1], theirs[1], "lse")
