"""Bad input to `attention_paged`: the message names the argument, what came, what is accepted."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import attncore
from kit import zeros
from test_errors import ATTENTION

B, H, HK, S, D, DV, PAGES, SIZE, WIDTH = 2, 4, 2, 3, 8, 6, 5, 4, 3


KEY_PAGES, VALUE_PAGES = zeros(PAGES, SIZE, HK, D), zeros(PAGES, SIZE, HK, DV)
GOOD: dict[str, Any] = {
    "query": zeros(B, H, S, D),
    "key_pages": KEY_PAGES,
    "value_pages": VALUE_PAGES,
    "block_table": [[0, 1, 2], [3, 4, 99]],
    "key_lengths": [12, 8],
}
PACKED = {"query": zeros(5, H, D), "cu_query_lengths": [0, 2, 5], "out": None}

# name: (what differs from a good call, exception, message)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    # the table
    "negative page": (
        {"block_table": [[0, -1, 2], [3, 4, 0]]},
        ValueError,
        r"block_table.*\(0, 1\) is -1.*0 … 4",
    ),
    "page past the pool": (
        {"block_table": [[0, 1, 2], [3, 5, 0]]},
        ValueError,
        r"block_table.*\(1, 1\) is 5.*0 … 4",
    ),
    "page far past the pool": (
        {"block_table": [[2**40, 1, 2], [3, 4, 0]]},
        ValueError,
        r"block_table.*\(0, 0\) is 1099511627776.*0 … 4",
    ),
    "page -2**63": (
        {"block_table": [[0, 1, -(2**63)], [3, 4, 0]]},
        ValueError,
        r"block_table.*\(0, 2\) is -9223372036854775808",
    ),
    "page 2**64 - 1": (
        {"block_table": np.full((2, 3), 2**64 - 1, np.uint64)},
        ValueError,
        r"block_table: entry \(0, 0\) is -1, must be 0",
    ),
    "no pool": (
        {"key_pages": KEY_PAGES[:0], "value_pages": VALUE_PAGES[:0]},
        ValueError,
        r"block_table.*\(0, 0\) is 0.*key_pages has none",
    ),
    "table of floats": (
        {"block_table": zeros(B, WIDTH)},
        TypeError,
        "block_table.*float32.*integer",
    ),
    "table of bools": (
        {"block_table": zeros(B, WIDTH, dtype=bool)},
        TypeError,
        "block_table.*bool.*integer",
    ),
    "no table": ({"block_table": None}, TypeError, "block_table.*array.*None"),
    "table of text": ({"block_table": "pages"}, TypeError, "block_table"),
    "ragged table": ({"block_table": [[0, 1, 2], [3, 4]]}, TypeError, "block_table.*list"),
    "table of another batch": (
        {"block_table": [[0, 1, 2]]},
        ValueError,
        r"block_table: shape is \(1, 3\), must be \(2, 3\) \(batch, pages",
    ),
    "scalar table": ({"block_table": 3}, ValueError, "block_table.*scalar"),
    "table of three axes": (
        {"block_table": np.zeros((1, B, WIDTH), int)},
        ValueError,
        "block_table.*3 dimensions.*2",
    ),
    "table too short": (
        {"block_table": [[0, 1], [3, 4]]},
        ValueError,
        "key_lengths.*entry 0 is 12.*0 … 8",
    ),
    # lengths
    "length past the table": (
        {"key_lengths": [12, 13]},
        ValueError,
        "key_lengths.*entry 1 is 13.*0 … 12",
    ),
    "negative length": ({"key_lengths": [-1, 8]}, ValueError, "key_lengths.*entry 0 is -1.*0 … 12"),
    "no lengths": ({"key_lengths": None}, ValueError, "key_lengths.*not given"),
    "too few lengths": ({"key_lengths": [8]}, ValueError, "key_lengths.*1.*2"),
    "lengths of floats": ({"key_lengths": [8.0, 8.0]}, TypeError, "key_lengths.*float32.*integer"),
    # pages
    "list as pages": ({"key_pages": [[1.0]]}, TypeError, "key_pages.*array.*list"),
    "None as pages": ({"value_pages": None}, TypeError, "value_pages.*array.*None"),
    "3-D pages": (
        {"key_pages": KEY_PAGES[0]},
        ValueError,
        "key_pages.*3 dimensions.*4.*page, slot, head, dim",
    ),
    "pages of another dim": (
        {"key_pages": zeros(PAGES, SIZE, HK, 9)},
        ValueError,
        r"key_pages.*\(5, 2, 4, 9\).*\(5, 2, 4, 8\).*page",
    ),
    "more value pages": (
        {"value_pages": zeros(6, SIZE, HK, DV)},
        ValueError,
        r"value_pages.*\(6, 2, 4, 6\).*\(5, 2, 4, 6\).*page",
    ),
    "other value slots": (
        {"value_pages": zeros(PAGES, 3, HK, DV)},
        ValueError,
        r"value_pages.*\(5, 2, 3, 6\)",
    ),
    "other value heads": (
        {"value_pages": zeros(PAGES, SIZE, 1, DV)},
        ValueError,
        r"value_pages.*\(5, 1, 4, 6\)",
    ),
    "heads no multiple": (
        {"key_pages": zeros(PAGES, SIZE, 3, D)},
        ValueError,
        "key_pages.*3 heads.*4.*multiple",
    ),
    "pages of no slots": (
        {"key_pages": zeros(PAGES, 0, HK, D), "value_pages": zeros(PAGES, 0, HK, DV)},
        ValueError,
        "key_pages.*0 tokens.*at least 1",
    ),
    "pages of no dim": ({"value_pages": zeros(PAGES, SIZE, HK, 0)}, ValueError, "value_pages.*dim"),
    "the other layout": (
        {"page_layout": "bhsd"},
        ValueError,
        r"key_lengths.*12.*0 … 6",
    ),
    "no layout": ({"page_layout": "phsd"}, ValueError, "page_layout.*phsd.*bhsd.*bshd"),
    "layout of an int": ({"page_layout": 4}, TypeError, "page_layout.*int"),
    # packed queries
    "packed queries of four axes": (
        {"cu_query_lengths": [0, 1, 2]},
        ValueError,
        "query.*4 dimensions.*3",
    ),
    "packed queries in a layout": (
        {**PACKED, "layout": "bshd"},
        ValueError,
        "layout.*bshd.*packed",
    ),
    "falling": (
        {**PACKED, "cu_query_lengths": [0, 6, 5]},
        ValueError,
        "cu_query_lengths.*entry 1 is 6.*0 … 5",
    ),
    "not from 0": (
        {**PACKED, "cu_query_lengths": [1, 2, 5]},
        ValueError,
        "cu_query_lengths.*entry 0 is 1.*0",
    ),
    "not to the end": (
        {**PACKED, "cu_query_lengths": [0, 2, 4]},
        ValueError,
        "cu_query_lengths.*4.*5",
    ),
    "packed queries of another batch": (
        {**PACKED, "cu_query_lengths": [0, 2, 3, 5]},
        ValueError,
        r"key_lengths.*\(2,\).*\(3,\)",
    ),
    "cumulative floats": (
        {**PACKED, "cu_query_lengths": [0.0, 2.0, 5.0]},
        TypeError,
        "cu_query_lengths.*integer",
    ),
    "an empty list": ({**PACKED, "cu_query_lengths": []}, ValueError, "cu_query_lengths.*empty"),
    # out
    "out in the pages": (
        {"query": zeros(B, HK, SIZE, D), "out": VALUE_PAGES[:B].swapaxes(1, 2)},
        ValueError,
        "out.*overlaps value_pages",
    ),
    "out of another dtype": (
        {"out": zeros(B, H, S, DV, dtype=float)},
        TypeError,
        "out.*float64.*float32",
    ),
    "out of another shape": (
        {"out": zeros(B, H, S, D)},
        ValueError,
        r"out.*\(2, 4, 3, 8\).*\(2, 4, 3, 6\)",
    ),
    # options by the width of the table
    "mask of the lengths": (
        {"mask": np.ones((S, 8), bool)},
        ValueError,
        r"mask.*8\).*\(2, 4, 3, 12\)",
    ),
    "segments of other keys": (
        {"query_segments": np.zeros((B, S), int), "key_segments": np.zeros((B, 8), int)},
        ValueError,
        "key_segments.*8.*12",
    ),
    "more queries than keys in a tree": (
        {"tree_parents": [-1, 0, 1], "key_lengths": [12, 2]},
        ValueError,
        "tree_parents.*entry 1.*2 keys.*3",
    ),
    "no option": ({"cu_key_lengths": [0, 1]}, TypeError, "cu_key_lengths"),
}


def refuse(change: dict[str, Any], exception: type[Exception], message: str) -> None:
    out = np.full((B, H, S, DV), 7, np.float32)
    with pytest.raises(exception, match=message) as caught:
        attncore.attention_paged(**{**GOOD, "out": out, **change})
    assert type(caught.value) is exception
    assert re.search(rf"\b{message.split('.*', maxsplit=1)[0]}\b", str(caught.value))
    assert (out == 7).all(), "out= was touched before everything was checked"
    assert (VALUE_PAGES == 0).all()


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    refuse(*BAD[case])


@pytest.mark.parametrize("name", ["key_scale", "value_scale", "block_table", "key_lengths"])
def test_out_must_not_overlap_what_pages_come_with(name: str) -> None:
    memory = zeros(B, H, S, DV)
    given = {
        **GOOD,
        "key_pages": KEY_PAGES.astype(np.int8),
        "value_pages": VALUE_PAGES.astype(np.int8),
        "key_scale": zeros(PAGES, SIZE, HK),
        "value_scale": zeros(PAGES, SIZE, HK),
    }
    own = np.asarray(given[name], None if name.endswith("scale") else np.int32)
    inside = memory.view(own.dtype).reshape(-1)[5 : 5 + own.size].reshape(own.shape)
    inside[...] = own
    with pytest.raises(ValueError, match=f"out: overlaps {name}"):
        attncore.attention_paged(**{**given, name: inside, "out": memory})
    assert (inside == own).all()


OPTIONS = {"query", "key", "value", "key_lengths", "mask", "bias", "out", "key_segments"}


@pytest.mark.parametrize(
    "case", [name for name, (change, *_) in ATTENTION.items() if not OPTIONS & {*change}]
)
def test_options_are_checked_as_attention_checks_them(case: str) -> None:
    change, exception, _ = ATTENTION[case]
    with pytest.raises(exception, match=next(iter(change))):
        attncore.attention_paged(**{**GOOD, **change})


def test_there_are_enough_rows() -> None:
    assert len(BAD) >= 30


def test_a_good_call() -> None:
    assert (attncore.attention_paged(**GOOD) == 0).all()
    assert (attncore.attention_paged(**{**GOOD, **PACKED}) == 0).all()
