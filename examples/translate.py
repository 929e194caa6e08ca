"""Written dates → ISO dates: the encoder–decoder Transformer of Vaswani et al. (2017).

NumPy with attncore's attention, letter by letter, on dates that it makes up:
"Tuesday, Sep. 5th, 2023" → "2023-09-05".  See README.md beside this file.
"""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

import attncore
import parts
from parts import Array, LayerNorm, Residual
from trainer import Checkpoint, parse, save_looks, train

NAME = "translate"
LETTERS, START, END = 128, 2, 3  # ASCII, where 2 and 3 are start and end of a text; 0 is padding
ROMAN = ("I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII")
STYLES = (
    "{day.day} {day:%B} {day.year}",
    "{day:%B} {day.day}, {day.year}",
    "{day:%A}, {day:%b}. {nth}, {day.year}",
    "the {nth} of {day:%B}, {day.year}",
    "{day:%d/%m/%Y} (day first)",
    "{day:%m/%d/%Y} (month first)",
    "{day.year}.{day.month}.{day.day}",
    "{day.day}.{roman}.{day.year}",
    "{day:%d%b%Y}",
    "{day:%A} {day.day} {day:%b} {day.year}",
)
FIRST, LAST = dt.date(1600, 1, 1).toordinal(), dt.date(2400, 1, 1).toordinal()
SHOWN = dt.date.fromordinal(738400)  # held out


def write(day: dt.date, style: str, case: int = 0) -> str:
    """A date as people write it, as it is, in small letters or in capitals."""
    ends = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd", 31: "st"}
    nth = f"{day.day}{ends.get(day.day, 'th')}"
    text = style.format(day=day, nth=nth, roman=ROMAN[day.month - 1])
    return (text, text.lower(), text.upper())[case]


def make_pairs(rng: np.random.Generator, count: int, *, held_out: bool) -> list[tuple[str, str]]:
    """Pairs (written date, ISO date); every tenth day is held out from training, in any style."""
    days = rng.integers(FIRST, LAST, count) // 10 * 10
    days += 0 if held_out else rng.integers(1, 10, count)
    dates = [dt.date.fromordinal(day) for day in days.tolist()]
    texts = [write(day, rng.choice(STYLES), int(rng.integers(3))) for day in dates]
    return [(text, day.isoformat()) for text, day in zip(texts, dates, strict=True)]


def to_ids(texts: Sequence[str]) -> tuple[Array, Array]:
    """Codes of letters, padded with 0: (batch, token), and the lengths, (batch,)."""
    lengths = np.array([len(text) for text in texts])
    padded = b"".join(text.encode("ascii", "replace").ljust(lengths.max(), b"\0") for text in texts)
    return np.frombuffer(padded, np.uint8).reshape(len(texts), -1).astype(np.int64), lengths


class EncoderBlock(parts.Model):
    """Self-attention and an MLP."""

    def __init__(self, dim: int, heads: int, rng: np.random.Generator) -> None:
        layer = attncore.MultiHeadAttention(dim, heads, seed=int(rng.integers(2**31)))
        self.attend = Residual(LayerNorm(dim), layer)
        self.mlp = Residual(LayerNorm(dim), parts.MLP(dim, 4 * dim, rng))


class DecoderBlock(EncoderBlock):
    """The same with attention to the encoder's output, the context, in between."""

    def __init__(self, dim: int, heads: int, rng: np.random.Generator) -> None:
        super().__init__(dim, heads, rng)
        layer = attncore.MultiHeadAttention(dim, heads, seed=int(rng.integers(2**31)))
        self.cross = Residual(LayerNorm(dim), layer)


class Transformer(parts.Model):
    """Letters in, letters out."""

    def __init__(self, dim: int, heads: int, blocks: int, rng: np.random.Generator) -> None:
        self.dim, self.dropout = dim, parts.Dropout()
        self.source = parts.Embedding(LETTERS, dim, rng)
        self.target = parts.Embedding(LETTERS, dim, rng)
        self.encoder = [EncoderBlock(dim, heads, rng) for _ in range(blocks)]
        self.decoder = [DecoderBlock(dim, heads, rng) for _ in range(blocks)]
        self.norm_source, self.norm_target = LayerNorm(dim), LayerNorm(dim)
        self.head = parts.Linear(dim, LETTERS, rng)

    def embed(self, embedding: parts.Embedding, ids: Array) -> Array:
        """Vectors of letters plus those of their positions: (batch, token, dim)."""
        return embedding(ids) * math.sqrt(self.dim) + parts.sinusoids(ids.shape[1], self.dim)

    def encode(self, ids: Array, lengths: Array) -> Array:
        """The context: (batch, token, dim)."""
        x = self.embed(self.source, ids)
        for block in self.encoder:
            x = block.mlp(block.attend(x, key_lengths=lengths, **self.dropout()))
        return self.norm_source(x)

    def decode(self, ids: Array, context: Array, lengths: Array, **options: Any) -> Array:
        """Logits of the letter that follows each: (batch, token, LETTERS)."""
        x = self.embed(self.target, ids)
        for block in self.decoder:
            x = block.attend(x, causal=True, **self.dropout())
            x = block.cross(x, context, key_lengths=lengths, **self.dropout(), **options)
            x = block.mlp(x)
        return self.head(self.norm_target(x))

    def backward(self, d_logits: Array) -> None:
        """Back through both stacks; every decoder block adds to the gradient of the context."""
        d_x = self.norm_target.backward(self.head.backward(d_logits))
        d_context: Array = np.zeros((), np.float32)
        for decoder in reversed(self.decoder):
            d_x = decoder.attend.backward(decoder.cross.backward(decoder.mlp.backward(d_x)))
            d_context = d_context + decoder.cross.d_context
        self.target.backward(d_x * math.sqrt(self.dim))
        d_x = self.norm_source.backward(d_context)
        for encoder in reversed(self.encoder):
            d_x = encoder.attend.backward(encoder.mlp.backward(d_x))
        self.source.backward(d_x * math.sqrt(self.dim))

    def translate(self, texts: Sequence[str]) -> list[str]:
        """Greedily: the likeliest letter, again and again."""
        self.dropout.restart()
        ids, lengths = to_ids(texts)
        context = self.encode(ids, lengths)
        written = np.full((len(texts), 1), START)
        while written.shape[1] < 16 and not (written == END).any(axis=1).all():
            best = self.decode(written, context, lengths)[:, -1].argmax(axis=-1)
            written = np.concatenate([written, best[:, None]], axis=1)
        return ["".join(map(chr, row[1:])).partition(chr(END))[0] for row in written.tolist()]


def learn(model: Transformer, adam: parts.Adam, options: argparse.Namespace, step: int) -> float:
    """One step on a batch of new dates; its loss."""
    rng = np.random.default_rng((options.seed, step))
    texts, answers = zip(*make_pairs(rng, options.batch, held_out=False), strict=True)
    ids, lengths = to_ids(texts)
    target, _ = to_ids([f"{chr(START)}{answer}{chr(END)}" for answer in answers])
    model.dropout.restart(options.dropout, int(rng.integers(2**62)))
    logits = model.decode(target[:, :-1], model.encode(ids, lengths), lengths)
    loss, d_logits = parts.cross_entropy(logits, target[:, 1:], smoothing=0.1)
    model.backward(d_logits)
    rate = parts.inverse_root(step, peak=options.rate, warmup=options.warmup)
    adam.update(step, rate, model.gradients)
    return loss


def exact(model: Transformer, count: int, seed: int) -> float:
    """The share of held-out dates that come out right to the letter."""
    pairs = make_pairs(np.random.default_rng(seed), count, held_out=True)
    written: list[str] = []
    for at in range(0, count, 250):
        written += model.translate([text for text, _ in pairs[at : at + 250]])
    return float(np.mean([pair[1] == date for pair, date in zip(pairs, written, strict=True)]))


def look(model: Transformer, text: str) -> tuple[Array, str, list[str]]:
    """Where the last decoder block looks as it writes: (letters written, letters read)."""
    (answer,) = model.translate([text])
    context = model.encode(*to_ids([text]))
    written, _ = to_ids([chr(START) + answer])
    model.decode(written, context, np.array([len(text)]), need_weights=True)
    return model.decoder[-1].cross.weights[0], text, [*answer, "end"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, or go on; then say how well it translates, and draw where it looks."""
    parser = argparse.ArgumentParser(description="Train a Transformer to read written dates.")
    parser.add_argument("dates", nargs="*", help="dates to translate in the end")
    options = parse(parser, NAME, arguments, dim=128, heads=4, blocks=2, dropout=0.1, batch=64,
                    steps=2400, warmup=300, rate=5e-3, every=250, held_out=2000)  # fmt: skip
    rng = np.random.default_rng(options.seed)
    model = Transformer(options.dim, options.heads, options.blocks, rng)
    adam = parts.Adam(model.parameters())
    more = functools.partial(learn, model, adam, options)
    quick = functools.partial(exact, model, min(250, options.held_out), 1)
    if not train(Checkpoint(model, adam, options), options, more, quick, "exact matches"):
        return 0
    print(
        f"{exact(model, options.held_out, 2):.2%} of {options.held_out} held-out dates are right to the letter"
    )
    texts = options.dates or [write(SHOWN, style) for style in STYLES[2:6]]
    for text, date in zip(texts, model.translate(texts), strict=True):
        print(f"{text:>40} → {date}")
    save_looks(options.out / f"{NAME}-attention.png", [look(model, text) for text in texts])
    return 0


if __name__ == "__main__":
    sys.exit(main())
