"""Bad input to `append_paged`: an error that names the argument, and nothing is written."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import attncore

ml_dtypes = pytest.importorskip("ml_dtypes")

B, HK, S, D, DV, PAGES, SIZE = 2, 2, 3, 8, 6, 6, 4
NAN, INFINITY = float("nan"), float("inf")


def ones(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


def pools(dtype: Any = np.float32, dims: tuple[int, int] = (D, DV)) -> dict[str, Any]:
    return {
        "key_pages": np.zeros((PAGES, SIZE, HK, dims[0]), dtype),
        "value_pages": np.zeros((PAGES, SIZE, HK, dims[1]), dtype),
    }


def scales() -> dict[str, Any]:
    return {name: np.zeros((PAGES, SIZE, HK), np.float32) for name in ("key_scale", "value_scale")}


INT8 = {**pools(np.int8), **scales()}
INT4 = {**pools(np.uint8, (D // 2, DV // 2)), **scales()}
FLOAT8 = {**pools(ml_dtypes.float8_e4m3fn), **scales()}
GOOD: dict[str, Any] = {
    "key": ones(B, HK, S, D),
    "value": ones(B, HK, S, DV),
    **pools(),
    "block_table": [[0, 1, 2], [3, 4, 99]],
    "key_lengths": [6, 3],
}


def with_number(number: float, dtype: Any = np.float32) -> Any:
    value = ones(B, HK, S, DV, dtype=dtype)
    value[1, 0, 2, 4] = number
    return value


def frozen(array: Any) -> Any:
    array.flags.writeable = False
    return array


MEMORY = np.zeros(2 * PAGES * SIZE * HK * D, np.float32)
KEYS = MEMORY[: PAGES * SIZE * HK * D].reshape(PAGES, SIZE, HK, D)
PACKED = {"key": ones(5, HK, D), "value": ones(5, HK, DV), "cu_lengths": [0, 2, 5]}

# name: (what differs from a good call, exception, message)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    # the table
    "negative page": (
        {"block_table": [[0, 1, -1], [3, 4, 99]]},
        ValueError,
        r"block_table.*\(0, 2\) is -1.*0 … 5",
    ),
    "page past the pool": (
        {"block_table": [[0, 1, 2], [3, 6, 99]]},
        ValueError,
        r"block_table.*\(1, 1\) is 6.*0 … 5",
    ),
    "page 2**40": (
        {"block_table": [[0, 2**40, 2], [3, 4, 0]]},
        ValueError,
        r"block_table.*\(0, 1\) is 1099511627776",
    ),
    "two entries write one page": (
        {"block_table": [[0, 1, 2], [3, 2, 99]]},
        ValueError,
        "block_table.*entries 0 and 1.*both write page 2",
    ),
    "an entry writes a page twice": (
        {"block_table": [[0, 1, 1], [3, 4, 99]]},
        ValueError,
        "block_table.*entry 0.*page 1 twice",
    ),
    "where another has tokens": (
        {"block_table": [[4, 1, 2], [3, 4, 99]]},
        ValueError,
        "block_table.*entry 1.*page 4.*entry 0 has tokens",
    ),
    "a fork that was not copied": (
        {"block_table": [[0, 1, 2], [1, 4, 5]], "key_lengths": [6, 7], "lengths": [1, 1]},
        ValueError,
        "block_table.*entry 0.*page 1.*entry 1 has tokens",
    ),
    "where another's last token is": (
        {"block_table": [[0, 1, 2], [3, 1, 99]], "key_lengths": [6, 7], "lengths": [1, 0]},
        ValueError,
        "block_table.*entry 0.*page 1.*entry 1 has tokens",
    ),
    "where it has tokens itself": (
        {"block_table": [[2, 1, 2], [3, 4, 99]]},
        ValueError,
        "block_table.*entry 0.*page 2.*entry 0 has tokens",
    ),
    "no room": ({"key_lengths": [10, 3]}, ValueError, "block_table.*12 tokens.*entry 0.*10.*3"),
    "table too short": (
        {"block_table": [[0, 1], [3, 4]]},
        ValueError,
        "block_table.*8 tokens.*entry 0 has 6 and gets 3",
    ),
    "no table": ({"block_table": None}, TypeError, "block_table.*None"),
    "scalar table": ({"block_table": 3}, ValueError, "block_table.*scalar"),
    "table of floats": ({"block_table": ones(B, 3)}, TypeError, "block_table.*float32.*integer"),
    "table of another batch": (
        {"block_table": [[0, 1, 2]]},
        ValueError,
        r"block_table.*\(1, 3\).*\(2, 3\)",
    ),
    "no pool": (
        {n: p[:0] for n, p in pools().items()},
        ValueError,
        r"block_table.*\(0, 1\) is 1.*key_pages has none",
    ),
    # lengths
    "length past the table": ({"key_lengths": [13, 3]}, ValueError, "key_lengths.*0 is 13.*0 … 12"),
    "negative length": ({"key_lengths": [6, -1]}, ValueError, "key_lengths.*entry 1 is -1"),
    "length 2**63 - 1": ({"key_lengths": [2**63 - 1, 3]}, ValueError, "key_lengths.*9223372036854"),
    "no lengths": ({"key_lengths": None}, TypeError, "key_lengths.*None"),
    "too few lengths": ({"key_lengths": [3]}, ValueError, "key_lengths.*1.*2"),
    "lengths of floats": ({"key_lengths": [1.0, 2.0]}, TypeError, "key_lengths.*integer"),
    "more than there are": ({"lengths": [1, 4]}, ValueError, "lengths.*entry 1 is 4.*0 … 3"),
    "fewer than none": ({"lengths": [-1, 1]}, ValueError, "lengths.*entry 0 is -1"),
    # tokens
    "integer tokens": (
        {"key": ones(B, HK, S, D, dtype=np.int8)},
        TypeError,
        "key.*int8.*float32",
    ),
    "list as tokens": ({"key": [[1.0]]}, TypeError, "key.*array.*list"),
    "2-D tokens": ({"key": ones(S, D)}, ValueError, "key.*2.*3 or 4"),
    "tokens of other heads": (
        {"key": ones(B, 3, S, D)},
        ValueError,
        r"key.*\(2, 3, 3, 8\).*\(2, 2, 3, 8\)",
    ),
    "tokens of another dim": (
        {"value": ones(B, HK, S, D)},
        ValueError,
        r"value.*\(2, 2, 3, 8\).*\(2, 2, 3, 6\)",
    ),
    "fewer values": ({"value": ones(B, HK, 2, DV)}, ValueError, r"value.*\(2, 2, 2, 6\)"),
    "values without pages": ({"value_pages": None}, ValueError, "value_pages.*come together"),
    "pages without values": ({"value": None}, ValueError, "^value: is not given.*come together"),
    "scales of no values": (
        {**INT8, "value": None, "value_pages": None},
        ValueError,
        "value_scale.*without value_pages",
    ),
    "layout": ({"layout": "sbhd"}, ValueError, "layout.*sbhd"),
    "packed in a layout": ({**PACKED, "layout": "bshd"}, ValueError, "layout.*packed"),
    "packed tokens of four axes": ({"cu_lengths": [0, 1, 2]}, ValueError, "key.*3 dimensions"),
    "falling": ({**PACKED, "cu_lengths": [0, 6, 5]}, ValueError, "cu_lengths.*1 is 6.*0 … 5"),
    "not to the end": ({**PACKED, "cu_lengths": [0, 2, 4]}, ValueError, "cu_lengths.*4.*5"),
    "an empty list": ({**PACKED, "cu_lengths": []}, ValueError, "cu_lengths.*empty"),
    # pages
    "3-D pages": ({"key_pages": KEYS[0]}, ValueError, "key_pages.*3 dimensions.*4"),
    "pages of ints": (
        {"key_pages": np.zeros((PAGES, SIZE, HK, D), np.int32)},
        TypeError,
        "key_pages.*int32.*int8",
    ),
    "read-only pages": ({"key_pages": frozen(KEYS.copy())}, ValueError, "key_pages.*read-only"),
    "more value pages": (
        {"value_pages": np.zeros((7, SIZE, HK, DV), np.float32)},
        ValueError,
        r"value_pages.*\(7, 2, 4, 6\).*\(6, 2, 4, 6\)",
    ),
    "pages of no slots": (
        {n: p[:, :0] for n, p in pools().items()},
        ValueError,
        "key_pages.*0 tokens",
    ),
    "page layout": ({"page_layout": "phsd"}, ValueError, "page_layout.*phsd"),
    "int8 with gaps": (
        {**INT8, "key_pages": np.zeros((PAGES, SIZE, HK, 2 * D), np.int8)[..., ::2]},
        ValueError,
        "key_pages.*stride of 2.*int8.*gaps",
    ),
    # memory
    "keys that overlap": (
        {
            "key_pages": np.lib.stride_tricks.as_strided(
                KEYS, (PAGES, SIZE, HK, D), (256, 64, 16, 4)
            )
        },
        ValueError,
        "key_pages.*overlap each other",
    ),
    "a broadcast pool": (
        {"key_pages": np.lib.stride_tricks.as_strided(KEYS, (PAGES, SIZE, HK, D), (0, 64, 32, 4))},
        ValueError,
        "key_pages.*overlap each other",
    ),
    "values in the keys": (
        {"key_pages": KEYS, "value_pages": KEYS[..., :DV]},
        ValueError,
        "value_pages.*overlaps key_pages",
    ),
    "tokens in the pages": (
        {"key_pages": KEYS, "key": MEMORY[: B * HK * S * D].reshape(B, HK, S, D)},
        ValueError,
        "key_pages.*overlaps key",
    ),
    "one array of scales": (
        {**INT8, "key_scale": INT8["value_scale"]},
        ValueError,
        "value_scale.*overlaps key_scale",
    ),
    # scales and what they are for
    "int8 without scales": (
        {**pools(np.int8)},
        ValueError,
        "key_scale.*not given.*key_pages of int8",
    ),
    "scales of floats": ({**scales()}, ValueError, "key_scale.*key_pages of float32.*only int8"),
    "scales of float64": (
        {**INT8, "value_scale": np.zeros((PAGES, SIZE, HK))},
        TypeError,
        "value_scale.*float64.*float32",
    ),
    "scales of another shape": (
        {**INT8, "key_scale": np.zeros((PAGES, SIZE, 1), np.float32)},
        ValueError,
        r"key_scale.*\(6, 1, 4\).*\(6, 2, 4\)",
    ),
    "NaN to int8": (
        {**INT8, "value": with_number(NAN)},
        ValueError,
        "value.*entry 1.*head 0, token 2",
    ),
    "infinity to int4": ({**INT4, "value": with_number(INFINITY)}, ValueError, "value.*NaN.*int4"),
    "infinity to float8": (
        {**FLOAT8, "value": with_number(-INFINITY)},
        ValueError,
        "value.*infinity.*float8_e4m3fn",
    ),
    "1e300 to int8": (
        {**INT8, "value": with_number(1e300, np.float64)},
        ValueError,
        "value.*float32's range",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    assert len(BAD) >= 30
    change, exception, message = BAD[case]
    call = {**GOOD, **change}
    written = [
        call[name]
        for name in ("key_pages", "value_pages", "key_scale", "value_scale")
        if isinstance(call.get(name), np.ndarray)
    ]
    with pytest.raises(exception, match=message) as caught:
        attncore.append_paged(**call)
    assert type(caught.value) is exception
    assert re.match(r"\w+: ", str(caught.value))
    for array in written:
        assert not array.astype(np.float32).any(), "something was written"


@pytest.mark.parametrize("name", ["block_table", "key_lengths", "lengths", "cu_lengths"])
def test_pages_must_not_overlap_ints(name: str) -> None:
    call: dict[str, Any] = {**GOOD, **pools(), "lengths": [S, S]}
    if name == "cu_lengths":
        call |= {"key": ones(2 * S, HK, D), "value": ones(2 * S, HK, DV), name: [0, S, 2 * S]}
    own = np.array(call[name], np.int32)
    inside = call["key_pages"].view(np.int32).reshape(-1)[7 : 7 + own.size].reshape(own.shape)
    inside[...] = own
    with pytest.raises(ValueError, match=f"key_pages: overlaps {name}"):
        attncore.append_paged(**{**call, name: inside})
    assert (inside == own).all()


def test_an_entry_may_write_behind_another_s_tokens() -> None:
    call = {**GOOD, **pools(), "block_table": [[0, 1, 2], [3, 1, 99]]}
    attncore.append_paged(**{**call, "key_lengths": [6, 6], "lengths": [1, 0]})
    assert call["key_pages"].any(axis=(2, 3)).nonzero() == (1, 2)


@pytest.mark.parametrize("change", [{}, INT8, INT4, FLOAT8, PACKED])
def test_a_good_call(change: dict[str, Any]) -> None:
    call = {n: a.copy() if isinstance(a, np.ndarray) else a for n, a in {**GOOD, **change}.items()}
    attncore.append_paged(**call)
    assert call["key_pages"].astype(np.float32).any()
