"""AttentionState: bad input.  What fails leaves the state as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import assert_same_bits, zeros

B, H, HK, S, K, D, DV = 2, 4, 2, 5, 7, 8, 6
State: Any = attncore.AttentionState  # what the type checker would not let through


QUERY = zeros(B, H, S, D)
# name: (what differs from a good call, exception, message)
MAKING: dict[str, tuple[dict[str, Any], Any, str]] = {
    "query of a list": ({"query": [1.0]}, TypeError, "query.*array.*list"),
    "query of ints": ({"query": zeros(S, D, dtype=int)}, TypeError, "query.*int64.*float32"),
    "query of one axis": ({"query": zeros(D)}, ValueError, "query.*1.*2, 3 or 4"),
    "query without dims": ({"query": zeros(S, 0)}, ValueError, r"query.*\(1, 1, 5, 0\)"),
    "query without heads": ({"query": zeros(B, 0, S, D)}, ValueError, "query.*1 head"),
    "dtype of 16 bits": ({"dtype": np.float16}, TypeError, "dtype.*float16.*float32 or float64"),
    "dtype of ints": ({"dtype": int}, TypeError, "dtype.*int64.*float32 or float64"),
    "dtype of another order": ({"dtype": ">f4"}, TypeError, "dtype.*>f4.*float32 or float64"),
    "no dtype": ({"dtype": "floaty"}, TypeError, "floaty"),
    "value_dim 0": ({"value_dim": 0}, ValueError, "value_dim: is 0, must be at least 1"),
    "value_dim of a float": ({"value_dim": 6.0}, TypeError, "value_dim.*int.*float"),
    "huge value_dim": ({"value_dim": 2**40}, ValueError, "value.*dim must be 1"),
    "causal, no offset": ({"causal": True}, ValueError, "query_offset: is not given.*causal"),
    "window, no offset": ({"window": (3, None)}, ValueError, "query_offset: is not given.*window"),
    "alibi, no offset": ({"alibi": [1.0] * H}, ValueError, "query_offset: is not given.*alibi"),
    "relative bias, no offset": (
        {"relative_bias": attncore.RelativeBias(zeros(H, 32))},
        ValueError,
        "query_offset: is not given.*relative_bias",
    ),
    "offset of a float": ({"query_offset": 1.5}, TypeError, "query_offset.*float.*integer"),
    "far offset": ({"query_offset": 2**60}, ValueError, r"query_offset.*1152921504606846976.*59"),
    "offsets of another batch": ({"query_offset": [1, 2, 3]}, ValueError, r"query_offset.*3.*2"),
    "alibi of another width": (
        {"alibi": [1.0], "query_offset": 0},
        ValueError,
        "alibi: has 1 slopes, query has 4 heads",
    ),
    "alibi of 16 bits": (
        {"alibi": zeros(H, dtype=np.float16), "query_offset": 0},
        TypeError,
        "alibi.*float16.*float32",
    ),
    "softcap 0": ({"softcap": 0.0}, ValueError, "softcap: is 0, must be"),
    "scale of text": ({"scale": "large"}, TypeError, "scale.*number.*str"),
    "scale that is not finite": ({"scale": np.inf}, ValueError, "scale: is inf, must be finite"),
    "sinks of another width": (
        {"sinks": [1.0]},
        ValueError,
        r"sinks: shape is \(1,\), must be \(4,\) \(head\)",
    ),
    "window of one": ({"window": (3,)}, ValueError, "window.*pair.*1"),
    "negative window": ({"window": (-3, 0), "query_offset": 0}, ValueError, "window.*-3"),
    "segments of another length": (
        {"query_segments": zeros(B, S + 1, dtype=int)},
        ValueError,
        r"query_segments.*\(2, 6\).*\(2, 5\)",
    ),
    "lengths past the queries": ({"query_lengths": [S, S + 1]}, ValueError, "query_lengths.*6.*5"),
    "layout": ({"layout": "sbhd"}, ValueError, "layout.*sbhd"),
    "unknown option": ({"dropout_p": 0.1}, TypeError, "dropout_p"),
}


@pytest.mark.parametrize("case", MAKING)
def test_making(case: str) -> None:
    change, exception, message = MAKING[case]
    given = {"query": QUERY, **change}
    with pytest.raises(exception, match=message):
        State(given.pop("query"), **given)


KEY, VALUE = zeros(B, HK, K, D), zeros(B, HK, K, DV)
UPDATES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "no key": ({"key": None}, TypeError, "key.*array.*None"),
    "value of a list": ({"value": [1.0]}, TypeError, "value.*array.*list"),
    "masked value": ({"value": np.ma.masked_array(VALUE)}, TypeError, "value.*masked"),
    "key of another rank": ({"key": KEY[0]}, ValueError, "key: has 3 dimensions, query has 4"),
    "value of another rank": ({"value": VALUE[0]}, ValueError, "value: has 3.*query has 4"),
    "key of ints": ({"key": KEY.astype(np.int16)}, TypeError, "key.*int16"),
    "key of float64": ({"key": KEY.astype(float)}, TypeError, "key.*float64.*float32"),
    "value of another order": ({"value": VALUE.astype(">f4")}, TypeError, "value.*>f4"),
    "key of another dim": ({"key": zeros(B, HK, K, D + 1)}, ValueError, r"key.*9.*8"),
    "key of another batch": ({"key": zeros(1, HK, K, D)}, ValueError, r"key.*\(1, 2, 7, 8\)"),
    "key heads": ({"key": zeros(B, 3, K, D)}, ValueError, "key: has 3 heads.*4"),
    "no key heads": ({"key": zeros(B, 0, K, D)}, ValueError, "key: has 0 heads"),
    "fewer values": ({"value": VALUE[:, :, 1:]}, ValueError, r"value.*\(2, 2, 6, 6\)"),
    "value of another dim": (
        {"value": zeros(B, HK, K, D)},
        ValueError,
        "value: has a dim of 8, the state's value_dim is 6",
    ),
    "mask of another width": ({"mask": zeros(K + 1, dtype=bool)}, ValueError, "mask.*8.*7"),
    "mask of floats": ({"mask": zeros(K)}, TypeError, "mask.*float32.*bool"),
    "bias of 16 bits": ({"bias": zeros(K, dtype=np.float16)}, TypeError, "bias.*float16.*float32"),
    "bias of another width": ({"bias": zeros(K - 1)}, ValueError, "bias.*6.*7"),
    "key_segments alone": (
        {"key_segments": zeros(B, K, dtype=int)},
        ValueError,
        "query_segments: is not given",
    ),
    "lengths past the keys": ({"key_lengths": [K, K + 1]}, ValueError, "key_lengths.*8.*7"),
    "negative lengths": ({"key_lengths": [-1, 0]}, ValueError, "key_lengths.*-1"),
    "negative position": ({"first_key": -1}, ValueError, "first_key: is -1, must be 0"),
    "far position": ({"first_key": 2**59}, ValueError, "first_key: is 576460752303423488"),
    "position of a float": ({"first_key": 0.5}, TypeError, "first_key.*float.*integer"),
    "positions of another batch": ({"first_key": [1, 2, 3]}, ValueError, "first_key.*3.*2"),
    "positions of two axes": ({"first_key": [[1, 2]]}, ValueError, "first_key.*2 dimensions"),
    "scales of another width": (
        {"key_scale": zeros(B, HK, K + 1)},
        ValueError,
        r"key_scale.*\(2, 2, 8\).*\(2, 2, 7\)",
    ),
    "scales with a dim": ({"value_scale": VALUE}, ValueError, "value_scale: has 4.*must have 3"),
    "scales of 16 bits": (
        {"key_scale": zeros(B, HK, K, dtype=np.float16)},
        TypeError,
        "key_scale.*float16.*float32",
    ),
    "no threads": ({"num_threads": 0}, ValueError, "num_threads.*0.*1"),
    "dropout": ({"dropout_p": 0.1}, TypeError, "dropout_p"),
}


@pytest.mark.parametrize("case", UPDATES)
def test_updates(case: str, rng: np.random.Generator) -> None:
    change, exception, message = UPDATES[case]
    state = State(rng.standard_normal((B, H, S, D), dtype=np.float32), value_dim=DV)
    key, value = (rng.standard_normal(a.shape, dtype=np.float32) for a in (KEY, VALUE))
    state.update(key, value)
    before = state.result()
    given = {"key": key, "value": value, **change}
    with pytest.raises(exception, match=message):
        state.update(given.pop("key"), given.pop("value"), **given)
    assert state.next_key.tolist() == [K, K]
    for ours, theirs in zip(state.result(), before, strict=True):
        assert_same_bits(ours, theirs)


def test_a_float64_state_takes_floats() -> None:
    state = State(QUERY, dtype=float)
    with pytest.raises(TypeError, match="value: dtype is int8, accepted is float64 or float32"):
        state.update(KEY, KEY.astype(np.int8))


def test_a_state_of_segments_needs_those_of_keys() -> None:
    state = State(QUERY, value_dim=DV, query_segments=zeros(B, S, dtype=int))
    with pytest.raises(ValueError, match="key_segments: is not given"):
        state.update(KEY, VALUE)


OTHERS: dict[str, dict[str, Any]] = {
    "query": {"query": QUERY + 1},
    "dtype": {"dtype": np.float64},
    "value_dim": {"value_dim": DV},
    "layout": {"query": zeros(B, S, H, D), "layout": "bshd"},
    "scale": {"scale": 3.0},
    "softcap": {"softcap": 3.0},
    "window": {"causal": True},
    "query_offset": {"query_offset": 4},
    "alibi": {"alibi": [1.0] * H},
    "relative_bias": {"relative_bias": attncore.RelativeBias(zeros(H, 32))},
    "sinks": {"sinks": [0.0] * H},
    "query_segments": {"query_segments": zeros(B, S, dtype=int)},
    "query_lengths": {"query_lengths": [S, S]},
}


@pytest.mark.parametrize("name", OTHERS)
def test_merging_states_of_something_else(name: str) -> None:
    first, second = ({"query": QUERY, "query_offset": 3, **o} for o in ({}, OTHERS[name]))
    states = [State(given.pop("query"), **given) for given in (first, second)]
    for state, other in (states, states[::-1]):
        with pytest.raises(ValueError, match=f"other: has another {name}, must be a state of"):
            state.merge(other)


TABLE = zeros(H, 32)
NEARLY: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "left": ("window", {"window": (3, 2)}, {"window": (4, 2)}),
    "right": ("window", {"window": (3, 2)}, {"window": (3, 1)}),
    "bidirectional": (
        "relative_bias",
        {"relative_bias": attncore.RelativeBias(TABLE, True)},
        {"relative_bias": attncore.RelativeBias(TABLE, False)},
    ),
    "max_distance": (
        "relative_bias",
        {"relative_bias": attncore.RelativeBias(TABLE, True, 128)},
        {"relative_bias": attncore.RelativeBias(TABLE, True, 129)},
    ),
    "table": (
        "relative_bias",
        {"relative_bias": attncore.RelativeBias(TABLE)},
        {"relative_bias": attncore.RelativeBias(TABLE + 1)},
    ),
}


@pytest.mark.parametrize("case", NEARLY)
def test_merging_states_of_nearly_the_same(case: str) -> None:
    name, *options = NEARLY[case]
    state, other = (State(QUERY, query_offset=3, **given) for given in options)
    with pytest.raises(ValueError, match=f"other: has another {name}, must be a state of"):
        state.merge(other)


def test_merging_what_is_no_other_state() -> None:
    state = State(QUERY)
    with pytest.raises(ValueError, match="other: is the state itself"):
        state.merge(state)
    with pytest.raises(TypeError, match="other: must be an AttentionState, is tuple"):
        state.merge(state.result())
    with pytest.raises(ValueError, match="num_threads"):
        state.merge(State(QUERY), num_threads=0)
