"""The benchmark's shapes, named once.  The columns are batch, heads, KV heads, queries, keys, dim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch

from attncore._cli.case import Case
from steps import MIB, QUANTISED, Append, Step

CASES: tuple[Case, ...] = (
    # prefill: a prompt of a language model
    Case("prefill-2k-d64", 1, 16, 16, 2048, 2048, 64),
    Case("prefill-2k-d64-causal", 1, 16, 16, 2048, 2048, 64, causal=True),
    Case("prefill-2k-d128", 1, 16, 16, 2048, 2048, 128),
    Case("prefill-2k-d128-causal", 1, 16, 16, 2048, 2048, 128, causal=True),
    Case("prefill-2k-d256", 1, 16, 16, 2048, 2048, 256),
    Case("prefill-2k-d256-causal", 1, 16, 16, 2048, 2048, 256, causal=True),
    Case("prefill-8k-d64", 1, 16, 16, 8192, 8192, 64),
    Case("prefill-8k-d64-causal", 1, 16, 16, 8192, 8192, 64, causal=True),
    Case("prefill-8k-d128", 1, 16, 16, 8192, 8192, 128),
    Case("prefill-8k-d128-causal", 1, 16, 16, 8192, 8192, 128, causal=True),
    Case("prefill-8k-d256", 1, 16, 16, 8192, 8192, 256),
    Case("prefill-8k-d256-causal", 1, 16, 16, 8192, 8192, 256, causal=True),
    # encoders: a padded batch of sentences, a batch of pictures
    Case("bert", 8, 12, 12, 384, 384, 64, padding=True),
    Case("vit", 32, 12, 12, 197, 197, 64),
    # many short sequences: tables, sets, a token's neighbours
    Case("short-1x1", 4096, 8, 8, 1, 1, 64),
    Case("short-1x8", 4096, 8, 8, 1, 8, 64),
    Case("short-1x16", 4096, 8, 8, 1, 16, 64),
    Case("short-8x8", 1024, 8, 8, 8, 8, 64),
    # what models do besides
    Case("gqa", 1, 32, 8, 2048, 2048, 128, causal=True),
    Case("bias", 1, 16, 16, 1024, 1024, 64, bias=True),
    Case("window", 1, 8, 8, 16384, 16384, 64, window=1024),
    # decoding: one new token against a cache
    Case("decode-8k", 1, 32, 8, 1, 8192, 128),
    Case("decode-16k", 1, 32, 8, 1, 16384, 128),
    Case("decode-32k", 1, 32, 8, 1, 32768, 128),
    Case("decode-64k", 1, 32, 8, 1, 65536, 128),
    # training: forward and backward; the last has too few heads to fill many cores
    Case("train-1k-d64", 1, 16, 16, 1024, 1024, 64, training=True),
    Case("train-1k-d128-causal", 1, 16, 16, 1024, 1024, 128, causal=True, training=True),
    Case("train-4k-d64-causal", 1, 16, 16, 4096, 4096, 64, causal=True, training=True),
    Case("train-4k-d64-2-heads", 1, 2, 2, 4096, 4096, 64, training=True),
    Case("train-1k-d64-dropout", 1, 16, 16, 1024, 1024, 64, training=True, dropout=0.1),
    # time and memory against length
    *(
        Case(f"length-{tokens}", 1, 4, 4, tokens, tokens, 64, causal=True)
        for tokens in (512 << n for n in range(7))
    ),
    # the ends
    Case("tiny-16", 1, 8, 8, 16, 16, 64),
    Case("tiny-1", 1, 1, 1, 1, 1, 64),
    Case("long", 1, 4, 4, 32768, 32768, 128, causal=True),
)

#: of linear.py: the columns are rows, in_features, out_features
LINEAR_CASES: dict[str, tuple[int, int, int]] = {
    "qkv-768": (2048, 768, 2304),
    "square-4096": (2048, 4096, 4096),
    "token-768": (1, 768, 2304),
    "token-4096": (1, 4096, 4096),
    "tokens-4096": (8, 4096, 4096),
}


Lines = dict[str, Step]  # of a case of decode.py, by their names; the first is compared with


def rows_lines(rows: int, dim: int) -> Lines:
    """So many query heads a KV head, over everything that keys and values are stored as."""
    step = Step(4, 8 * rows, 8, 1, 8192, dim)
    whole = {stored: replace(step, stored=stored) for stored in ("bfloat16", "float32", "float16")}
    # a scale a token goes with pages: one page a sequence
    return whole | {x: replace(step, stored=x, page=step.keys) for x in QUANTISED}


def page_lines(stored: str) -> Lines:
    """Pages beside one array, both as flash-attention has them and as the caches do."""
    step = Step(4, 32, 8, 1, 8192, 128, stored)
    layouts = {"bhsd": step, "bshd": replace(step, layout="bshd")}
    return layouts | {
        f"{layout} page {page}": replace(layouts[layout], page=page)
        for layout in layouts
        for page in (16, 64, 256)
    }


def prefix_lines(heads: int, stored: str) -> Lines:
    """A prompt of 8192 keys that 16 sequences begin with, once for each and once for all."""
    step = Step(16, heads, 8, 1, 8192 + 256, 128, stored, page=64, prefix=8192)
    return {"apart": step, "shared": replace(step, sharing=True)}


def latent_lines(heads: int) -> Lines:
    """Multi-head latent attention: value is a view of key; beside it as an array of its own."""
    step = Step(8, heads, 1, 1, 8192, 576, own_value_dim=512)
    view = replace(step, latent=True)
    return {
        "two arrays": step,
        "view": view,
        "KVCache": replace(view, by="KVCache"),
        "view page 64": replace(view, page=64),
    }


def small_lines(held: int) -> Lines:
    """One small step, from Python."""
    step = Step(1, 8, 8, 1, 512, 64, held=held)
    return {
        "attention": step,
        "KVCache": replace(step, by="KVCache"),
        "page 64": replace(step, page=64),
        "torch": replace(step, by="torch"),
    }


def unequal_lines(step: Step) -> Lines:
    """Lognormal lengths beside equal ones of the same work."""
    return {"equal": step, "lognormal": replace(step, spread=1.0)}


#: of decode.py.  A Step's columns are batch, heads, KV heads, queries, keys, dim.
DECODE_CASES: dict[str, Lines] = {
    **{
        f"rows-{rows}-d{dim}": rows_lines(rows, dim)
        for dim in (128, 64)
        for rows in (1, 2, 4, 8, 16)
    },
    **{
        f"gqa-{keys}k-{stored}": {
            by: Step(1, 32, 8, 1, keys * 1024, 128, stored, by) for by in ("torch", "attncore")
        }
        for stored in ("bfloat16", "float32")
        for keys in (8, 16, 32, 64)
    },
    **{f"pages-{stored}": page_lines(stored) for stored in ("bfloat16", "float32")},
    # speculative decoding: some new tokens at once
    "queries-4": {"attncore": Step(4, 32, 8, 4, 8192, 128)},
    # in L2 (calls see the same memory), and larger than L2: in L3, where there is one of 16 MiB
    "small-l2": small_lines(MIB),
    "small-l3": small_lines(16 * MIB),
    "medium-l3": {"attncore": Step(1, 8, 8, 1, 8192, 64, held=16 * MIB)},
    **{
        f"prefix-{heads}-{stored}": prefix_lines(heads, stored)
        for heads in (8, 32)
        for stored in ("bfloat16", "float32")
    },
    **{f"latent-{heads}": latent_lines(heads) for heads in (16, 128)},
    **{
        f"lengths-prompt-{stored}": unequal_lines(
            Step(16, 16, 16, 512, 512, 64, stored, packed=True, prompt=True)
        )
        for stored in ("float32", "bfloat16")
    },
    "lengths-packed": unequal_lines(Step(32, 32, 8, 1, 4096, 128, packed=True)),
    "lengths-paged": unequal_lines(Step(32, 32, 8, 1, 4096, 128, page=64)),
}


#: of decode.py's case "append": what a token costs before its step
APPENDS: dict[str, Append] = {
    "KVCache bfloat16": Append(1, 8, 64),
    "KVCache float32": Append(1, 8, 64, "float32"),
    "KVCache int8": Append(1, 8, 64, "int8"),
    "KVCache int4": Append(1, 8, 64, "int4"),
    "KVCache float8": Append(1, 8, 64, "float8_e4m3fn"),
    "KVCache rotary": Append(1, 8, 64, rotary=True),
    "KVCache 16 entries": Append(16, 8, 64),
    "PagedKVCache": Append(1, 8, 64, page=16),
    "PagedKVCache 16 entries": Append(16, 8, 64, page=16),
}


def fits(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name fits a pattern (``decode-*``), or begins with it; all do where none is given."""
    return not patterns or any(fnmatch(name, p) or name.startswith(p) for p in patterns)


def matching(patterns: list[str]) -> list[Case]:
    """The cases whose name fits a pattern (``decode-*``) or begins with it (``prefill-2k``)."""
    return [case for case in CASES if fits(case.name, patterns)]
