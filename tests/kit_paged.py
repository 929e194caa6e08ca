"""What the tests of pages share: pools whose other slots are poison, tables with garbage past their ends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import attncore
from kit import assert_same_bits, compare_results
from reference import Array, plain, reference


@dataclass(frozen=True)
class Paged:
    """Keys and values (entry, kv_head, token, dim) of so many tokens, and where they lie in pages."""

    key: Array
    value: Array
    key_pages: Array
    value_pages: Array
    block_table: Array
    key_lengths: Array
    page_layout: str = "bshd"

    def attend(self, query: Array, **options: Any) -> tuple[Array, Array]:
        """(out, lse) by pages."""
        out, lse = attncore.attention_paged(
            query,
            self.key_pages,
            self.value_pages,
            self.block_table,
            self.key_lengths,
            page_layout=self.page_layout,  # type: ignore[arg-type]
            return_lse=True,
            **options,
        )
        return out, lse

    def attend_gathered(self, query: Array, **options: Any) -> tuple[Array, Array]:
        """(out, lse) of the arrays that the pages hold."""
        options["key_lengths"] = self.key_lengths
        return attncore.attention(query, self.key, self.value, return_lse=True, **options)

    def check(self, query: Array, **options: Any) -> tuple[Array, Array]:
        """Pages have the bits of the arrays, which are right."""
        out, lse = self.attend(query, **options)
        expected = self.attend_gathered(query, **options)
        assert_same_bits(out, expected[0])
        assert_same_bits(lse, expected[1], "lse")
        options = {n: o for n, o in options.items() if n not in ("out", "num_threads")}
        options["key_lengths"] = self.key_lengths
        made = query, self.key, self.value
        compare_results(out, lse, reference(*made, **options), plain(*made, **options))
        return out, lse

    def view(self, change: Any) -> Paged:
        """The same pages at other places: change(pool) is an equal array."""
        key_pages, value_pages = change(self.key_pages), change(self.value_pages)
        return replace(self, key_pages=key_pages, value_pages=value_pages)

    def in_layout(self, layout: str) -> Paged:
        if layout == self.page_layout:
            return self
        swapped = self.view(lambda pool: np.ascontiguousarray(pool.swapaxes(1, 2)))
        return replace(swapped, page_layout=layout)


def into_pages(
    rng: np.random.Generator,
    key: Array,
    value: Array,
    lengths: Any,
    page_size: int,
    *,
    poison: float = np.nan,
    garbage: int = -1,
) -> Paged:
    """The first tokens of each entry in pages of a random order; whatever else there is holds poison, the
    table garbage.  The gathered arrays are as wide as the table, as masks and biases need it."""
    lengths = np.asarray(lengths, np.int64)
    pages = -(-lengths // page_size)
    width = int(pages.max(initial=0)) + 1
    pool = int(pages.sum()) + 2
    order = rng.permutation(pool)
    table = np.full((len(lengths), width), garbage, np.int64)
    pools = [np.full((pool, page_size, *a.shape[1::2]), poison, np.float32) for a in (key, value)]
    wide = [np.zeros((*a.shape[:2], width * page_size, a.shape[3]), a.dtype) for a in (key, value)]
    pools = [p.astype(a.dtype) for p, a in zip(pools, (key, value), strict=True)]
    used = 0
    for entry, length in enumerate(lengths):
        for place in range(pages[entry]):
            page = order[used]
            used += 1
            table[entry, place] = page
            begin, end = place * page_size, min((place + 1) * page_size, length)
            for of, to in zip((key, value), pools, strict=True):
                to[page, : end - begin] = of[entry, :, begin:end].swapaxes(0, 1)
        for of, to in zip((key, value), wide, strict=True):
            to[entry, :, :length] = of[entry, :, :length]
    return Paged(wide[0], wide[1], pools[0], pools[1], table, lengths)
