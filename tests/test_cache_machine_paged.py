"""Random operations on a PagedKVCache; its pages are counted after each."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule, run_state_machine_as_test

import attncore
from cache_kit import STORAGE
from test_cache_machine import DV, HK, CacheMachine, D


class PagedMachine(CacheMachine):
    """The model has tables of page numbers of its own, any numbers, to know what is shared."""

    cache: attncore.PagedKVCache

    @initialize(
        storage=st.sampled_from(STORAGE),
        rotary=st.booleans(),
        latent=st.booleans(),
        window=st.sampled_from([None, 0, 5, 12]),
        page_size=st.sampled_from([1, 3, 4, 16]),
    )
    def make(
        self, storage: str, rotary: bool, latent: bool, window: int | None, page_size: int
    ) -> None:
        self.start(storage, rotary, latent)
        self.window, self.page_size = window, page_size
        self.pages = 60 // page_size + 3
        self.cache = self.new()
        self.tables: dict[int, list[int]] = {}  # −1: given back
        self.fresh = 0

    def new(self) -> attncore.PagedKVCache:
        return attncore.PagedKVCache(
            self.pages,
            self.page_size,
            HK,
            D,
            value_dim=DV,
            value_in_key=self.latent,
            dtype=self.storage,
            rotary=self.rotary,
            window=self.window,
        )

    def used(self) -> int:
        return len({page for table in self.tables.values() for page in table if page >= 0})

    def new_page(self) -> int:
        self.fresh += 1
        return self.fresh

    def is_shared(self, entry: int) -> bool:
        """Whether the last page, partly filled, is another entry's too."""
        if self.length(entry) % self.page_size == 0:
            return False
        last = self.tables[entry][-1]
        return sum(last in table for table in self.tables.values()) > 1

    def needed(self, entry: int, count: int) -> int:
        new = -(-(self.length(entry) + count) // self.page_size) - len(self.tables[entry])
        return new + (count > 0 and self.is_shared(entry))

    def fits(self, entries: list[int], counts: list[int]) -> bool:
        needed = sum(self.needed(e, n) for e, n in zip(entries, counts, strict=True))
        return needed <= self.pages - self.used()

    def after_append(self, entries: list[int], counts: list[int]) -> None:
        before = {e: self.length(e) - n for e, n in zip(entries, counts, strict=True)}
        shared = []
        for entry, count in zip(entries, counts, strict=True):
            old = before[entry]
            last = self.tables[entry][-1] if old % self.page_size else None
            others = [t for t in self.tables.values() if last in t]
            if count and last is not None and len(others) > 1:
                shared.append(entry)
        for entry, count in zip(entries, counts, strict=True):
            table = self.tables[entry]
            if entry in shared:
                table[-1] = self.new_page()
            while len(table) * self.page_size < self.length(entry):
                table.append(self.new_page())
            if self.window is not None and count:
                for i in range(max(0, before[entry] - self.window) // self.page_size):
                    table[i] = -1

    def after_truncate(self, entry: int) -> None:
        del self.tables[entry][-(-self.length(entry) // self.page_size) :]

    def given_back(self, entry: int) -> int:
        return self.tables[entry].count(-1) * self.page_size

    def pages_moved_into(self, entry: int, writes: range) -> list[int]:
        """Those of others too, by their places in the table."""
        places = sorted({token // self.page_size for token in writes})
        table = self.tables[entry]
        return [p for p in places if sum(table[p] in t for t in self.tables.values()) > 1]

    def can_move(self, writes: dict[int, range]) -> bool:
        writers: Counter[int] = Counter()
        for entry, tokens in writes.items():
            writers.update(self.tables[entry][p] for p in self.pages_moved_into(entry, tokens))
        owners = Counter(page for table in self.tables.values() for page in table)
        needed = sum(min(count, owners[page] - 1) for page, count in writers.items())
        return needed <= self.pages - self.used()

    def after_accept(self, entry: int, writes: range) -> None:
        for place in self.pages_moved_into(entry, writes):
            self.tables[entry][place] = self.new_page()
        self.after_truncate(entry)

    def least(self, entry: int) -> int:
        gone = self.tables[entry].count(-1)
        return gone * self.page_size + (self.window or 0) if gone else 0

    @precondition(lambda self: len(self.model) < 6)
    @rule()
    def add(self) -> None:
        entry = self.cache.add()
        assert entry == min(set(range(7)) - self.model.keys())
        self.model[entry], self.tables[entry] = (self.empty[0], self.empty[1]), []

    @precondition(lambda self: 0 < len(self.model) < 6)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        old = data.draw(st.sampled_from(sorted(self.model)))
        new = self.cache.fork(old)
        assert new == min(set(range(7)) - self.model.keys())
        self.model[new], self.tables[new] = self.model[old], [*self.tables[old]]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(sorted(self.model)))
        self.cache.free(entry)
        del self.model[entry], self.tables[entry]

    def load(self, path: Path) -> None:
        self.cache = self.new()
        self.cache.load(path)

    @invariant()
    def no_page_leaks(self) -> None:
        if not hasattr(self, "cache"):
            return
        cache = self.cache
        tables = {entry: cache.block_table(entry) for entry in cache.entries}
        assert sorted(tables) == sorted(self.model)
        counts = np.zeros(cache.pages, np.int64)
        for table in tables.values():
            np.add.at(counts, table[table >= 0], 1)
        assert cache.reference_counts().tolist() == counts.tolist()
        assert cache.free_pages + int((counts > 0).sum()) == cache.pages
        assert cache.free_pages == self.pages - self.used()
        # What is shared in the model is shared in the cache, and nothing else.
        ours = [int(page) for entry in sorted(tables) for page in tables[entry]]
        theirs = [page for entry in sorted(tables) for page in self.tables[entry]]
        pairs = set(zip(ours, theirs, strict=True))
        assert len(pairs) == len(set(ours)) == len(set(theirs))
        assert all((mine < 0) == (its < 0) for mine, its in pairs)


def test_paged() -> None:
    steps = settings(
        derandomize=True, database=None, deadline=None, max_examples=40, stateful_step_count=40
    )
    run_state_machine_as_test(PagedMachine, settings=steps)
