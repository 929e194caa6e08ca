"""MultiHeadAttention: state dicts, files, copies."""

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
from kit import BFLOAT16, DTYPES, assert_same_bits, zeros

STATES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "missing": (
        {"in_proj_bias": None, "out_proj.bias": None},
        ValueError,
        "in_proj_bias, out_proj.bias: not there",
    ),
    "unknown": (
        {"q_proj_weight": zeros(1), "z": zeros(1)},
        ValueError,
        "q_proj_weight, z: not known.*in_proj_weight",
    ),
    "misshapen": (
        {"in_proj_weight": zeros(16, 48), "out_proj.bias": zeros(1, 16)},
        ValueError,
        r"in_proj_weight: .*\(16, 48\).*\(48, 16\); out_proj.bias: .*\(1, 16\).*\(16,\)",
    ),
    "all at once": (
        {"in_proj_weight": zeros(1), "z": zeros(1), "out_proj.bias": None},
        ValueError,
        "out_proj.bias: not there; z: not known.*; in_proj_weight: shape",
    ),
    "ints": ({"in_proj_bias": zeros(48, dtype=int)}, TypeError, "in_proj_bias.*int64.*float"),
    "text": ({"in_proj_bias": "x"}, TypeError, "in_proj_bias.*float"),
    "masked": ({"in_proj_bias": np.ma.masked_array(zeros(48))}, TypeError, "in_proj_bias.*masked"),
}


@pytest.mark.parametrize("case", STATES)
def test_states(case: str) -> None:
    """Nothing is half loaded."""
    change, exception, message = STATES[case]
    layer = attncore.MultiHeadAttention(16, 4)
    before = layer.state_dict()
    state = {name: zeros(*array.shape) for name, array in before.items()} | change
    state = {name: array for name, array in state.items() if array is not None}
    with pytest.raises(exception, match=message):
        layer.load_state_dict(state)
    for name, array in layer.state_dict().items():
        assert_same_bits(array, before[name], name)


def test_loading_what_is_there() -> None:
    layer = attncore.MultiHeadAttention(16, 4)
    found = layer.load_state_dict({"z": 0, "out_proj.bias": np.arange(16.0)}, strict=False)
    assert found.missing_keys == ["in_proj_weight", "in_proj_bias", "out_proj.weight"]
    assert found.unexpected_keys == ["z"]
    np.testing.assert_array_equal(layer.parameters()["out_proj.bias"], np.arange(16))
    with pytest.raises(ValueError, match="in_proj_bias: shape"):
        layer.load_state_dict({"in_proj_bias": zeros(3)}, strict=False)


def test_loading_from_its_own_parameters() -> None:
    layer = attncore.MultiHeadAttention(16, 2, qk_norm=True)
    names = "q_norm.weight", "k_norm.weight"
    for name, gain in zip(names, (2, 3), strict=True):
        layer.parameters()[name][...] = gain
    views = layer.parameters()
    layer.load_state_dict({names[0]: views[names[1]], names[1]: views[names[0]]}, strict=False)
    assert [float(layer.parameters()[name][0]) for name in names] == [3, 2]


def test_rounding_that_raises_changes_nothing() -> None:
    layer = attncore.MultiHeadAttention(8, 2, dtype=np.float16)
    before = layer.state_dict()
    state = {name: np.full(array.shape, 0.5) for name, array in before.items()}
    state["out_proj.bias"][:] = 1e6
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        layer.load_state_dict(state)
    for name, array in layer.state_dict().items():
        assert_same_bits(array, before[name], name)


class Tensor:
    """As torch's: an array of it needs detach, and of bfloat16 float, too."""

    def __init__(self, array: Any, lacks: int) -> None:
        self.array, self.lacks = array, lacks

    def __array__(self, *_: Any, **__: Any) -> Any:
        if self.lacks:
            raise (RuntimeError if self.lacks == 2 else TypeError)
        return self.array

    def detach(self) -> Tensor:
        return Tensor(self.array, min(self.lacks, 1) if self.lacks == 2 else 0)

    def float(self) -> Tensor:
        return Tensor(self.array, 0)


@pytest.mark.parametrize("lacks", [0, 1, 2])
def test_tensors(lacks: int) -> None:
    first, second = (attncore.MultiHeadAttention(8, 2) for _ in range(2))
    second.load_state_dict({n: Tensor(a, lacks) for n, a in first.state_dict().items()})
    for name, array in first.state_dict().items():
        assert_same_bits(second.parameters()[name], array, name)


def full(dtype: Any = np.float32) -> attncore.MultiHeadAttention:
    return attncore.MultiHeadAttention(
        16,
        4,
        num_kv_heads=2,
        key_dim=6,
        value_dim=9,
        head_dim=6,
        add_bias_kv=True,
        add_zero_attn=True,
        rotary=attncore.Rotary(dims=4),
        qk_norm=1e-5,
        batch_first=False,
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_files(dtype: np.dtype[Any], tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    first, second = full(dtype), full(dtype)
    path = tmp_path / "layer.safetensors"
    path.write_text("something older")
    first.save(path)
    assert second.load(path) == ([], [])
    for name, array in first.state_dict().items():
        assert_same_bits(second.parameters()[name], array, name)
    assert [file.name for file in tmp_path.iterdir()] == ["layer.safetensors"]
    other = full(np.float64)
    other.load(str(path))
    for name, array in first.state_dict().items():
        assert_same_bits(other.parameters()[name], array.astype(np.float64), name)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path, layer = tmp_path / "layer.safetensors", full()
    path.write_bytes(b"no such file")
    with pytest.raises(ValueError, match=r"path: .*layer\.safetensors"):
        layer.load(path)
    with pytest.raises(FileNotFoundError):
        layer.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        layer.save(tmp_path / "none" / "layer.safetensors")
    attncore.MultiHeadAttention(16, 4).save(path)
    with pytest.raises(ValueError, match=r"q_proj_weight.*not there"):
        layer.load(path)


def test_files_with_something_else_in_them(tmp_path: Path) -> None:
    numpy: Any = pytest.importorskip("safetensors.numpy")
    path, layer = tmp_path / "layer.safetensors", full()
    numpy.save_file({**layer.state_dict(), "mask": np.zeros(3, bool)}, path)
    assert layer.load(path, strict=False) == ([], ["mask"])
    with pytest.raises(ValueError, match="mask: not known"):
        layer.load(path)


def test_files_keep_their_mode_and_may_have_long_names(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path, layer = tmp_path / ("x" * 255), full()
    layer.save(path)
    for mode in (0o600, 0o640, 0o444):
        path.chmod(mode)
        layer.save(path)
        assert path.stat().st_mode & 0o777 == mode


def test_files_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=re.escape("attncore[layers]")):
        full().save(tmp_path / "x")


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(how: str, rng: np.random.Generator) -> None:
    dtype = np.float32 if BFLOAT16 is None else BFLOAT16
    layer = full(dtype).eval()
    other = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert repr(other) == repr(layer)
    assert other.training is False
    assert other.option_gradients == attncore.Gradients()
    arrays = [rng.standard_normal((5, 2, w), dtype=np.float32).astype(dtype) for w in (16, 6, 9)]
    assert_same_bits(other(*arrays), layer(*arrays))
    layer.parameters()["bias_k"][...] = 0
    assert (other.parameters()["bias_k"] != 0).any()


class Named(attncore.MultiHeadAttention):
    name = ""


def test_copies_of_subclasses() -> None:
    layer = Named(16, 2)
    layer.name = "first"
    assert copy.deepcopy(layer).name == pickle.loads(pickle.dumps(layer)).name == "first"


def test_bools_of_numpy(rng: np.random.Generator) -> None:
    x = rng.standard_normal((5, 16), dtype=np.float32)
    flags: list[tuple[Any, Any]] = [(True, np.True_), (False, np.False_)]
    for ours, theirs in flags:
        one, other = (
            attncore.MultiHeadAttention(16, 2, qk_norm=flag, rotary=flag, seed=0)
            for flag in (ours, theirs)
        )
        assert repr(one) == repr(other)
        outs = [layer(x, need_weights=theirs) for layer in (one, other)]
        assert_same_bits(*(out[0] if ours else out for out in outs))


def test_repr() -> None:
    assert repr(attncore.MultiHeadAttention(16, 4)) == "MultiHeadAttention(16, 4)"
    assert repr(full(np.float64)) == (
        "MultiHeadAttention(16, 4, num_kv_heads=2, key_dim=6, value_dim=9, head_dim=6, add_bias_kv=True, "
        "add_zero_attn=True, rotary=Rotary(base=10000.0, dims=4, interleaved=False, frequencies=None, "
        "factor=1.0), qk_norm=1e-05, batch_first=False, dtype=float64)"
    )
