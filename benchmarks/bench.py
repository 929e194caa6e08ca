"""Time attncore on the cases of cases.py: one line a (case, ISA, dtype, threads).

    python benchmarks/bench.py                               everything on the best ISA: minutes
    python benchmarks/bench.py --case prefill-2k --isa all   some cases on every ISA
    python benchmarks/bench.py --precision highest,medium    both, in turns
    python benchmarks/bench.py --case vit --peers            and other libraries beside it

Outputs are checked against float64 before anything is timed.  With --peers all contenders take
turns in rounds in this process; "torch 1.40x" says that torch needs 1.40 times our time, "foreseen
0.95x" that explain() expected 0.95 times of it.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

import attncore
import footprint
import markdown
import peers
import training
from attncore._cli.bench import DTYPES
from attncore._cli.case import Case, Inputs, dtype_named
from attncore._cli.measure import (
    Contender,
    Summary,
    WrongOutput,
    fma_peak,
    human,
    our_name,
    ours,
    read_bandwidth,
    time_in_rounds,
    verified,
)
from attncore._cli.packages import progress, say
from attncore._types import Precision
from cases import CASES, matching

Record = dict[str, Any]
PRECISIONS: tuple[str, ...] = get_args(Precision)


@dataclass(frozen=True)
class Job:
    """One group of lines: a case, a dtype and a number of threads, on some ISAs, to some precisions."""

    case: Case
    dtype: str
    threads: int
    isas: tuple[str, ...]
    precisions: tuple[Precision, ...]
    rounds: int
    budget: float
    peers: tuple[str, ...]


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--case", action="append", default=[], metavar="PATTERN",
        help="a name, its beginning or a pattern; may be given again")  # fmt: skip
    add("--dtype", default="float32", help=f"a list of {', '.join(DTYPES)}, or all")
    add("--isa", default=None, help="a list, or all (default: the one in use)")
    add("--precision", default="highest", metavar="NAMES",
        help=f"of float32, a list of {', '.join(PRECISIONS)}, or all (default: %(default)s)")  # fmt: skip
    add("--threads", default=None, help="a list of numbers (default: attncore's own)")
    add("--rounds", type=int, default=9, help="default: %(default)s")
    add("--budget", type=float, default=40.0, metavar="SECONDS",
        help="slow cases get fewer rounds, to take about this long (default: %(default)s)")  # fmt: skip
    add("--peers", nargs="?", const="all", default=None,
        help="time other libraries too: all, or a list of " + ", ".join(peers.PEERS))  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write the records: compare.py, plot.py")
    add("--markdown", type=Path, metavar="FILE", help="write the records as a table too")
    add("--memory", action="store_true",
        help="record peak memory too, of a call in a process of its own")  # fmt: skip
    add("--list", action="store_true", help="print the cases and stop")
    return parser


def choices(text: str, known: tuple[str, ...], what: str) -> tuple[str, ...]:
    """Names from a comma-separated list; SystemExit for one that does not exist."""
    if text == "all":
        return known
    names = tuple(text.split(","))
    for name in names:
        if name not in known:
            raise SystemExit(f"bench.py: no {what} {name!r} here; there are: {', '.join(known)}")
    return names


def jobs(options: argparse.Namespace) -> list[Job]:
    """The work that the command line asks for."""
    cases = matching(options.case)
    if not cases:
        raise SystemExit("bench.py: no such case; there are: " + ", ".join(c.name for c in CASES))
    dtypes = choices(options.dtype, DTYPES, "dtype")
    isas = choices(options.isa or attncore.isa(), tuple(attncore.available_isas()), "ISA")
    threads = [int(n) for n in (options.threads or str(attncore.get_num_threads())).split(",")]
    wanted: tuple[str, ...] = ()
    if options.peers:
        wanted = choices(options.peers, tuple(peers.PEERS), "peer")
    here = tuple(name for name in wanted if name in peers.installed())
    for name in wanted:
        if name not in here:
            print(f"# {name}: skipped, not installed: pip install {peers.PEERS[name][0]}")
    precisions = choices(options.precision, PRECISIONS, "precision")

    def matter(case: Case, dtype: str) -> tuple[Precision, ...]:
        """Those that make a difference there."""
        all_of_them = dtype == "float32" and not case.training
        return cast("tuple[Precision, ...]", precisions if all_of_them else PRECISIONS[:1])

    return [
        Job(case, dtype, count, isas, matter(case, dtype), options.rounds, options.budget, here)
        for case in cases
        for dtype in dtypes
        for count in threads
    ]


def line_up(job: Job, inputs: Inputs) -> tuple[list[Contender], dict[str, str]]:
    """Everyone who can do the job and does it right, and why the others cannot.

    A wrong output of attncore itself is an error: WrongOutput.
    """
    if job.case.training:
        test, line = training.verified, [training.ours(inputs, i, job.threads) for i in job.isas]
    else:
        test = verified
        line = [ours(inputs, i, job.threads, p) for i in job.isas for p in job.precisions]
    for contender in line:
        test(job.case, inputs, contender)
    absent: dict[str, str] = {}
    for name in job.peers:
        try:
            contender = peers.contender(name, job.case, inputs, job.threads)
            test(job.case, inputs, contender)
            line.append(contender)
        except (peers.Unsupported, WrongOutput, RuntimeError, MemoryError) as reason:
            absent[name] = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
    return line, absent


def run(job: Job) -> list[Record]:
    """Check, time in turns, and sum up: one record an ISA and precision."""
    dtype = dtype_named(job.dtype)
    inputs = job.case.inputs(dtype)
    line, absent = line_up(job, inputs)
    before = {isa: fma_peak(isa, dtype, job.threads) for isa in job.isas}
    times = time_in_rounds(line, job.rounds, job.budget)
    rows = []
    for isa in job.isas:  # neighbours disturb the probe too: the better of two
        peak = max(before[isa], fma_peak(isa, dtype, job.threads))
        for precision in job.precisions:
            row = record(job, isa, precision, times, absent, peak)
            if not job.case.training:
                row["foreseen"] = foreseen(job, inputs, isa, precision) / row["median"]
            rows.append(row)
    return rows


def foreseen(job: Job, inputs: Inputs, isa: str, precision: Precision) -> float:
    """The seconds that explain() says that a call takes: the median of some."""
    operands = inputs.query, inputs.key, inputs.value
    options = {**inputs.options, "num_threads": job.threads, "precision": precision}
    with attncore.use_isa(isa):
        plans = [attncore.explain(*operands, **options) for _ in range(3)]
    return float(np.median([plan.estimated_seconds for plan in plans]))


def record(
    job: Job,
    isa: str,
    precision: Precision,
    times: dict[str, list[float]],
    absent: dict[str, str],
    peak: float,
) -> Record:
    """One line's numbers.  A ratio is the median over rounds of a peer's time by ours."""
    mine = times[our_name(isa, precision)]
    summary = Summary.of(mine)
    rate = job.case.flops / summary.median / 1e9
    theirs = {
        name: {
            "median": Summary.of(times[name]).median,
            "best": min(times[name]),
            "ratio": float(np.median([b / a for a, b in zip(mine, times[name], strict=True)])),
        }
        for name in job.peers
        if name in times
    }
    return {
        "case": job.case.name,
        "isa": isa,
        "dtype": job.dtype,
        "precision": precision,
        "threads": job.threads,
        "rounds": len(mine),
        "median": summary.median,
        "spread": summary.spread,
        "best": summary.best,
        "gflops": rate,
        "gbytes": job.case.bytes(dtype_named(job.dtype).itemsize) / summary.median / 1e9,
        "peak_gflops": peak,
        "peak_share": rate / peak,
        "peers": theirs,
        "absent": absent,
    }


HEADER = (
    f"{'case':<23} {'isa':<9} {'dtype':<9} {'precision':<9} {'thr':>3} {'median':>9} {'spread':>7}"
    f" {'GFLOP/s':>8} {'GB/s':>6} {'% peak':>7}"
)


def show(row: Record) -> str:
    """A record as one line."""
    share = f"{100 * row['peak_share']:.0f}%"
    text = (
        f"{row['case']:<23} {row['isa']:<9} {row['dtype']:<9} {row['precision']:<9}"
        f" {row['threads']:>3}"
        f" {human(row['median']):>9} {100 * row['spread']:>6.1f}%"
        f" {row['gflops']:>8.1f} {row['gbytes']:>6.1f} {share:>7}"
    )
    if row["peers"]:
        best = min(row["peers"].values(), key=lambda peer: float(peer["ratio"]))
        text += "  " + "  ".join(f"{n} {peer['ratio']:.2f}x" for n, peer in row["peers"].items())
        text += f"  | best {best['ratio']:.2f}x"
    if "foreseen" in row:
        text += f"  foreseen {row['foreseen']:.2f}x"
    if row["absent"]:
        text += "  (" + "; ".join(f"{name}: {why}" for name, why in row["absent"].items()) + ")"
    return text


def environment() -> Record:
    """What the numbers depend on."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "read_gbytes": read_bandwidth(1 << 28, attncore.get_num_threads()),
        "attncore": attncore.show_config(mode="dicts"),
    }


def write(options: argparse.Namespace, about: Record, records: list[Record]) -> None:
    """The files that were asked for, after each job: a run that is stopped has left its lines."""
    page = json.dumps({"environment": about, "records": records}, indent=1, default=str)
    if options.json:
        options.json.write_text(page + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(markdown.table(records), encoding="utf-8")


def main() -> int:
    """Run the jobs; exit status 1 where an output of attncore is wrong."""
    options = arguments().parse_args()
    if options.list:
        print(*(f"{case.name:<23} {case}" for case in CASES), sep="\n")
        return 0
    work = jobs(options)
    print(HEADER + ("  peer's time / our time" if options.peers else ""), flush=True)
    records: list[Record] = []
    about, failed = environment(), False
    for job in progress(work, "bench"):
        try:
            rows = run(job)
        except WrongOutput as wrong:
            say(f"WRONG OUTPUT: {wrong}")
            failed, rows = True, []
        for row in rows:
            say(show(row))
            if options.memory and not job.case.training:
                who = ("attncore", *row["peers"])
                row["memory"] = {x: footprint.footprint(x, job.case, job.dtype, job.threads)
                                 for x in who}  # fmt: skip
        records += rows
        write(options, about, records)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
