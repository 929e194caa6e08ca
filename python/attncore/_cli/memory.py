"""Time and peak memory of one way of attention on one length, measured in a fresh process.

``python -m attncore._cli.memory METHOD TOKENS`` prints one JSON object.  A fresh process, since
what a process has held before hides what a call needs.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import attncore
from attncore._cli.textbook import Array, textbook_attention

HEADS, DIM = 4, 64
METHODS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "textbook": textbook_attention,
    "attncore": attncore.attention,
}


@dataclass(frozen=True)
class Usage:
    """What one call took: the time, and the peak memory beyond its inputs and its output."""

    seconds: float
    extra_bytes: int


def status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes, for instance VmRSS or VmHWM (Linux)."""
    text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    found = re.search(rf"^{field}:\s*(\d+) kB", text, flags=re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024


def reset_peak() -> None:
    """Let VmHWM, the highest memory so far, start again from the memory held now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def measure(method: str, tokens: int) -> Usage:
    """Measure in this process: the memory of the first call, then the median time of calls."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, HEADS, tokens, DIM), np.float32) for _ in range(3))
    call = METHODS[method]
    call(query[:, :, :16], key[:, :, :16], value[:, :, :16])  # threads and BLAS wake up
    reset_peak()
    before = status_bytes("VmRSS")
    start = time.perf_counter()
    out = call(query, key, value)
    first = time.perf_counter() - start
    extra = status_bytes("VmHWM") - before - out.nbytes
    times = []
    for _ in range(1 if first > 3 else 5):
        start = time.perf_counter()
        call(query, key, value)
        times.append(time.perf_counter() - start)
    return Usage(statistics.median(times), max(extra, 0))


def measure_in_child(method: str, tokens: int) -> Usage:
    """The same in a fresh process; RuntimeError with its last words where it failed."""
    command = [sys.executable, "-m", "attncore._cli.memory", method, str(tokens)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode != 0:
        words = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
        raise RuntimeError(words[-1])
    return Usage(**json.loads(child.stdout))


def available_bytes() -> int | None:
    """Memory that a new process can have, or None where /proc/meminfo is not there."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s*(\d+) kB", text, flags=re.MULTILINE)
    return int(found[1]) * 1024 if found else None


if __name__ == "__main__":
    print(json.dumps(asdict(measure(sys.argv[1], int(sys.argv[2])))))
