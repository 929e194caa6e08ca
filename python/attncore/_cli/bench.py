"""``python -m attncore bench``: a few small cases in some seconds.

Shapes that people quote, and the comparison with other libraries, are in the source checkout:
``python benchmarks/bench.py --peers``.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

import attncore
from attncore._cli.case import Case, dtype_named
from attncore._cli.measure import (
    Summary,
    WrongOutput,
    fma_peak,
    human,
    ours,
    time_in_rounds,
    verified,
)
from attncore._cli.packages import progress, say

HELP = "time a few small cases on every ISA that this CPU has"
DTYPES = ("float32", "float64", "float16", "bfloat16")
#          name          B  H  Hk  Sq    Sk    D
SHORT = (
    Case("short", 1, 8, 8, 1024, 1024, 64),
    Case("short-causal", 1, 8, 8, 1024, 1024, 64, causal=True),
    Case("short-decode", 1, 32, 8, 1, 4096, 128),
    Case("short-tiny", 1, 4, 4, 16, 16, 64),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--isa", help="one ISA only (default: every one that this CPU has)")
    parser.add_argument("--threads", type=int, help="threads (default: attncore's own number)")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")


def run(options: argparse.Namespace) -> int:
    """Check and time each case on each ISA; one line each."""
    threads = options.threads or attncore.get_num_threads()
    isas = [options.isa] if options.isa else list(attncore.available_isas())
    unknown = [isa for isa in isas if isa not in attncore.available_isas()]
    if unknown:
        print(f"attncore bench: this machine has no ISA {unknown[0]!r}, only"
              f" {', '.join(attncore.available_isas())}", file=sys.stderr)  # fmt: skip
        return 1
    dtype = dtype_named(options.dtype)
    print(
        f"{options.dtype}, {threads} thread{'s' * (threads != 1)}; % of the FMA peak measured now"
    )
    print(f"{'case':<14} {'isa':<9} {'median':>9} {'spread':>7} {'GFLOP/s':>9} {'% peak':>7}")
    lines = [(case, isa) for case in SHORT for isa in isas]
    try:
        for case, isa in progress(lines, "bench"):
            say(line(case, isa, dtype, threads, options.rounds))
    except WrongOutput as wrong:
        print(f"attncore bench: {wrong}", file=sys.stderr)
        return 1
    return 0


def line(case: Case, isa: str, dtype: np.dtype[np.generic], threads: int, rounds: int) -> str:
    """Check a case, time it and say how fast it was."""
    inputs = case.inputs(dtype)
    contender = ours(inputs, isa, threads)
    verified(case, inputs, contender)
    times = Summary.of(time_in_rounds([contender], rounds, budget=1.0)[contender.name])
    rate = case.flops / times.median / 1e9
    share = f"{100 * rate / fma_peak(isa, dtype, threads):.0f}"
    return (f"{case.name:<14} {isa:<9} {human(times.median):>9} {100 * times.spread:>6.0f}%"
            f" {rate:>9.1f} {share:>7}")  # fmt: skip
