"""Time decoding steps beside the bandwidth at which this machine reads memory.

    python benchmarks/decode.py                         everything: a quarter of an hour
    python benchmarks/decode.py --case gqa --case pages some cases
    python benchmarks/decode.py --list                  their names and lines

The lines of a case take turns, with the probes of the bandwidth and of the multiply-add peak
between them.  Keys and values take 1 GiB a line, but where a case says that they lie in a cache.
Outputs are checked against float64 before anything is timed.

GB/s are the keys and values (and factors) of a call, each read once, by its time.  "read" is that
by the bandwidth measured in the same round; "peak" the GFLOP/s by what the products' instruction
reaches in registers then (bfloat16's own, where the instruction set has one); "roof" the time that the
slower of both needs at best, by the time taken: 100 % is all that this machine can do; "first" how
much faster than the case's first line.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import attncore
from appending import appending
from attncore._cli.measure import (
    Contender,
    Summary,
    WrongOutput,
    human,
    product_peak,
    read_bandwidth,
    time_in_rounds,
)
from attncore._cli.packages import progress, say
from bench import environment
from cases import APPENDS, DECODE_CASES, Lines, fits
from steppers import verified
from steps import MIB, Step
from stores import Pools, stores
from training import Unsupported

Record = dict[str, Any]


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--case", action="append", default=[], metavar="PATTERN",
        help="a name, its beginning or a pattern; may be given again")  # fmt: skip
    add("--threads", type=int, default=attncore.get_num_threads(), help="default: attncore's own")
    add("--rounds", type=int, default=9, help="default: %(default)s")
    add("--budget", type=float, default=40.0, metavar="SECONDS",
        help="slow cases get fewer rounds, to take about this long (default: %(default)s)")  # fmt: skip
    add("--held", type=int, metavar="MIB", help="keys and values take at most so much a line")
    add("--json", type=Path, metavar="FILE", help="write the records too, for compare.py")
    add("--list", action="store_true", help="print the cases and stop")
    return parser


PROBES = ("read", "peak float32", "peak bfloat16")  # none is a line's name


@dataclass
class Probes:
    """What the machine reaches, measured between the lines: the best of each round."""

    held: int
    threads: int
    now: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PROBES})
    rounds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PROBES})

    def contenders(self) -> list[Contender]:
        """To take turns with the lines."""
        return [
            Contender("read", lambda: self.now["read"].append(self.read())),
            *(Contender(name, partial(self.peak, name)) for name in PROBES[1:]),
        ]

    def read(self) -> float:
        """Bytes a second."""
        return 1e9 * read_bandwidth(self.held, self.threads)

    def peak(self, name: str) -> None:
        """Floating-point operations a second of this dtype's products."""
        gflops = product_peak(attncore.isa(), name == PROBES[2], self.threads)
        self.now[name].append(1e9 * gflops)

    def end_of_round(self) -> None:
        """Keep the round's best, forget the rest."""
        for name, values in self.now.items():
            self.rounds[name].append(max(values))
            values.clear()


def line_up(name: str, lines: Lines, threads: int) -> tuple[dict[str, Contender], dict[str, str]]:
    """Who can make the steps and does it right, and why torch cannot; else WrongOutput.

    Sequences that begin with the same tokens get the same bits, whether they share them or not.
    """
    line: dict[str, Contender] = {}
    absent: dict[str, str] = {}
    bits: dict[int, bytes] = {}
    pools = Pools()
    for label, step in lines.items():
        try:
            contender, out = verified(label, step, stores(step, pools), threads)
        except (Unsupported, WrongOutput, RuntimeError) as reason:
            if step.by != "torch":
                raise
            absent[label] = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
            continue
        line[label] = contender
        if step.prefix and out.tobytes() != bits.setdefault(step.prefix, out.tobytes()):
            raise WrongOutput(f"{name}: {label} has other bits than the case's first line")
    return line, absent


def run(name: str, lines: Lines, options: argparse.Namespace) -> tuple[list[Record], list[str]]:
    """Check, time in turns, and sum up: a record a line, and what was skipped."""
    line, absent = line_up(name, lines, options.threads)
    skipped = [f"# {name} {label}: skipped, {why}" for label, why in absent.items()]
    if not line:
        return [], skipped
    probes = Probes(max(lines[label].bytes * lines[label].sets for label in line), options.threads)
    everyone = [*line.values(), *probes.contenders()]
    times = time_in_rounds(everyone, options.rounds, options.budget, probes.end_of_round)
    measured = {probe: np.array(values) for probe, values in probes.rounds.items()}
    first = next(iter(lines))
    rows = []
    for label in line:
        row = record(lines[label], times[label], measured)
        if first in line:
            pace = lines[label].flops / np.array(times[label])
            row["first"] = float(np.median(pace / (lines[first].flops / np.array(times[first]))))
        rows.append({"case": f"{name}/{label}", "threads": options.threads, **row})
    return rows, skipped


def run_appends(options: argparse.Namespace) -> list[Record]:
    """The lines of "append": the time of one."""
    line = [appending(label, append) for label, append in APPENDS.items()]
    times = time_in_rounds(line, options.rounds, options.budget)
    rows = []
    for label, seconds in times.items():
        append = APPENDS[label]
        summary = Summary.of([second / append.tokens for second in seconds])
        rows.append({
            "case": f"append/{label}", "isa": attncore.isa(), "dtype": append.stored,
            "threads": options.threads, "rounds": len(seconds), "median": summary.median,
            "spread": summary.spread, "best": summary.best,
            "tokens_per_second": append.batch / summary.median,
        })  # fmt: skip
    return rows


def record(step: Step, seconds: list[float], measured: dict[str, Any]) -> Record:
    """One line's numbers; shares are medians over rounds."""
    read = measured["read"]
    peak = measured[PROBES[2] if step.query_dtype == "bfloat16" else PROBES[1]]
    summary = Summary.of(seconds)
    taken = np.array(seconds)
    reading, computing = step.bytes / read, step.flops / peak
    return {
        "isa": attncore.isa(),
        "dtype": step.stored,
        "rounds": len(seconds),
        "median": summary.median,
        "spread": summary.spread,
        "best": summary.best,
        "tokens_per_second": step.tokens / summary.median,
        "gflops": step.flops / summary.median / 1e9,
        "gbytes": step.bytes / summary.median / 1e9,
        "read_gbytes": float(np.median(read)) / 1e9,
        "peak_gflops": float(np.median(peak)) / 1e9,
        "read_share": float(np.median(reading / taken)),
        "peak_share": float(np.median(computing / taken)),
        "roof_share": float(np.median(np.maximum(reading, computing) / taken)),
        "first": None,
    }


HEADER = (
    f"{'case':<34} {'median':>9} {'spread':>7} {'tokens/s':>9} {'GB/s':>7} {'read':>6}"
    f" {'GFLOP/s':>8} {'peak':>6} {'roof':>6} {'first':>7}"
)


def show(row: Record) -> str:
    """A record as one line."""
    start = (
        f"{row['case']:<34} {human(row['median']):>9} {row['spread']:>7.1%}"
        f" {row['tokens_per_second']:>9.0f}"
    )
    if "gbytes" not in row:
        return start
    first = "" if row["first"] is None else f"{row['first']:.2f}x"
    return (
        f"{start} {row['gbytes']:>7.1f} {row['read_share']:>6.0%}"
        f" {row['gflops']:>8.1f} {row['peak_share']:>6.0%} {row['roof_share']:>6.0%} {first:>7}"
    )


def run_named(name: str, options: argparse.Namespace) -> tuple[list[Record], list[str]]:
    """The records of a case, and the lines to print below them."""
    if name == "append":
        return run_appends(options), []
    lines = DECODE_CASES[name]
    most = options.held * MIB if options.held else max(step.held for step in lines.values())
    steps = {label: replace(step, held=min(step.held, most)) for label, step in lines.items()}
    rows, below = run(name, steps, options)
    if rows:
        peaks = " and ".join(f"{peak:.0f}" for peak in sorted({row["peak_gflops"] for row in rows}))
        below.append(f"{'':<34} reads {rows[0]['read_gbytes']:.1f} GB/s, multiply-adds"
                     f" {peaks} GFLOP/s")  # fmt: skip
    return rows, below


def main() -> int:
    """Run the cases; exit status 1 where an output of attncore is wrong."""
    options = arguments().parse_args()
    known = {name: ", ".join(lines) for name, lines in DECODE_CASES.items()}
    known["append"] = ", ".join(APPENDS)
    names = [name for name in known if fits(name, options.case)]
    if not names:
        raise SystemExit("decode.py: no such case; there are: " + ", ".join(known))
    if options.list:
        print(*(f"{name:<22} {known[name]}" for name in names), sep="\n")
        return 0
    say(f"attncore {attncore.__version__}, {attncore.isa()}, {options.threads} threads")
    say(HEADER)
    records: list[Record] = []
    failed = False
    for name in progress(names, "decode"):
        try:
            rows, below = run_named(name, options)
        except WrongOutput as wrong:
            say(f"WRONG OUTPUT: {name}: {wrong}")
            failed = True
            continue
        for text in (*map(show, rows), *below):
            say(text)
        records += rows
    if options.json:
        page = {"environment": environment(), "records": records}
        options.json.write_text(json.dumps(page, indent=1, default=str) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
