"""A decoding step: the newest tokens' attention to cached keys and values, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np

from attncore._cli.case import Array

MIB, GIB = 1 << 20, 1 << 30

#: bits of a number as it is stored
BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "float8_e4m3fn": 8, "int4": 4}
QUANTISED = ("int8", "float8_e4m3fn", "int4")  # with a float32 factor a token and KV head


@dataclass(frozen=True)
class Step:
    """The queries of one call, and how the keys and values that they see lie in memory."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    stored: str = "bfloat16"
    by: str = "attncore"  # or torch, KVCache
    layout: str = "bhsd"  # of an array or a page; bshd is flash-attention's
    page: int = 0  # slots a page; 0: no pages
    packed: bool = False  # one sequence after another, (token, head, dim)
    prompt: bool = False  # every key is a query too, whatever `queries` says
    spread: float = 0.0  # lengths are lognormal with this sigma, of equal lengths' total work
    prefix: int = 0  # the first keys are those of all sequences …
    sharing: bool = False  # … and lie once
    own_value_dim: int = 0  # 0: dim
    latent: bool = False  # value is a view of key's first numbers
    held: int = GIB  # calls take turns with at least so much memory

    @property
    def value_dim(self) -> int:
        """The numbers of a value."""
        return self.own_value_dim or self.dim

    @property
    def causal(self) -> bool:
        """Whether some queries must not see the last keys."""
        return self.prompt or self.queries > 1

    @property
    def query_dtype(self) -> str:
        """Quantised keys and values have bfloat16 queries."""
        return "bfloat16" if self.stored in QUANTISED else self.stored

    @cached_property
    def lengths(self) -> Array:
        """The keys of each sequence."""
        if not self.spread:
            return np.full(self.batch, self.keys)
        normal = NormalDist(0, self.spread)
        places = (np.random.default_rng(0).permutation(self.batch) + 0.5) / self.batch
        draws = np.exp([normal.inv_cdf(place) for place in places])
        power = 2 if self.prompt else 1
        draws *= self.keys / np.mean(draws**power) ** (1 / power)
        fewest = 1 if self.prompt else self.queries
        return np.maximum(fewest, np.rint(draws)).astype(np.int64)

    @cached_property
    def query_lengths(self) -> Array:
        """The queries of each sequence: its last tokens."""
        return self.lengths if self.prompt else np.full(self.batch, self.queries)

    @property
    def tokens(self) -> int:
        """The tokens that a call makes."""
        return int(self.query_lengths.sum())

    @property
    def flops(self) -> int:
        """Multiplications and additions of both products over what is visible."""
        hidden = self.query_lengths * (self.query_lengths - 1) // 2 if self.causal else 0
        visible = int((self.query_lengths * self.lengths - hidden).sum())
        return 2 * visible * self.heads * (self.dim + self.value_dim)

    def width(self, dim: int) -> int:
        """The items of an array that hold so many numbers: two int4 share a byte."""
        return dim * BITS[self.stored] // max(8, BITS[self.stored])

    @property
    def row_bytes(self) -> int:
        """The memory of a token's key and value of one head, with their factors."""
        numbers = self.dim if self.latent else self.dim + self.value_dim
        return numbers * BITS[self.stored] // 8 + (8 if self.stored in QUANTISED else 0)

    @property
    def bytes(self) -> int:
        """The keys and values that a call must read once."""
        repeated = (self.batch - 1) * self.prefix if self.sharing else 0
        return (int(self.lengths.sum()) - repeated) * self.kv_heads * self.row_bytes

    @property
    def sets(self) -> int:
        """How many times a call's keys and values are there, for calls to take turns with."""
        whole = int(self.lengths.sum()) * self.kv_heads * self.row_bytes
        return max(1, -(-self.held // whole))


@dataclass(frozen=True)
class Append:
    """A token of each sequence that is appended to a cache of some hundreds."""

    batch: int
    kv_heads: int
    dim: int
    stored: str = "bfloat16"
    page: int = 0  # slots a page of a PagedKVCache; 0: a KVCache
    rotary: bool = False
    before: int = 512  # tokens of each sequence
    tokens: int = 64  # appended one after another, then taken back
