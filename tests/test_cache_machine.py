"""Random operations on caches against a model of plain arrays: nothing is lost, no page leaks."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import attncore
from cache_kit import QUANTISED, STORAGE, AnyCache, assert_attends, query_dtype, stored
from kit import assert_same_bits, normal
from reference import Array

HK, D, DV, CAPACITY = 2, 6, 4, 40
SEEDS = st.integers(0, 2**32)


class CacheMachine(RuleBasedStateMachine):
    """What both caches can do.  The model: an entry's keys and values, (head, token, dim)."""

    cache: AnyCache
    model: dict[int, tuple[Array, Array]]
    window: int | None = None

    def start(self, storage: str, rotary: bool, latent: bool) -> None:
        """latent: values are the first dims of keys."""
        self.storage, self.rotary, self.latent = storage, rotary, latent
        nothing = np.zeros((HK, 0, D)), np.zeros((HK, 0, DV))
        self.empty = tuple(stored(array, storage) for array in nothing)
        self.model = {}

    def length(self, entry: int) -> int:
        return self.model[entry][0].shape[1]

    def fits(self, entries: list[int], counts: list[int]) -> bool:
        """Whether there is room for so many tokens more."""
        raise NotImplementedError

    def after_append(self, entries: list[int], counts: list[int]) -> None:
        """What else an append changes."""

    def least(self, entry: int) -> int:
        """The least length but 0 that truncate can leave."""
        raise NotImplementedError

    def draw_entries(self, data: st.DataObject) -> list[int]:
        entries = st.lists(st.sampled_from(sorted(self.model)), unique=True, max_size=4)
        return data.draw(entries)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), seed=SEEDS, tokens=st.integers(0, 13))
    def append(self, data: st.DataObject, seed: int, tokens: int) -> None:
        entries = self.draw_entries(data)
        counts = [data.draw(st.integers(0, tokens)) for _ in entries]
        rng = np.random.default_rng(seed)
        n = len(entries)
        key, value = normal(rng, n, HK, tokens, D), normal(rng, n, HK, tokens, DV)
        given = (key,) if self.latent else (key, value)
        if not self.fits(entries, counts):
            with pytest.raises(MemoryError):
                self.cache.append(*given, entries=entries, lengths=counts)
            return
        self.cache.append(*given, entries=entries, lengths=counts)
        for i, (entry, count) in enumerate(zip(entries, counts, strict=True)):
            new = self.kept(entry, key[i, :, :count], value[i, :, :count])
            parts = zip(self.model[entry], new, strict=True)
            grown = [np.concatenate([old, x], 1) for old, x in parts]
            self.model[entry] = grown[0], grown[1]
        self.after_append(entries, counts)

    def kept(self, entry: int, key: Array, value: Array) -> tuple[Array, Array]:
        """What is left of an entry's new tokens."""
        if self.rotary:
            first = DV if self.latent else 0
            positions = self.length(entry) + np.arange(key.shape[1])
            key = key.astype(np.float64 if self.storage == "float64" else np.float32)
            key[..., first:] = attncore.rope(key[..., first:], positions)
        key = stored(key, self.storage)
        return key, key[..., :DV] if self.latent else stored(value, self.storage)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), seed=SEEDS)
    def append_what_is_bad(self, data: st.DataObject, seed: int) -> None:
        """Nothing changes: the invariants see to that."""
        entries = self.draw_entries(data)
        if not entries or self.storage not in QUANTISED:
            return
        key = normal(np.random.default_rng(seed), len(entries), HK, 3, D)
        key[-1, 1, 2, 0] = np.nan
        with pytest.raises((ValueError, MemoryError)):
            self.cache.append(*((key,) if self.latent else (key, key[..., :DV])), entries=entries)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        entries = self.draw_entries(data)
        lengths = [data.draw(st.integers(0, self.length(entry))) for entry in entries]
        least = [self.least(entry) for entry in entries]
        if any(0 < length < low for length, low in zip(lengths, least, strict=True)):
            with pytest.raises(ValueError, match="given back"):
                self.cache.truncate(lengths, entries=entries)
            return
        self.cache.truncate(lengths, entries=entries)
        for entry, length in zip(entries, lengths, strict=True):
            key, value = self.model[entry]
            self.model[entry] = key[:, :length], value[:, :length]
            self.after_truncate(entry)

    def after_truncate(self, entry: int) -> None:
        """What else truncate changes."""

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def accept(self, data: st.DataObject) -> None:
        entries = self.draw_entries(data)
        new = [data.draw(st.integers(0, self.length(entry))) for entry in entries]
        firsts = [self.length(entry) - n for entry, n in zip(entries, new, strict=True)]
        branches = [
            sorted(data.draw(st.sets(st.integers(0, max(n - 1, 0)), max_size=min(n, 9))))
            for n in new
        ]
        padded = np.full((len(entries), max(map(len, branches), default=0) + 1), -1)
        for row, branch in zip(padded, branches, strict=True):
            row[: len(branch)] = branch
        writes = {}  # by entry: the tokens that others move to
        for entry, first, branch in zip(entries, firsts, branches, strict=True):
            same = sum(token == i for i, token in enumerate(branch))
            writes[entry] = range(first + same, first + len(branch))
        gone = [
            0 < first + len(branch) < self.least(entry)
            or (len(writes[entry]) > 0 and writes[entry][0] < self.given_back(entry))
            for entry, first, branch in zip(entries, firsts, branches, strict=True)
        ]
        error = ValueError if any(gone) else None if self.can_move(writes) else MemoryError
        if error is not None:
            with pytest.raises(error, match=r"given back|needs"):
                self.cache.accept(padded, new, entries=entries)
            return
        self.cache.accept(padded, new, entries=entries)
        for entry, first, branch in zip(entries, firsts, branches, strict=True):
            kept = [*range(first), *(first + token for token in branch)]
            key, value = self.model[entry]
            self.model[entry] = key[:, kept], value[:, kept]
            self.after_accept(entry, writes[entry])

    def given_back(self, entry: int) -> int:
        """How many tokens are gone for good."""
        raise NotImplementedError

    def can_move(self, writes: dict[int, range]) -> bool:
        """Whether pages for copies are there."""
        raise NotImplementedError

    def after_accept(self, entry: int, writes: range) -> None:
        """What else accept changes."""

    @precondition(lambda self: self.model)
    @rule(data=st.data(), seed=SEEDS, queries=st.integers(1, 4), causal=st.booleans())
    def attend(self, data: st.DataObject, seed: int, queries: int, causal: bool) -> None:
        entries = self.draw_entries(data)
        entries = [entry for entry in entries if self.can_see(entry, queries)]
        query = normal(np.random.default_rng(seed), len(entries), 2 * HK, queries, D)
        query = query.astype(query_dtype(self.storage))
        out, lse = self.cache.attend(query, entries=entries, causal=causal, return_lse=True)
        options: dict[str, Any] = {"causal": causal}
        if self.window is not None:
            options["window"] = (self.window, None)
        for i, entry in enumerate(entries):
            key, value = self.model[entry]
            ours = out[i], lse[i]
            quantised = self.storage in QUANTISED
            assert_attends(ours, query[i], key, value, quantised=quantised, **options)

    def can_see(self, entry: int, queries: int) -> bool:
        """Whether all tokens that so many queries see are there."""
        return self.least(entry) <= max(self.length(entry) - queries, 0)

    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache"
            self.cache.save(path)
            self.load(path)

    def load(self, path: Path) -> None:
        self.cache.load(path)

    @invariant()
    def lengths_are_right(self) -> None:
        if hasattr(self, "cache"):
            lengths = self.cache.lengths
            assert {n: int(lengths[n]) for n in self.model} == {
                n: self.length(n) for n in self.model
            }

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        for entry, (key, value) in self.model.items():
            ours = self.cache.gather(entry)
            first = self.length(entry) - ours[0].shape[1]
            assert first <= self.least(entry)
            assert_same_bits(ours[0], np.ascontiguousarray(key[:, first:]), "key")
            ours_value = np.ascontiguousarray(ours[1])
            assert_same_bits(ours_value, np.ascontiguousarray(value[:, first:]), "value")


class ContiguousMachine(CacheMachine):
    @initialize(
        storage=st.sampled_from(STORAGE),
        rotary=st.booleans(),
        latent=st.booleans(),
        window=st.booleans(),
    )
    def make(self, storage: str, rotary: bool, latent: bool, window: bool) -> None:
        self.start(storage, rotary, latent)
        self.window = 5 if window else None
        self.cache = attncore.KVCache(
            4,
            HK,
            D,
            capacity=CAPACITY,
            value_dim=DV,
            value_in_key=latent,
            dtype=storage,
            rotary=rotary,
            window=self.window,
        )
        self.model = dict.fromkeys(range(4), (self.empty[0], self.empty[1]))

    def fits(self, entries: list[int], counts: list[int]) -> bool:
        return all(self.length(e) + n <= CAPACITY for e, n in zip(entries, counts, strict=True))

    def least(self, entry: int) -> int:
        assert entry in self.model
        return 0

    given_back = least

    def can_move(self, writes: dict[int, range]) -> bool:
        return writes.keys() <= self.model.keys()


def test_contiguous() -> None:
    steps = settings(
        derandomize=True, database=None, deadline=None, max_examples=25, stateful_step_count=40
    )
    run_state_machine_as_test(ContiguousMachine, settings=steps)
