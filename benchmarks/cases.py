"""The benchmark's shapes, named once.  The columns are batch, heads, KV heads, queries, keys, dim."""

from __future__ import annotations

from fnmatch import fnmatch

from attncore._cli.case import Case

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


def matching(patterns: list[str]) -> list[Case]:
    """The cases whose name fits a pattern (``decode-*``) or begins with it (``prefill-2k``)."""
    if not patterns:
        return list(CASES)
    return [
        case
        for case in CASES
        if any(fnmatch(case.name, p) or case.name.startswith(p) for p in patterns)
    ]
