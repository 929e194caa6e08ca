"""Text from the language model, each token of which goes through the model once.

Keys and values of the tokens so far stand in a cache.  What that is good for:

    prefill      all tokens of the prompt at once
    fork         several continuations share the prompt's pages; the likeliest one is printed
    decode       one token of each of them at a time
    rollback     guesses are checked, several at a time, and the wrong ones taken back

and that nothing of it changes the text.  See README.md beside it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from tokenizers import Tokenizer

import attncore
from language_model import END, LanguageModel, make_tokenizer
from parts import Array
from trainer import read_notes

CHECKPOINT = Path("out/language_model.safetensors")  # where language_model.py writes it
PROMPT = 'class Stack:\n    """What was pushed last is popped first."""\n\n    def __init__(self'
DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn", "int4")


class CachedModel:
    """A language model, and a cache of keys and values for each of its blocks.

    A sequence is an entry of the caches; it has the same number in all of them.
    """

    def __init__(
        self, model: LanguageModel, heads: int, *, pages: int, page_size: int, dtype: str
    ) -> None:
        self.model = model
        dim = model.embedding.weights["table"].shape[1] // heads
        self.caches = [
            attncore.PagedKVCache(pages, page_size, heads, dim, dtype=dtype, rotary=True)
            for _ in model.blocks
        ]

    def add(self) -> int:
        """A new sequence, without tokens."""
        (entry,) = {cache.add() for cache in self.caches}
        return entry

    def fork(self, entry: int) -> int:
        """A new sequence of the same tokens; it shares their pages until one of both goes on."""
        (fork,) = {cache.fork(entry) for cache in self.caches}
        return fork

    def free(self, entry: int) -> None:
        """The sequence ends: pages that no other one has can be used again."""
        for cache in self.caches:
            cache.free(entry)

    def truncate(self, entry: int, length: int) -> None:
        """Take back the tokens from ``length`` on."""
        for cache in self.caches:
            cache.truncate([length], entries=[entry])

    def __call__(self, ids: Array, entries: list[int]) -> Array:
        """New tokens of some sequences, (entry, token) → logits (entry, token, vocabulary)."""
        x = self.model.embedding(ids)
        for block, cache in zip(self.model.blocks, self.caches, strict=True):
            x = x + self._attend(block.attend, cache, x, entries)
            x = block.mlp(x)
        return self.model.head(self.model.norm(x))

    def _attend(
        self, part: Any, cache: attncore.PagedKVCache, x: Array, entries: list[int]
    ) -> Array:
        """What MultiHeadAttention does, but for keys and values, which are those in the cache."""
        query, key, value = part.inner.in_proj(part.norm(x))
        cache.append(key, value, entries=entries)
        out: Array = part.inner.out_proj(cache.attend(query, entries=entries, rotate_query=True))
        return out


class Sampler:
    """Draws tokens.  Which one depends on logits, seed, sequence and position alone: not on how the
    logits came about."""

    def __init__(self, temperature: float, seed: int) -> None:
        self.temperature, self.seed = temperature, seed

    def __call__(self, logits: Array, sequence: int, position: int) -> int:
        noise = np.random.default_rng((self.seed, sequence, position)).gumbel(size=logits.shape)
        # The largest of logits + noise is a draw from softmax (Gumbel 1954).
        return int((logits / max(self.temperature, 1e-6) + noise).argmax())


def bits(logits: Array, token: int) -> float:
    """What the model needs for a token: −log₂ of its probability."""
    return float(np.logaddexp.reduce(logits) - logits[token]) / math.log(2)


def decode(
    cached: CachedModel, sampler: Sampler, prompt: list[int], logits: Array, entries: list[int],
    count: int,
) -> list[tuple[list[int], float]]:  # fmt: skip
    """Go on from a prompt that all entries hold, a token of each at a time.

    ``logits`` (vocabulary) are those after the prompt.  Returns the tokens of each entry, and how
    many bits they took, a token.
    """
    ids = [list(prompt) for _ in entries]
    needed = np.zeros(len(entries))
    rows = np.broadcast_to(logits, (len(entries), len(logits)))
    for step in range(count):
        new = [sampler(row, i, len(prompt) + step) for i, row in enumerate(rows)]
        for i, token in enumerate(new):
            ids[i].append(token)
            needed[i] += bits(rows[i], token)
        if step + 1 < count:
            rows = cached(np.array(new)[:, None], entries)[:, -1]
    return [(ids[i][len(prompt) :], needed[i] / count) for i in range(len(entries))]


def look_up(ids: list[int], count: int, width: int = 2) -> list[int]:
    """A guess how it goes on: as where the last tokens stood before (Saxena 2023)."""
    last = ids[-width:]
    for at in range(len(ids) - width - 1, -1, -1):
        if ids[at : at + width] == last:
            return ids[at + width : at + width + count]
    return []


def decode_with_guesses(
    cached: CachedModel, sampler: Sampler, prompt: list[int], logits: Array, entry: int,
    count: int, guesses: int,
) -> tuple[list[int], int]:  # fmt: skip
    """The same tokens as `decode` draws for sequence 0, and how many passes they took.

    A pass checks several guesses at once; what follows a wrong one is taken back from the cache
    (Leviathan et al. 2023).
    """
    ids, passes = list(prompt), 0
    token = sampler(logits, 0, len(ids))
    while len(ids) < len(prompt) + count:
        guess = look_up([*ids, token], guesses)
        rows = cached(np.array([[token, *guess]]), [entry])[0]
        drawn = [sampler(row, 0, len(ids) + 1 + i) for i, row in enumerate(rows)]
        right = next((i for i, g in enumerate(guess) if g != drawn[i]), len(guess))
        ids += [token, *guess[:right]]
        token = drawn[right]
        cached.truncate(entry, len(ids))
        passes += 1
    return ids[len(prompt) : len(prompt) + count], passes


def decode_without_cache(
    model: LanguageModel, sampler: Sampler, prompt: list[int], count: int
) -> list[int]:
    """The tokens of sequence 0, with the whole text through the model for each."""
    ids = list(prompt)
    for position in range(len(prompt), len(prompt) + count):
        ids.append(sampler(model(np.array([ids]))[0, -1], 0, position))
    return ids[len(prompt) :]


def read_model(path: Path, seed: int) -> tuple[LanguageModel, int, Any]:
    """The model of a checkpoint, or a random one; its number of heads, its tokenizer."""
    settings: dict[str, Any] = {"dim": 192, "heads": 4, "blocks": 4}
    if path.exists():
        settings = read_notes(path)["settings"]
        if "tokenizer" not in settings:
            raise ValueError(f"{path}: holds no language model")
    tokenizer = Tokenizer.from_str(settings.get("tokenizer") or make_tokenizer([], 257))
    dim, heads, blocks = (int(settings[name]) for name in ("dim", "heads", "blocks"))
    rng = np.random.default_rng(seed)
    model = LanguageModel(tokenizer.get_vocab_size(), dim, heads, blocks, rng)
    if path.exists():
        with safe_open(path, "np") as file:
            for name, array in model.parameters().items():
                array[...] = file.get_tensor(f"model.{name}")
    for block in model.blocks:
        block.attend.inner.eval()  # nothing is kept for a backward pass
    return model, heads, tokenizer


class Clock:
    """Prints what was done in how many tokens a second."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def say(self, what: str, tokens: int, *more: str) -> None:
        rate = tokens / max(time.perf_counter() - self.start, 1e-9)
        print(f"{what:<15}{tokens:5d} tokens {rate:9.0f} tokens/s   {', '.join(more)}".rstrip())
        self.start = time.perf_counter()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Let the language model write, with a cache.")
    parser.add_argument("--prompt", default=PROMPT, help="what the text starts with")
    numbers = {
        "tokens": (200, 1, "to write, after the prompt"),
        "batch": (4, 1, "continuations, of which the likeliest is printed"),
        "guesses": (8, 0, "checked at a time in the speculative run; 0: no such run"),
        "check": (100, 0, "tokens that are written once more without a cache, and compared"),
        "page-size": (16, 1, "tokens of a page of the cache"),
        "seed": (0, 0, "of what is drawn, and of random weights"),
    }
    for name, (default, _, text) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default,
                            help=f"{text} (default: %(default)s)")  # fmt: skip
    parser.add_argument("--temperature", type=float, default=0.7,
                        help="0: always the likeliest token (default: %(default)s)")  # fmt: skip
    parser.add_argument("--dtype", default="float32", choices=DTYPES,
                        help="of the cache (default: %(default)s)")  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, metavar="FILE",
                        help=f"of language_model.py (default: {CHECKPOINT}, or random weights)")  # fmt: skip
    options = parser.parse_args(arguments)
    for name, (_, least, _) in numbers.items():
        if (given := getattr(options, name.replace("-", "_"))) < least:
            parser.error(f"--{name}: is {given}, must be at least {least}")
    if options.checkpoint is not None and not options.checkpoint.exists():
        parser.error(f"--checkpoint: there is no {options.checkpoint}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a continuation of the prompt, in several ways that give the same."""
    options = parse(arguments)
    path = options.checkpoint or CHECKPOINT
    if not path.exists():
        print(f"random weights, so the text is noise: there is no {path} (python"
              " examples/language_model.py makes it)")  # fmt: skip
    model, heads, tokenizer = read_model(path, options.seed)
    prompt: list[int] = tokenizer.encode(END + options.prompt).ids  # as a file starts
    count, sampler = options.tokens, Sampler(options.temperature, options.seed)
    longest = len(prompt) + count + options.guesses
    cached = CachedModel(
        model, heads, pages=(options.batch + 1) * (longest // options.page_size + 2),
        page_size=options.page_size, dtype=options.dtype,
    )  # fmt: skip

    clock = Clock()
    shared = cached.add()
    logits = cached(np.array([prompt]), [shared])[0, -1]
    clock.say("prefill", len(prompt))

    entries = [cached.fork(shared) for _ in range(options.batch)]
    drawn = decode(cached, sampler, prompt, logits, entries, count)
    cache = cached.caches[0]
    pages = cache.pages - cache.free_pages
    apart = sum(len(cache.block_table(entry)) for entry in (shared, *entries))
    clock.say(f"decode × {options.batch}", options.batch * count, f"{pages} pages, not {apart}")
    for entry in entries:
        cached.free(entry)

    same = True
    if options.guesses > 0:
        ids, passes = decode_with_guesses(
            cached, sampler, prompt, logits, cached.fork(shared), count, options.guesses
        )
        same = compare(clock, "with guesses", ids, drawn[0][0], f"{count / passes:.2f} a pass")
    if options.check > 0:
        ids = decode_without_cache(model, sampler, prompt, min(count, options.check))
        same &= compare(clock, "without cache", ids, drawn[0][0])
    best, needed = min(drawn, key=lambda one: one[1])
    print(f"the likeliest of {options.batch}, {needed:.2f} bits a token:\n")
    print(tokenizer.decode([*prompt, *best]))
    return 0 if same or options.dtype != "float32" else 1


def compare(clock: Clock, what: str, ids: list[int], expected: list[int], *more: str) -> bool:
    """Print the rate, and whether the tokens are those that were expected."""
    right = next((i for i, t in enumerate(ids) if t != expected[i]), len(ids))
    same = right == len(ids)
    clock.say(what, len(ids), "the same tokens" if same else f"others from {right} on", *more)
    return same


if __name__ == "__main__":
    sys.exit(main())
