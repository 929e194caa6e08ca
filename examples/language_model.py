"""A small language model of Python's standard library, which every machine with Python has.

Decoder-only, with rotary positions, in NumPy with attncore's attention.  See README.md beside it.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import attncore
import parts
from parts import Array, Residual, RMSNorm
from trainer import Checkpoint, parse, train

NAME = "language_model"
END = "<|end|>"  # stands between files
# Left out: tests, packages that are not the library's own, and files that are tables for the most part.
LEFT_OUT = {"test", "tests", "site-packages", "dist-packages", "lib2to3", "encodings", "pydoc_data"}


def read_texts(folder: Path, limit: int) -> tuple[list[str], list[str]]:
    """The texts of training and of validation: about every twentieth file, known by its name.

    Reading stops near ``limit`` bytes; 0 means all.
    """
    texts: tuple[list[str], list[str]] = ([], [])
    size = 0
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if LEFT_OUT.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata"):
            text = path.read_text(encoding="utf-8", errors="replace")
            texts[zlib.crc32(name.as_posix().encode()) % 20 == 0].append(text)
            size += len(text)
        if 0 < limit <= size and texts[0] and texts[1]:
            break
    return texts


def make_tokenizer(texts: Sequence[str], size: int) -> str:
    """Byte-pair encoding (Sennrich et al. 2016) of so many tokens, as JSON; with 257 it is bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=[END], show_progress=False
    ))  # fmt: skip
    json: str = tokenizer.to_str()
    return json


def to_ids(tokenizer: Any, texts: Sequence[str]) -> Array:
    """All texts in one row, each after an END: (tokens,)."""
    end = tokenizer.token_to_id(END)
    rows = [[end, *encoding.ids] for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate([np.array(row, np.int32) for row in rows])


class Block(parts.Model):
    """Causal self-attention with rotary positions, and an MLP."""

    def __init__(self, dim: int, heads: int, rng: np.random.Generator) -> None:
        attention = attncore.MultiHeadAttention(
            dim, heads, bias=False, rotary=True, seed=int(rng.integers(2**31))
        )
        self.attend = Residual(RMSNorm(dim), attention)
        self.mlp = Residual(RMSNorm(dim), parts.MLP(dim, 4 * dim, rng, squared=True))


class LanguageModel(parts.Model):
    """Tokens → logits of the token that follows each."""

    def __init__(
        self, vocabulary: int, dim: int, heads: int, blocks: int, rng: np.random.Generator
    ) -> None:
        self.embedding = parts.Embedding(vocabulary, dim, rng)
        self.blocks = [Block(dim, heads, rng) for _ in range(blocks)]
        self.norm, self.head = RMSNorm(dim), parts.Linear(dim, vocabulary, rng)
        self.dropout = parts.Dropout()

    def __call__(self, ids: Array) -> Array:
        """(batch, token) → (batch, token, vocabulary)."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block.mlp(block.attend(x, causal=True, **self.dropout()))
        return self.head(self.norm(x))

    def backward(self, d_logits: Array) -> None:
        d_x = self.norm.backward(self.head.backward(d_logits))
        for block in reversed(self.blocks):
            d_x = block.attend.backward(block.mlp.backward(d_x))
        self.embedding.backward(d_x)


def learn(
    model: LanguageModel, adam: parts.Adam, ids: Array, options: argparse.Namespace, step: int
) -> float:
    """One step on passages from random places; its loss in nats a token."""
    rng = np.random.default_rng((options.seed, step))
    starts = rng.integers(0, len(ids) - options.context, options.batch)
    passages = ids[starts[:, None] + np.arange(options.context + 1)]  # (batch, context + 1)
    model.dropout.restart(options.dropout, int(rng.integers(2**62)))
    loss, d_logits = parts.cross_entropy(model(passages[:, :-1]), passages[:, 1:])
    model.backward(d_logits)
    rate = parts.cosine(step, peak=options.rate, warmup=options.warmup, steps=options.steps)
    adam.update(step, rate, model.gradients)
    return loss


def bits_per_byte(model: LanguageModel, passages: Array, sizes: Array) -> float:
    """What the model needs for each byte of (passages, context + 1); sizes in bytes, (vocabulary,)."""
    model.dropout.restart()
    nats = 0.0
    for at in range(0, len(passages), 16):
        batch = passages[at : at + 16]
        loss, _ = parts.cross_entropy(model(batch[:, :-1]), batch[:, 1:])
        nats += loss * batch[:, 1:].size
    return nats / math.log(2) / float(sizes[passages[:, 1:]].sum())


def sample(
    model: LanguageModel, ids: list[int], count: int, options: argparse.Namespace
) -> Iterator[int]:
    """Go on from some tokens, each drawn from what the model expects after the last ones."""
    rng = np.random.default_rng(options.seed)
    model.dropout.restart()
    for _ in range(count):
        logits = model(np.array([ids[-options.context :]]))[0, -1]
        noise = rng.gumbel(size=logits.shape)  # the largest of logits + noise: a draw from softmax
        ids = [*ids, int((logits / max(options.temperature, 1e-6) + noise).argmax())]
        yield ids[-1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, or go on; then say how well it predicts files that it has not seen, and write some."""
    parser = argparse.ArgumentParser(description="Train a language model of Python's library.")
    parser.add_argument("--text", type=Path, default=Path(sysconfig.get_path("stdlib")),
                        metavar="DIR", help="folder of *.py files (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--prompt", default="    def __init__(self", help="what the sample starts with"
    )
    parser.set_defaults(tokenizer="")
    options = parse(parser, NAME, arguments, dim=192, heads=4, blocks=4, vocabulary=1024,
                    context=256, batch=16, steps=1000, warmup=50, every=100, rate=2e-3, decay=0.1,
                    dropout=0.0, limit=0, validation=64, sample=300, temperature=0.7)  # fmt: skip
    texts, unseen = read_texts(options.text, options.limit)
    options.tokenizer = options.tokenizer or make_tokenizer(texts, options.vocabulary)
    tokenizer = Tokenizer.from_str(options.tokenizer)
    names = [tokenizer.id_to_token(i) or "" for i in range(tokenizer.get_vocab_size())]
    sizes = np.array([len(name) for name in names])
    sizes[tokenizer.token_to_id(END)] = 0  # one letter of a token's name stands for one byte
    ids, unseen_ids = to_ids(tokenizer, texts), to_ids(tokenizer, unseen)
    rng = np.random.default_rng(options.seed)
    model = LanguageModel(len(sizes), options.dim, options.heads, options.blocks, rng)
    adam = parts.Adam(model.parameters(), betas=(0.9, 0.95), decay=options.decay)
    learn_more = functools.partial(learn, model, adam, ids, options)
    passages = sliding_window_view(unseen_ids, options.context + 1)[:: options.context]
    some = passages[:: max(1, len(passages) // options.validation)]
    quick = functools.partial(bits_per_byte, model, some, sizes)
    if not train(Checkpoint(model, adam, options), options, learn_more, quick, "bits per byte"):
        return 0
    print(f"{bits_per_byte(model, passages, sizes):.3f} bits per byte of"
          f" {len(unseen)} files that it has not seen")  # fmt: skip
    start: list[int] = tokenizer.encode(END + options.prompt).ids  # as a file starts
    print(tokenizer.decode([*start, *sample(model, start, options.sample, options)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
