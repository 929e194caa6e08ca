"""``python -m attncore demo``: a trained sentence encoder answers a question from the README.

The encoder is NumPy with attncore as its attention.  The demo ranks the README's paragraphs,
draws one head, and sets textbook NumPy attention against attncore on long sequences.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

import numpy as np

import attncore
from attncore._cli import memory, packages, picture, text
from attncore._cli.encoder import Array, Encoder
from attncore._cli.textbook import textbook_attention

HELP = "a trained sentence encoder answers a question by ranking the README's paragraphs"
QUESTION = "Which instruction sets are supported?"
LENGTHS = (2048, 4096, 8192)
LAYER, HEAD = 2, 9  # in this head a word looks for the same word elsewhere
BEST = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("question", nargs="?", default=QUESTION, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR",
                        help="folder for the picture (default: %(default)s)")  # fmt: skip
    parser.add_argument("--text", type=Path, metavar="FILE",
                        help="a Markdown or plain text file to search in, not the README")  # fmt: skip
    parser.add_argument("--layer", type=int, default=LAYER, help="layer to draw, from 0")
    parser.add_argument("--head", type=int, default=HEAD, help="head to draw, from 0")
    parser.add_argument("--no-table", action="store_true", help="leave out the comparison")


def run(options: argparse.Namespace) -> int:
    """Rank, draw, compare."""
    packages.need(packages.DEMO_PACKAGES, packages.DEMO_INSTALL)
    try:
        page = options.text.read_text(encoding="utf-8") if options.text else text.readme()
    except (OSError, UnicodeDecodeError) as error:
        return refuse(f"cannot read {options.text}: {error}")
    passages = text.paragraphs(page)
    if not passages:
        return refuse("found no paragraphs to search; name a file with --text FILE")
    encoder = Encoder()
    if not (0 <= options.layer < encoder.layers and 0 <= options.head < encoder.heads):
        return refuse(f"--layer must be in 0 … {encoder.layers - 1} and --head must be in"
                      f" 0 … {encoder.heads - 1}")  # fmt: skip
    vectors = encoder.encode([p.for_model() for p in passages], "encode paragraphs")
    scores = vectors @ encoder.encode([options.question])[0]
    best = np.argsort(-scores)[:BEST]
    print_answer(options.question, passages, scores, best)
    show_check(encoder, passages, vectors)
    draw(encoder, passages[best[0]], options)
    if not options.no_table:
        print_table()
    return 0


def refuse(message: str) -> int:
    """Say on one line why there is no demo; the exit status."""
    print(f"attncore demo: {message}", file=sys.stderr)
    return 1


def print_answer(question: str, passages: list[text.Paragraph], scores: Array, best: Array) -> None:
    """The paragraphs that come nearest to the question, the nearest first."""
    print(f"Question: {question}")
    print(f"The nearest of {len(passages)} paragraphs, by cosine similarity:\n")
    for place, index in enumerate(best, start=1):
        passage = passages[index]
        print(f"{place}.  {scores[index]:.3f}  {passage.heading}")
        print(textwrap.indent(textwrap.fill(passage.text, 92), "    "), end="\n\n")


def show_check(encoder: Encoder, passages: list[text.Paragraph], vectors: Array) -> None:
    """Say how far the encoder with textbook attention is from the encoder with attncore."""
    by_the_book = encoder.with_attention(attend_by_the_book)
    expected = by_the_book.encode([p.for_model() for p in passages], "check")
    error = np.abs(expected - vectors).max()
    print(f"Check: with textbook attention the vectors differ by {error:.0e} at most.")


def attend_by_the_book(query: Array, key: Array, value: Array, lengths: Array) -> Array:
    """Textbook attention for the encoder's axes, (batch, token, head, dim)."""
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    out: Array = textbook_attention(query, key, value, lengths).swapaxes(1, 2)
    return out


def draw(encoder: Encoder, passage: text.Paragraph, options: argparse.Namespace) -> None:
    """Save what one head looks at in the best paragraph."""
    pieces = encoder.tokenize(passage.for_model()).pieces
    view = encoder.view(passage.for_model(), options.layer)
    head = slice(options.head, options.head + 1)
    weights = attncore.attention_weights(
        view.query[:, :, head], view.key[:, :, head], layout="bshd"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "attention.png"
    title = f"layer {options.layer}, head {options.head}: {textwrap.shorten(passage.heading, 50)}"
    picture.save_attention(path, weights[0, 0], pieces, title)
    print(f"Picture: layer {options.layer}, head {options.head} over the best paragraph's"
          f" {len(pieces)} tokens: {path}\n")  # fmt: skip


def print_table() -> None:
    """Textbook attention against attncore: time and peak memory beyond inputs and output."""
    threads = attncore.get_num_threads()
    print(f"One attention of {memory.HEADS} heads of {memory.DIM}, float32, ISA {attncore.isa()},"
          f" {threads} thread{'s' * (threads != 1)};")  # fmt: skip
    print("memory: the peak beyond inputs and output, each in a process of its own\n")
    print(f"{'tokens':>8}  {'NumPy textbook':^20}  {'attncore':^20}  {'faster':>7}")
    for tokens in packages.progress(LENGTHS, "long sequences"):
        ours = memory.measure_in_child("attncore", tokens)
        left, times = "not enough memory", ""
        room = memory.available_bytes()
        if room is None or room > 4 * memory.HEADS * tokens * tokens * 4:
            theirs = memory.measure_in_child("textbook", tokens)
            left, times = show(theirs), f"{theirs.seconds / ours.seconds:.1f} ×"
        packages.say(f"{tokens:>8}  {left:>20}  {show(ours):>20}  {times:>7}")


def show(usage: memory.Usage) -> str:
    """A cell of the table."""
    return f"{usage.seconds * 1e3:.1f} ms {usage.extra_bytes / 1e6:7.1f} MB"
