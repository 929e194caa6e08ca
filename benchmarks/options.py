"""What options, threads and idleness cost, beside the bar that each is held to.

    python benchmarks/options.py [--dtype float32,bfloat16] [--rounds 7]

The lines of a group take turns in rounds; a figure is the median of the rounds' ratios.  "of plain"
is the plain rate over what is visible, by the line's; "× the time" the inverse.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

import attncore
from attncore._cli.case import Case, dtype_named
from attncore._cli.measure import Contender, ours, read_bandwidth, time_in_rounds
from attncore._cli.packages import say

LONG = Case("plain", 1, 8, 8, 4096, 4096, 64)
PLAIN = Case("plain", 1, 16, 16, 2048, 2048, 64)
TINY = ((Case("tiny-16", 1, 8, 8, 16, 16, 64), 6.0), (Case("tiny-1", 1, 1, 1, 1, 1, 64), 1.2))
IDLE = "… after 5 ms of idleness"
Call: TypeAlias = Callable[[], object]
BIASED = Case("bias", 1, 16, 16, 1024, 1024, 64, bias=True)


@dataclass(frozen=True)
class Line:
    """One option beside the case without it."""

    name: str
    case: Case
    plain: Case
    target: float
    at_most: bool = False  # the target is a time; else a rate
    visible: bool = True  # the plain time is that of what is visible
    options: tuple[tuple[str, Any], ...] = ()
    share: float = 1.0  # of the pairs that these options leave visible
    threads: int | None = None  # of the plain case, where they differ

    def expected(self, dtype: np.dtype[Any], plain: float, threads: int) -> float:
        """The time that the plain rate makes, or reading the bias where that takes longer."""
        work = self.share * self.case.flops / self.plain.flops if self.visible else 1.0
        if not self.case.bias:
            return plain * work
        size = self.case.heads * self.case.queries * self.case.keys * dtype.itemsize
        return max(plain * work, size / read_bandwidth(size, threads) / 1e9)


def checkered(tokens: int) -> Any:
    """A mask of blocks of 512 keys and queries, every other one hidden."""
    at = np.arange(tokens) // 512
    return (at[:, None] + at) % 2 == 0


def segments(tokens: int) -> tuple[tuple[str, Any], ...]:
    """Packed documents of 512 tokens each."""
    of_token = np.arange(tokens)[None] // 512
    return ("query_segments", of_token), ("key_segments", of_token)


def lines(dtype: str, threads: int) -> list[Line]:
    """The bars of a dtype."""
    rng = np.random.default_rng(0)
    tokens = PLAIN.keys
    slopes = np.float32(2) ** -np.linspace(0.5, 8, PLAIN.heads, dtype=np.float32)
    masks = {
        "all visible": (np.ones((tokens, tokens), bool), 1.0),
        "blocks, half visible": (checkered(tokens), 0.5),
        "9 of 10 at random": (rng.random((tokens, tokens)) < 0.9, 1.0),  # all tiles are visible
    }
    window = Case("window", 1, 8, 8, 16384, 16384, 64, window=1024)
    found = [
        Line("causal 4k", replace(LONG, causal=True), LONG, 0.56, at_most=True, visible=False),
        Line("window 1024 of 16k", window, LONG, 1.35, at_most=True),
        Line("ALiBi", PLAIN, PLAIN, 0.8, options=(("alibi", slopes),)),
        *(
            Line(f"mask, {name}", PLAIN, PLAIN, 0.8, options=(("mask", mask),), share=share)
            for name, (mask, share) in masks.items()
        ),
        Line(
            "softcap",
            PLAIN,
            PLAIN,
            0.5 if dtype == "bfloat16" else 0.8,
            options=(("softcap", 30.0),),
        ),
        Line(
            "segments of 512 in 4k",
            LONG,
            LONG,
            0.8,
            options=segments(LONG.keys),
            share=512 / LONG.keys,
        ),
        Line("bias", BIASED, replace(BIASED, bias=False), 0.8),
    ]
    if threads > 1:
        target = 0.95 * threads
        found.append(Line(f"threads 1 → {threads}", PLAIN, PLAIN, target, threads=1))
    return found


def measured(line: Line, dtype: np.dtype[Any], threads: int, rounds: int) -> float:
    """The median of the rounds' ratios."""
    inputs = line.case.inputs(dtype)
    inputs.options.update(line.options)
    here, there = (
        replace(ours(x, attncore.isa(), n), name=name)
        for name, x, n in (
            ("line", inputs, threads),
            ("plain", line.plain.inputs(dtype), line.threads or threads),
        )
    )
    times = time_in_rounds([here, there], rounds)
    expected = (line.expected(dtype, plain, threads) for plain in times["plain"])
    rate = np.median([e / t for e, t in zip(expected, times["line"], strict=True)])
    return float(1 / rate if line.at_most else rate)


def singly(call: Call, calls: int, idle: float) -> float:
    """The median time of single calls, after idleness of so many seconds each."""
    times = []
    for _ in range(calls):
        if idle:
            time.sleep(idle)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def tiny(case: Case, dtype: np.dtype[Any], threads: int) -> Call:
    """A call into an array that is there."""
    inputs = case.inputs(dtype)
    out = np.empty_like(inputs.query)
    arrays = (inputs.query, inputs.key, inputs.value)
    return lambda: attncore.attention(*arrays, out=out, num_threads=threads)


def others() -> dict[str, Call]:
    """What tells the machine's part of a tiny call after idleness: its caches are cold."""
    a, b, out = np.ones((3, 64), np.float32)
    return {"a call that does nothing": lambda: None, "numpy.add": lambda: np.add(a, b, out=out)}


def after_idleness(call: Call) -> float:
    """The median time of single calls after 5 ms of idleness each, by that of calls in a row."""
    return singly(call, 300, 0.005) / singly(call, 3000, 0.0)


def main() -> int:
    """Print a line a bar."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float32", help="a list (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=attncore.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    options = parser.parse_args()
    say(f"attncore {attncore.__version__}, {attncore.isa()}, {options.threads} threads")
    for name in options.dtype.split(","):
        dtype = dtype_named(name)
        for line in lines(name, options.threads):
            value = measured(line, dtype, options.threads, options.rounds)
            kind = "× the time, at most" if line.at_most else "of plain, at least"
            say(f"{name:<9} {line.name:<28} {value:>5.2f} {kind} {line.target:.2f}")
        for case, target in TINY:
            call = tiny(case, dtype, options.threads)
            seconds = float(np.median(time_in_rounds([Contender("tiny", call)], 9)["tiny"]))
            idle = after_idleness(call)
            say(f"{name:<9} {case.name:<28} {1e6 * seconds:>5.2f} µs, at most {target} in float32")
            say(f"{name:<9} {IDLE:<28} {idle:>5.2f} × the time, at most 1.30")
    for name, call in others().items():
        say(f"{'':<9} {name:<28} {1e6 * singly(call, 3000, 0.0):>5.2f} µs")
        say(f"{'':<9} {IDLE:<28} {after_idleness(call):>5.2f} × the time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
