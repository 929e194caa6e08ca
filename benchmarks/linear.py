"""Time attncore.linear beside torch.nn.functional.linear and the multiply-add peak.

    python benchmarks/linear.py                     the cases of cases.LINEAR_CASES
    python benchmarks/linear.py --case square-4096 --dtype bfloat16

Outputs are checked against float64 on sampled rows, of the very arrays that are timed.  All take
turns in rounds; "torch 1.10x" says that torch needs 1.10 times our time.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

import attncore
from attncore._cli.case import Array, dtype_named
from attncore._cli.measure import (
    TOLERANCE,
    Contender,
    Summary,
    WrongOutput,
    fma_peak,
    human,
    time_in_rounds,
)
from attncore._cli.packages import load, present, say
from cases import LINEAR_CASES
from training import as_array, torch_tensor


def verified(contender: Contender, x: Array, weight: Array) -> None:
    """Run a contender once; WrongOutput where sampled rows are off."""
    out = contender.array(contender.call())
    rows = np.unique(np.linspace(0, len(x) - 1, 5).astype(int))
    exact = x[rows].astype(np.float64) @ weight.astype(np.float64).T
    error = np.linalg.norm(out[rows].astype(np.float64) - exact) / np.linalg.norm(exact)
    if out.shape != (len(x), len(weight)) or not error <= TOLERANCE[x.dtype.name]:
        raise WrongOutput(f"{contender.name} is off by {error:.1e} on sampled rows")


def torch_linear(x: Array, weight: Array, threads: int) -> Contender:
    """torch.nn.functional.linear on the same memory."""
    library = load("torch")
    library.set_num_threads(threads)

    inputs = torch_tensor(x), torch_tensor(weight)
    function = library.nn.functional.linear
    return Contender("torch", lambda: function(*inputs), as_array)


def run(case: str, dtype: np.dtype[Any], threads: int, rounds: int) -> str:
    """The line of one case."""
    rows, inner, outer = LINEAR_CASES[case]
    rng = np.random.default_rng(0)
    x, weight = (
        rng.standard_normal(shape, dtype=np.float32).astype(dtype)
        for shape in ((rows, inner), (outer, inner))
    )
    contenders = [Contender("attncore", lambda: attncore.linear(x, weight, num_threads=threads))]
    if present("torch"):
        contenders.append(torch_linear(x, weight, threads))
    for contender in contenders:
        verified(contender, x, weight)
    peaks: list[float] = []
    probe = Contender("peak", lambda: peaks.append(fma_peak(attncore.isa(), dtype, threads)))
    times = time_in_rounds([*contenders, probe], rounds)
    ours = Summary.of(times["attncore"])
    gigaflops = 2e-9 * rows * inner * outer / ours.median
    read = 1e-9 * weight.nbytes / ours.median
    line = (
        f"{case:<12} {dtype.name:<9} {human(ours.median):>9} ±{ours.spread:>4.0%}"
        f" {gigaflops:>7.1f} GFLOP/s, {gigaflops / np.median(peaks):>4.0%} of the peak"
        f" {read:>6.1f} GB/s of weight"
    )
    if "torch" in times:
        theirs = Summary.of(times["torch"])
        line += f"   torch {theirs.median / ours.median:.2f}x (best {theirs.best / ours.best:.2f}x)"
    return line


def main() -> int:
    """Print a line a (case, dtype)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", choices=list(LINEAR_CASES))
    parser.add_argument("--dtype", default="float32,bfloat16", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=attncore.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    say(f"attncore {attncore.__version__}, {attncore.isa()}, {options.threads} threads")
    for case in options.case or LINEAR_CASES:
        for dtype in options.dtype.split(","):
            say(run(case, dtype_named(dtype), options.threads, options.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
