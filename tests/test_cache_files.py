"""Caches in files: what is saved comes back, and nothing that does not fit is taken."""

from __future__ import annotations

import copy
import json
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attncore
from cache_kit import KINDS, QUANTISED, STORAGE, make_cache, query_dtype
from kit import assert_same_bits, normal
from reference import Array

safetensors_numpy: Any = pytest.importorskip("safetensors.numpy")


def filled(kind: str, rng: np.random.Generator, **settings: Any) -> Any:
    """Three entries of different lengths, one of them empty; if paged, forks and a free number too."""
    cache = make_cache(kind, 3, 2, 6, value_dim=4, page_size=4, **settings)
    tokens = rng.standard_normal((3, 2, 11, 6))
    cache.append(tokens, tokens[..., :4], lengths=[11, 0, 5])
    if isinstance(cache, attncore.PagedKVCache):
        fork = cache.fork(0)
        cache.add()
        cache.fork(0)
        cache.free(4)
        cache.truncate(9, entries=fork)
        cache.append(tokens[:1], tokens[:1, :, :, :4], entries=[5], lengths=[2])
    return cache


def content(cache: Any) -> list[Array]:
    entries = cache.entries if isinstance(cache, attncore.PagedKVCache) else range(cache.batch)
    return [array for entry in entries for array in cache.gather(entry)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", STORAGE)
def test_round_trip(kind: str, storage: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """The same tokens in the same entries, and the same pages shared; then both go on alike."""
    cache, path = filled(kind, rng, dtype=storage), tmp_path / "cache.safetensors"
    path.write_text("something older")
    cache.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    other = filled(kind, rng, dtype=storage)
    other.load(str(path))
    assert other.lengths.tolist() == cache.lengths.tolist()
    for ours, theirs in zip(content(other), content(cache), strict=True):
        assert_same_bits(ours, theirs)
    if kind == "PagedKVCache":
        assert other.free_pages == cache.free_pages
        counts = [np.sort(c.reference_counts()).tolist() for c in (other, cache)]
        assert counts[0] == counts[1]
    entries = np.flatnonzero(cache.lengths >= 0)
    step = normal(rng, len(entries), 2, 3, 6)
    query = normal(rng, len(entries), 4, 3, 6, dtype=query_dtype(storage))
    for one in (cache, other):
        one.append(step, step[..., :4])
    assert_same_bits(other.attend(query), cache.attend(query))


@pytest.mark.parametrize("kind", KINDS)
def test_room_may_differ(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    cache, path = filled(kind, rng), tmp_path / "cache"
    cache.save(path)
    if kind == "KVCache":
        small: Any = attncore.KVCache(3, 2, 6, value_dim=4, capacity=11)
        tiny: Any = attncore.KVCache(3, 2, 6, value_dim=4, capacity=10)
    else:
        used = cache.pages - cache.free_pages
        small = attncore.PagedKVCache(used, 4, 2, 6, value_dim=4)
        tiny = attncore.PagedKVCache(used - 1, 4, 2, 6, value_dim=4)
    small.load(path)
    for ours, theirs in zip(content(small), content(cache), strict=True):
        assert_same_bits(ours, theirs)
    with pytest.raises(MemoryError, match="state: has"):
        tiny.load(path)


def test_pages_that_a_window_gave_back(tmp_path: Path, rng: np.random.Generator) -> None:
    cache = attncore.PagedKVCache(30, 4, 1, 8, window=5)
    cache.add()
    tokens = normal(rng, 1, 1, 40, 8)
    cache.append(tokens, tokens)
    cache.append(tokens[:, :, :3], tokens[:, :, :3])
    cache.save(tmp_path / "cache")
    other = attncore.PagedKVCache(4, 4, 1, 8, window=5)
    other.load(tmp_path / "cache")
    assert (other.block_table(0) < 0).tolist() == (cache.block_table(0) < 0).tolist()
    query = normal(rng, 1, 2, 3, 8)
    assert_same_bits(other.attend(query), cache.attend(query))
    with pytest.raises(ValueError, match="given back"):
        other.attend(normal(rng, 1, 2, 20, 8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", ["float32", "bfloat16", *QUANTISED])
def test_the_format(kind: str, storage: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """As `load` documents it, for other programs."""
    cache, path = filled(kind, rng, dtype=storage, rotary=True), tmp_path / "cache"
    cache.save(path)
    arrays = safetensors_numpy.load_file(path)
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert header["attncore"] == kind
    assert header["version"] == "1"
    assert json.loads(header["settings"])["dtype"] == storage
    bits = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}.get(storage, np.uint8)
    assert arrays["key"].dtype == bits
    tokens = 16 if kind == "KVCache" else arrays["page_lengths"].sum()
    assert arrays["key"].shape == (2, tokens, 3 if storage == "int4" else 6)
    assert arrays["value"].shape == (2, tokens, 2 if storage == "int4" else 4)
    assert arrays["lengths"].tolist() == cache.lengths.tolist()
    names = {"key", "value", "lengths"}
    if storage in QUANTISED:
        names |= {"key_scale", "value_scale"}
        assert arrays["key_scale"].shape == (2, tokens)
    if kind == "PagedKVCache":
        names |= {"page_lengths", "tables", "given_back"}
        tables = [cache.block_table(entry) for entry in cache.entries]
        assert len(arrays["tables"]) == sum(map(len, tables))
    assert set(arrays) == names


def rewritten(path: Path, **changes: Any) -> None:
    """The same file with other arrays (None: without it) or another metadata."""
    arrays = safetensors_numpy.load_file(path)
    raw = path.read_bytes()
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    metadata |= changes.pop("metadata", {})
    for name, change in changes.items():
        if change is None:
            del arrays[name]
        else:
            arrays[name] = np.ascontiguousarray(change(arrays[name]))
    path.write_bytes(safetensors_numpy.save(arrays, metadata))


def at(index: int, value: int) -> Any:
    def change(array: Array) -> Array:
        array = array.copy()
        array[index] = value
        return array

    return change


# In the file, entry 0 has pages 0, 1, 2; 2 has 3, 4; 3 has 0, 1, 2 and 5 copies the last for 13 tokens.
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a page past the pool": ({"tables": at(0, 99)}, "entry 0 has page 99, must be 0 …"),
    "a negative page": ({"tables": at(1, -1)}, "entry 0 has page -1, must be 0 …"),
    "a page twice": ({"tables": at(1, 0)}, "entry 0 has page 0 twice"),
    "a page that is too short": ({"tables": at(0, 4)}, "page 4 has 1 tokens, fewer than entry 0"),
    "too few pages": ({"tables": lambda t: t[:-1]}, "pages, must have"),
    "too many pages": ({"tables": lambda t: np.append(t, 0)}, "has more pages in its tables"),
    "a length past the tables": ({"lengths": at(0, 13)}, "page 2 has 3 tokens, fewer than entry 0"),
    "a huge length": ({"lengths": at(5, 2**62)}, "entry 5 has the length 4611686018427387904"),
    "a negative length": ({"lengths": at(0, -2)}, "has more pages in its tables"),
    "pages given back": (
        {"given_back": at(0, 1)},
        "entry 0 has given 1 of 3 pages back, without a window",
    ),
    "too many given back": ({"given_back": at(0, 9)}, "entry 0 has given 9 of 3 pages back"),
    "fewer given_back": ({"given_back": lambda g: g[:-1]}, "lengths, 6 tables and 5 numbers"),
    "an empty page": ({"page_lengths": at(0, 0)}, "a page of 0 tokens, must be 1 … 4"),
    "a long page": ({"page_lengths": at(0, 5)}, "a page of 5 tokens, must be 1 … 4"),
    "a page of nobody": (
        {
            "page_lengths": lambda p: np.append(p, 1),
            "key": lambda k: k[:, [*range(k.shape[1]), 0]],
            "value": lambda v: v[:, [*range(v.shape[1]), 0]],
        },
        "has a page that no entry has",
    ),
    "no key": ({"key": None}, "has no key"),
    "fewer tokens": ({"key": lambda k: k[:, :-1]}, "key: shape is"),
    "another dim": ({"value": lambda v: v[:, :, :-1]}, "value: shape is"),
    "another dtype": ({"key": lambda k: k.astype(np.float64)}, "key is 3-D of float64, must be"),
    "another rank": ({"key": lambda k: k[0]}, "key is 2-D of float32, must be 3-D"),
    "no lengths": ({"lengths": None}, "has no lengths"),
    "int32 lengths": ({"lengths": lambda n: n.astype(np.int8)}, "lengths is 1-D of int8"),
    "another kind": ({"metadata": {"attncore": "KVCache"}}, "is no PagedKVCache of version 1"),
    "another version": ({"metadata": {"version": "2"}}, "is no PagedKVCache of version 1"),
    "no settings": ({"metadata": {"settings": "3"}}, "has no settings"),
    "other settings": ({"metadata": {"settings": '{"dim": 5}'}}, "has .*dim=5, not 6"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_are_wrong(case: str, tmp_path: Path, rng: np.random.Generator) -> None:
    changes, message = BAD[case]
    path = tmp_path / "cache"
    filled("PagedKVCache", rng).save(path)
    rewritten(path, **dict(changes))
    cache = filled("PagedKVCache", rng)
    before, counts = content(cache), cache.reference_counts().tolist()
    with pytest.raises(ValueError, match=message):
        cache.load(path)
    assert cache.reference_counts().tolist() == counts
    for now, then in zip(content(cache), before, strict=True):
        assert_same_bits(now, then)


def test_pages_given_back_in_files(tmp_path: Path, rng: np.random.Generator) -> None:
    """Whole ones may be, where there is a window; the last, partly filled one never is."""
    path = tmp_path / "cache"
    cache = make_cache("PagedKVCache", 2, 2, 6, page_size=4, window=2)
    tokens = rng.standard_normal((2, 2, 10, 6))
    cache.append(tokens[:, :, :9], tokens[:, :, :9])
    cache.append(tokens[:, :, 9:], tokens[:, :, 9:])
    assert isinstance(cache, attncore.PagedKVCache)
    assert (cache.block_table(0) < 0).any()
    cache.save(path)
    make_cache("PagedKVCache", 2, 2, 6, page_size=4, window=2).load(path)
    rewritten(path, given_back=at(0, 3))
    with pytest.raises(ValueError, match="entry 0 has given 3 of 3 pages back"):
        cache.load(path)
    cache.save(path)
    rewritten(path, given_back=at(0, 0))
    with pytest.raises(ValueError, match="entry 0 has page -1, must be"):
        cache.load(path)


class Mine(attncore.KVCache):
    pass


def test_subclasses_and_numpy_s_numbers(tmp_path: Path) -> None:
    """The file is that of the cache that it is, and of the numbers that they are."""
    path = tmp_path / "cache"
    for rotary in (
        attncore.Rotary(base=np.float32(1e4), dims=np.int64(4)),
        attncore.Rotary(interleaved=np.bool_(False), dims=4),  # type: ignore[arg-type]
    ):
        Mine(1, 1, 8, capacity=4, rotary=rotary).save(path)
        attncore.KVCache(1, 1, 8, capacity=4, rotary=attncore.Rotary(dims=4)).load(path)


@pytest.mark.parametrize("kind", KINDS)
def test_caches_are_not_copied(kind: str) -> None:
    cache = make_cache(kind, 1, 1, 4)
    for copying in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=f"a {kind} is not copied or pickled; save and load"):
            copying(cache)


def test_files_of_contiguous_caches(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "cache"
    rows: list[tuple[dict[str, Any], str]] = [
        ({"lengths": at(0, 12)}, r"key: shape is \(2, 16, 6\), must be \(2, 17, 6\)"),
        ({"lengths": at(1, -1)}, "state: has the length -1"),
        ({"lengths": lambda n: n[:2]}, "state: has 2 entries, the cache has 3"),
    ]
    for changes, message in rows:
        filled("KVCache", rng).save(path)
        rewritten(path, **changes)
        with pytest.raises(ValueError, match=message):
            filled("KVCache", rng).load(path)


@pytest.mark.parametrize("kind", KINDS)
def test_no_files(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    cache = filled(kind, rng)
    path = tmp_path / "x"
    path.write_bytes(b"no such file")
    with pytest.raises(ValueError, match=r"path: .*x is no safetensors file"):
        cache.load(path)
    path.write_bytes(safetensors_numpy.save({"key": np.zeros(3)}))
    with pytest.raises(ValueError, match=f"path: .*x is no {kind}"):
        cache.load(path)
    with pytest.raises(FileNotFoundError):
        cache.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        cache.save(tmp_path / "none" / "x")


def test_files_without_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    for name in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (filled("KVCache", rng).save, filled("KVCache", rng).load):
        with pytest.raises(ImportError, match=re.escape("attncore[layers]")):
            call(tmp_path / "x")
