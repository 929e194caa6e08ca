"""The peak memory of one call beyond its inputs and its output, ours or a peer's.

``python benchmarks/footprint.py WHO CASE DTYPE THREADS`` prints bytes, in a process of its own:
what a process has held before hides what a call needs.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from dataclasses import replace

import attncore
import peers
from attncore._cli.case import Case, dtype_named
from attncore._cli.measure import Contender, ours
from attncore._cli.memory import reset_peak, status_bytes
from cases import CASES


def contender(who: str, case: Case, dtype: str, threads: int) -> Contender:
    """Ours or a peer's, ready to run."""
    inputs = case.inputs(dtype_named(dtype))
    if who == "attncore":
        return ours(inputs, attncore.isa(), threads)
    return peers.contender(who, case, inputs, threads)


def measure(who: str, case: Case, dtype: str, threads: int) -> int:
    """Bytes of the first call, in this process."""
    contender(who, replace(case, queries=16, keys=16), dtype, threads).call()  # threads wake up
    ready = contender(who, case, dtype, threads)
    ctypes.CDLL(None).malloc_trim(0)  # else the call may live in what making the inputs left
    reset_peak()
    before = status_bytes("VmRSS")
    out = ready.call()
    item = dtype_named(dtype).itemsize
    extra = (
        status_bytes("VmHWM") - before - case.batch * case.heads * case.queries * case.dim * item
    )
    del out
    return max(extra, 0)


def footprint(who: str, case: Case, dtype: str, threads: int) -> int | None:
    """The same of a fresh process; None where that fails."""
    command = [sys.executable, __file__, who, case.name, dtype, str(threads)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(child.stdout) if child.returncode == 0 else None


if __name__ == "__main__":
    named = {case.name: case for case in CASES}
    print(measure(sys.argv[1], named[sys.argv[2]], sys.argv[3], int(sys.argv[4])))
