"""AttentionState: saved and resumed, copied, and keys in files larger than memory."""

from __future__ import annotations

import copy
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attncore
from kit import assert_same_bits, check_interrupted_save, inputs, run_child
from state_kit import make_state, sizes_to_cuts, updates

K = 60
OPTIONS: dict[str, Any] = {
    "causal": True,
    "window": (None, 5),
    "query_offset": [40, 50],
    "alibi": [0.1, 0.2, 0.3, 0.4],
    "relative_bias": attncore.RelativeBias(np.eye(4, 16, dtype=np.float32), False, 40),
    "softcap": 1 / 3,
    "scale": 0.1,
    "sinks": np.arange(4, dtype=np.float32),
    "query_segments": np.array([[0, 0, 1], [1, 1, 1]], np.int32),
    "query_lengths": [3, 2],
    "key_segments": np.ones((2, K), int),
}


@pytest.mark.parametrize("dtype", ["float16", "float32"])  # converted, or as it is
def test_what_is_saved_is_the_state_s_own(dtype: str) -> None:
    """Options are copied when the state is made: the caller's arrays may change before it is saved."""
    query = np.ones((2, 4, 3, 8), dtype)
    own: dict[str, Any] = {
        "query_offset": np.array([40, 50]),
        "query_segments": np.ones((2, 3), np.int64),
        "query_lengths": np.array([3, 2]),
        "alibi": np.ones(4, np.float32),
        "sinks": np.ones(4, np.float32),
    }
    table = np.ones((4, 16), np.float32)
    state = attncore.AttentionState(query, relative_bias=attncore.RelativeBias(table), **own)
    for array in (*own.values(), table):
        array[...] = 0
    pickle.loads(pickle.dumps(state)).merge(state)  # refused if an option differs


def through_a_file(state: attncore.AttentionState, folder: Path) -> attncore.AttentionState:
    pytest.importorskip("safetensors")
    path = folder / "state.safetensors"
    state.save(path)
    assert [file.name for file in folder.iterdir()] == [path.name]
    return attncore.AttentionState.load(str(path))


@pytest.mark.parametrize("how", ["file", "pickle", "copy", "deepcopy"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", [OPTIONS, {}], ids=["all options", "plain"])
def test_going_on_has_the_same_bits(
    how: str, dtype: str, options: dict[str, Any], tmp_path: Path, rng: np.random.Generator
) -> None:
    """As no interruption; what was copied is not what goes on."""
    q, k, v = inputs(rng, 3, K, batch=2, heads=4, kv_heads=2, value_dim=9, dtype=dtype)
    parts = list(updates(k, v, sizes_to_cuts((7,), K), **options))
    whole = make_state(q, v, **options)
    broken = make_state(q, v, **options)
    for number, (arrays, own) in enumerate(parts):
        whole.update(*arrays, **own)
        broken.update(*arrays, **own)
        if number % 3 == 1:
            before, results = broken, broken.result()
            broken = {
                "file": lambda state: through_a_file(state, tmp_path),
                "pickle": lambda state: pickle.loads(pickle.dumps(state)),
                "copy": copy.copy,
                "deepcopy": copy.deepcopy,
            }[how](broken)
            assert repr(broken) == repr(whole)
            for ours, theirs in zip(broken.result(), results, strict=True):
                assert_same_bits(ours, theirs)
    for ours, theirs in zip(broken.result(), whole.result(), strict=True):
        assert_same_bits(ours, theirs)
    assert broken.next_key.tolist() == whole.next_key.tolist() == [K, K]
    assert before.next_key.tolist() != [K, K]
    whole.merge(broken)  # every option came through


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4), (2, 3, 5, 4)])
def test_axes_are_kept(layout: Any, shape: tuple[int, ...], rng: np.random.Generator) -> None:
    x = rng.standard_normal(shape)
    state = attncore.AttentionState(x, layout=layout)
    assert f"query={shape}" in repr(state)
    other = copy.copy(state)
    for each in (state, other):
        each.update(x, x)
    assert_same_bits(state.result()[0], other.result()[0])
    whole = attncore.attention(x, x, x, layout=layout)
    np.testing.assert_allclose(state.result()[0], whole, rtol=0, atol=1e-15)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "state.safetensors"
    attncore.MultiHeadAttention(16, 4).save(path)
    with pytest.raises(ValueError, match=r"path: .*state\.safetensors holds no AttentionState"):
        attncore.AttentionState.load(path)
    path.write_bytes(b"no such file")
    with pytest.raises(ValueError, match=r"path: .*state\.safetensors is no safetensors"):
        attncore.AttentionState.load(path)
    with pytest.raises(FileNotFoundError):
        attncore.AttentionState.load(tmp_path / "none")
    state = attncore.AttentionState(np.ones((3, 4), np.float32))
    content = state.__getstate__()
    del content["arrays"]["sum"]
    with pytest.raises(ValueError, match="state: has no sum"):
        state.__setstate__(content)
    content["arrays"]["sum"] = np.ones(3)
    with pytest.raises(ValueError, match="state: sum is of another shape"):
        state.__setstate__(content)


def test_damaged_files(tmp_path: Path) -> None:
    numpy: Any = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "state.safetensors"
    attncore.AttentionState(np.ones((3, 4), np.float32)).save(path)
    arrays = numpy.load_file(path)
    for notes in ("{}", "[]", '{"rank": 2, "layout": "bhsd"}'):
        path.write_bytes(numpy.save(arrays, {"attncore.AttentionState": notes}))
        with pytest.raises(ValueError, match=r"path: .*holds no whole AttentionState"):
            attncore.AttentionState.load(path)
    cache = attncore.KVCache(1, 1, 4, capacity=3, dtype="int8")
    cache.save(path)
    with pytest.raises(ValueError, match="holds no AttentionState"):
        attncore.AttentionState.load(path)


def test_numpy_s_numbers_in_options(tmp_path: Path) -> None:
    """And a relative bias as a tuple: what `attention` takes, can be saved."""
    pytest.importorskip("safetensors")
    x = np.random.default_rng(0).standard_normal((2, 5, 8), np.float32)
    table = np.random.default_rng(1).standard_normal((2, 32), np.float32)
    for bias in (
        attncore.RelativeBias(table, np.bool_(True), np.int64(128)),  # type: ignore[arg-type]
        (table, True, 128),
    ):
        options: Any = {"query_offset": 0, "relative_bias": bias}
        state = attncore.AttentionState(x, **options)
        state.update(x, x)
        state.save(tmp_path / "state")
        other = attncore.AttentionState.load(tmp_path / "state")
        assert_same_bits(other.result()[0], attncore.attention(x, x, x, **options))


def test_three_slopes_in_a_tuple(tmp_path: Path) -> None:
    """They are no relative bias."""
    pytest.importorskip("safetensors")
    x = np.random.default_rng(0).standard_normal((3, 5, 8), np.float32)
    options: Any = {"query_offset": 0, "alibi": (0.5, 0.25, 0.125), "sinks": (0.5, -1.0, 2.0)}
    state = attncore.AttentionState(x, **options)
    state.update(x, x)
    state.save(tmp_path / "state")
    out = attncore.AttentionState.load(tmp_path / "state").result()[0]
    assert_same_bits(out, state.result()[0])
    np.testing.assert_allclose(out, attncore.attention(x, x, x, **options), rtol=0, atol=1e-6)


def test_half_slopes_and_sinks_of_a_double_state() -> None:
    half = np.ones(2, np.float16)
    table = attncore.RelativeBias(np.ones((2, 32), np.float16))
    attncore.AttentionState(
        np.ones((2, 5, 8), np.float16),
        dtype=np.float64,
        query_offset=0,
        sinks=half,
        alibi=half,
        relative_bias=table,
    )


def test_slopes_and_sinks_in_query_s_dtype() -> None:
    for query in (np.ones((2, 5, 8), np.float16), np.ones((2, 5, 8))):
        kind = query.dtype
        options: Any = {"query_offset": 0, "sinks": np.ones(2, kind), "alibi": np.ones(2, kind)}
        options["relative_bias"] = attncore.RelativeBias(np.ones((2, 32), kind))
        state = attncore.AttentionState(query, dtype=np.float32, **options)
        key = np.ones((2, 5, 8), np.float32)
        state.update(key, key)
        out, _ = state.result()
        np.testing.assert_allclose(
            out,
            attncore.attention(
                key,
                key,
                key,
                sinks=[1.0, 1.0],
                alibi=[1.0, 1.0],
                query_offset=0,
                relative_bias=attncore.RelativeBias(np.ones((2, 32), np.float32)),
            ),
            rtol=1e-6,
        )


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("safetensors")
    state, path = attncore.AttentionState(np.ones((3, 4), np.float32)), tmp_path / "state"
    state.save(path)
    check_interrupted_save(lambda: state.save(path), path, monkeypatch)
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def test_files_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=re.escape("attncore[layers]")):
        attncore.AttentionState(np.ones((3, 4), np.float32)).save(tmp_path / "x")


LARGE = """
import numpy as np
import attncore

shape, path = {shape}, {path!r}
with open(path, "wb") as file:
    file.truncate(np.dtype("{dtype}").itemsize * int(np.prod(shape)))  # a hole: zeros, no disk
pairs = np.memmap(path, "{dtype}", "r+", shape=shape)  # (key or value, token, dim)
count = shape[1]
for at in (0, count // 2, count - 1):
    pairs[1, at] = 1024
pairs.flush()
query = np.ones((2, shape[2]), np.float32)
small = np.ones((9, shape[2]), np.float32)
attncore.attention(query, small, small)  # libraries and threads are loaded
state = attncore.AttentionState(query, dtype="{state}")
pairs = np.memmap(path, "{dtype}", "r", shape=shape)
state.update(*pairs)
out, lse = state.result()
assert np.all(out == 3 * 1024 / count), out
assert np.allclose(lse, np.log(count)), lse
with open("/proc/self/status") as lines:
    print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("shape", "dtype", "state"),
    [
        pytest.param((2, 2**22, 128), "float32", "float32", marks=pytest.mark.slow),  # 4 GiB
        ((2, 2**19, 256), "float32", "float64"),  # 1 GiB, converted
        ((2, 2**20, 256), "float16", "float32"),  # 1 GiB
    ],
)
def test_files_larger_than_memory(
    shape: tuple[int, ...], dtype: str, state: str, tmp_path: Path
) -> None:
    """4 GiB of keys and values at less than 300 MB resident, at the peak."""
    path = str(tmp_path / "pairs")
    code = LARGE.format(shape=shape, dtype=dtype, state=state, path=path)
    try:
        peak = float(run_child(code, timeout=300))
    finally:
        Path(path).unlink(missing_ok=True)
    assert peak < 300


@pytest.mark.parametrize("mode", ["r+", "c"])
@pytest.mark.parametrize("order", ["tokens", "heads", "dims"])
def test_files_keep_what_was_written(mode: Any, order: str, tmp_path: Path) -> None:
    """Pages are given back, not lost: neither of shared maps nor of those that are copied on write."""
    rng = np.random.default_rng(1)
    shape = {"tokens": (2, 3, 9000, 32), "heads": (9000, 2, 3, 32), "dims": (32, 2, 3, 9000)}[order]
    axes = {"tokens": (0, 1, 2, 3), "heads": (1, 2, 0, 3), "dims": (1, 2, 3, 0)}[order]
    path = tmp_path / "pairs"
    path.write_bytes(bytes(4 * 9000 * 2 * 3 * 32))
    whole: Any = np.memmap(path, np.float32, mode, shape=shape)
    whole[...] = rng.standard_normal(shape, dtype=np.float32)  # pages that are not written yet
    copied = np.array(whole)
    key, value = whole.transpose(axes), np.asarray(whole.transpose(axes))[:, ::-1, ::-1]
    query = rng.standard_normal((2, 3, 2, 32))
    state = attncore.AttentionState(query)  # float64: in stretches of 4 MB
    state.update(key, value)
    plain = attncore.AttentionState(query)
    plain.update(copied.transpose(axes), copied.transpose(axes)[:, ::-1, ::-1])
    for ours, theirs in zip(state.result(), plain.result(), strict=True):
        assert_same_bits(ours, theirs)
    assert_same_bits(np.array(whole), copied)
