"""Caches whose values are the first dims of keys (latent attention): stored once, appended once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attncore
from cache_kit import (
    KINDS,
    QUANTISED,
    STORAGE,
    AnyCache,
    assert_attends,
    make_cache,
    query_dtype,
    stored,
)
from kit import assert_same_bits, normal
from reference import Array

MLA = (576, 512)  # DeepSeek-AI 2024: 64 dims carry the position, they are no values


def latent(kind: str, batch: int, kv_heads: int, dims: tuple[int, int], **settings: Any) -> Any:
    dim, value_dim = dims
    settings = {"value_dim": value_dim, "value_in_key": True, **settings}
    return make_cache(kind, batch, kv_heads, dim, **settings)


def content(cache: AnyCache, entries: int) -> list[Array]:
    arrays = [array for entry in range(entries) for array in cache.gather(entry)]
    return [np.ascontiguousarray(array) for array in arrays]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize(("tokens", "queries"), [(1, 1), (300, 1), (130, 5), (90, 97)])
@pytest.mark.parametrize("dims", [(40, 32), (24, 24), (34, 2)])
def test_attend(
    isa: str,
    kind: str,
    storage: str,
    tokens: int,
    queries: int,
    dims: tuple[int, int],
    rng: np.random.Generator,
) -> None:
    """As attention on the stored keys and a part of them, in entries of different lengths."""
    cache = latent(kind, 4, 2, dims, dtype=storage)
    key = normal(rng, 4, 2, tokens, dims[0])
    lengths = [tokens, tokens // 2, 0, tokens - 1]
    cache.append(key, lengths=lengths)
    query = normal(rng, 4, 6, queries, dims[0], dtype=query_dtype(storage))
    out, lse = cache.attend(query, return_lse=True)
    assert out.shape == (4, 6, queries, dims[1])
    for entry, length in enumerate(lengths):
        k = stored(key[entry, :, :length], storage)
        one, quantised = (out[entry], lse[entry]), storage in QUANTISED
        assert_attends(one, query[entry], k, k[..., : dims[1]], quantised=quantised)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [1, 16, 128])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_the_dims_of_a_model(
    isa: str, kind: str, heads: int, storage: str, rng: np.random.Generator
) -> None:
    """One KV head for all; a chosen scale, entries out of order."""
    if storage not in STORAGE:
        pytest.skip("bfloat16 needs the package ml_dtypes")
    cache = latent(kind, 3, 1, MLA, dtype=storage)
    key = normal(rng, 3, 1, 150, MLA[0])
    cache.append(key, lengths=[150, 33, 80])
    query = normal(rng, 2, heads, 1, MLA[0], dtype=query_dtype(storage))
    out, lse = cache.attend(query, entries=[2, 0], scale=192**-0.5, return_lse=True)
    for i, (entry, length) in enumerate([(2, 80), (0, 150)]):
        k = stored(key[entry, :, :length], storage)
        one, quantised = (out[i], lse[i]), storage in QUANTISED
        assert_attends(one, query[i], k, k[..., : MLA[1]], quantised=quantised, scale=192**-0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", STORAGE)
def test_tokens_come_back(kind: str, storage: str, rng: np.random.Generator) -> None:
    """The keys as stored, and a view of them; in every layout, for one entry or several."""
    cache = latent(kind, 2, 3, (10, 6), dtype=storage, page_size=4)
    key = normal(rng, 2, 3, 17, 10)
    cache.append(key[:, :, :5])
    cache.append(key[:, :, 5:11].swapaxes(1, 2), layout="bshd")
    cache.append(key[1, :, 11:], entries=1)
    cache.append(key[:1, :, 11:], None, entries=[0])
    for entry in range(2):
        got, value = cache.gather(entry)
        assert_same_bits(got, stored(key[entry], storage), "key")
        assert value.shape == (3, 17, 6)
        assert np.shares_memory(got, value)
        assert (value == got[..., :6]).all()
    cache.truncate([9, 0])
    assert_same_bits(cache.gather(0)[0], stored(key[0, :, :9], storage), "key")
    assert cache.gather(1)[1].shape == (3, 0, 6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("storage", "token"), [("float32", 576 * 4), ("int8", 580), ("int4", 292)])
def test_memory(kind: str, storage: str, token: int, rng: np.random.Generator) -> None:
    """That of keys: 576 of 1088 numbers, and one scale of two."""
    cache = latent(kind, 2, 1, MLA, dtype=storage, page_size=16)
    both = make_cache(kind, 2, 1, MLA[0], value_dim=MLA[1], dtype=storage, page_size=16)
    key = normal(rng, 2, 1, 32, MLA[0])
    cache.append(key)
    both.append(key, key[..., : MLA[1]])
    assert cache.memory().used == 2 * 32 * token
    for ours, theirs in zip(cache.memory(), both.memory(), strict=True):
        assert 0.52 < ours / theirs < 0.54


@pytest.mark.parametrize("storage", STORAGE)
def test_forks(isa: str, storage: str, rng: np.random.Generator) -> None:
    """Pages are shared, copied where one of both writes, and free again in the end."""
    cache = attncore.PagedKVCache(9, 4, 1, 20, value_dim=16, value_in_key=True, dtype=storage)
    cache.add()
    prompt, steps = normal(rng, 1, 1, 10, 20), normal(rng, 2, 1, 1, 20)
    cache.append(prompt)
    fork = cache.fork(0)
    assert cache.free_pages == 6
    cache.append(steps, entries=[0, fork])
    assert cache.free_pages == 5
    query = normal(rng, 2, 4, 1, 20, dtype=query_dtype(storage))
    out, lse = cache.attend(query, return_lse=True)
    for entry in range(2):
        k = stored(np.concatenate([prompt[0], steps[entry]], 1), storage)
        assert_same_bits(cache.gather(entry)[0], k, "key")
        one, quantised = (out[entry], lse[entry]), storage in QUANTISED
        assert_attends(one, query[entry], k, k[..., :16], quantised=quantised)
    cache.free(0)
    cache.free(fork)
    assert cache.free_pages == 9


ROTARIES = [
    attncore.Rotary(),
    attncore.Rotary(base=100.0, dims=4),
    attncore.Rotary(interleaved=True),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("rotary", ROTARIES)
@pytest.mark.parametrize("places", [None, [7, 0, -3, 1000, 2]])
def test_rotary(
    isa: str,
    kind: str,
    storage: str,
    rotary: attncore.Rotary,
    places: list[int] | None,
    rng: np.random.Generator,
) -> None:
    """What is no value is rotated, the values are as they were given."""
    cache = latent(kind, 1, 2, (30, 22), dtype=storage, rotary=rotary)
    wide = np.float64 if storage == "float64" else np.float32
    key = normal(rng, 1, 2, 5, 30, dtype=wide)
    cache.append(key, positions=places)
    cache.append(key)
    turned = np.concatenate([key, key], 2)[0]
    positions = [*(places or range(5)), *range(5, 10)]
    turned[..., 22:] = attncore.rope(
        turned[..., 22:],
        positions,
        base=rotary.base,
        dims=rotary.dims,
        interleaved=rotary.interleaved,
    )
    assert_same_bits(cache.gather(0)[0], stored(turned, storage), "key")
    if storage == "float32":
        assert (cache.gather(0)[1][:, :5] == key[0, ..., :22]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", STORAGE)
def test_files(kind: str, storage: str, tmp_path: Path, rng: np.random.Generator) -> None:
    package: Any = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "cache"
    cache = latent(kind, 2, 2, (12, 8), dtype=storage, page_size=4, rotary=True)
    cache.append(normal(rng, 2, 2, 9, 12), lengths=[9, 3])
    cache.save(path)
    names = set(package.load_file(path))
    assert not {"value", "value_scale"} & names
    assert ("key_scale" in names) == (storage in QUANTISED)
    other = latent(kind, 2, 2, (12, 8), dtype=storage, page_size=4, rotary=True)
    other.load(path)
    for ours, theirs in zip(content(other, 2), content(cache, 2), strict=True):
        assert_same_bits(ours, theirs)
    step, query = normal(rng, 2, 2, 1, 12), normal(rng, 2, 4, 1, 12, dtype=query_dtype(storage))
    for one in (cache, other):
        one.append(step)
    assert_same_bits(other.attend(query), cache.attend(query))


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_other_caches(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    package: Any = pytest.importorskip("safetensors.numpy")
    path, key = tmp_path / "cache", normal(rng, 2, 1, 9, 12)
    cache, both = latent(kind, 2, 1, (12, 8)), make_cache(kind, 2, 1, 12, value_dim=8)
    cache.append(key)
    both.append(key, key[..., :8])
    before = content(cache, 2)
    both.save(path)
    with pytest.raises(ValueError, match=r"path: .* has value_in_key=False, not True"):
        cache.load(path)
    cache.save(path)
    with pytest.raises(ValueError, match=r"path: .* has value_in_key=True, not False"):
        both.load(path)
    arrays, raw = package.load_file(path), path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    arrays["value"] = arrays["key"][..., :8].copy()
    path.write_bytes(package.save(arrays, header["__metadata__"]))
    with pytest.raises(ValueError, match="value: is given"):
        cache.load(path)
    for now, then in zip(content(cache, 2), before, strict=True):
        assert_same_bits(now, then)


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_given_or_not(kind: str, rng: np.random.Generator) -> None:
    """Nothing changes then."""
    cache, both = latent(kind, 2, 1, (12, 8)), make_cache(kind, 2, 1, 12, value_dim=8)
    key = normal(rng, 2, 1, 9, 12)
    for value in (key[..., :8], key, key[:, :, :0]):
        with pytest.raises(
            ValueError, match=r"value: is given, the cache's values are the first 8 dims of keys"
        ):
            cache.append(key, value)
    with pytest.raises(TypeError, match=r"value: must be a NumPy array, is list"):
        cache.append(key, [1.0])
    with pytest.raises(TypeError, match=r"value: must be a NumPy array, is NoneType"):
        both.append(key)
    with pytest.raises(ValueError, match=r"key: shape is \(2, 1, 9, 8\), must be \(2, 1, 9, 12\)"):
        cache.append(key[..., :8])
    assert cache.lengths.tolist() == both.lengths.tolist() == [0, 0]


@pytest.mark.parametrize("storage", [name for name in STORAGE if name in QUANTISED])
def test_what_cannot_be_stored(storage: str, rng: np.random.Generator) -> None:
    cache = latent("PagedKVCache", 2, 1, (12, 8), dtype=storage)
    key = normal(rng, 2, 1, 9, 12)
    cache.append(key)
    before = content(cache, 2)
    key[1, 0, 3, 11] = np.inf
    with pytest.raises(ValueError, match=r"key: has a NaN or an infinity for entry 1 \(head 0"):
        cache.append(key)
    for now, then in zip(content(cache, 2), before, strict=True):
        assert_same_bits(now, then)


SETTINGS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "wide values": ({"value_dim": 9}, ValueError, r"value_dim: is 9, must be 1 … 8"),
    "no bool": ({"value_in_key": 1}, TypeError, r"value_in_key: must be a bool, is int"),
    "None": ({"value_in_key": None}, TypeError, r"value_in_key: must be a bool, is NoneType"),
    "odd values": ({"value_dim": 5, "dtype": "int4"}, ValueError, r"value_dim: is 5, must be even"),
    "nothing to rotate": (
        {"rotary": True},
        ValueError,
        r"rotary: is given, but all dims of keys are values, which are not rotated",
    ),
    "values to rotate": (
        {"value_dim": 6, "rotary": attncore.Rotary(dims=4)},
        ValueError,
        r"dims: is 4, must be even and at most 2",
    ),
    "an odd rest": (
        {"value_dim": 5, "rotary": True},
        ValueError,
        r"dims: is 3, all of a head's, must be even",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", SETTINGS)
def test_settings(kind: str, case: str) -> None:
    change, exception, message = SETTINGS[case]
    with pytest.raises(exception, match=message):
        make_cache(kind, 2, 1, 8, **{"value_in_key": True, **change})


def test_how_it_is_shown() -> None:
    on: Any = np.bool_(True)
    cache = attncore.KVCache(1, 1, 576, capacity=9, value_dim=512, value_in_key=on)
    assert repr(cache) == (
        "KVCache(1, 1, 576, capacity=9, value_dim=512, value_in_key=True, dtype='float32')"
    )
    assert "value_in_key" not in repr(attncore.KVCache(1, 1, 4, capacity=9))
