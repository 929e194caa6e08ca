"""Honest timing: outputs are checked first, contenders take turns, medians over rounds."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import attncore
from attncore import _core
from attncore._cli.case import Array, Case, Inputs
from attncore._types import Precision

#: largest relative error of a sampled row that passes; generous, as peers round more than we do
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-2, "bfloat16": 3e-2}
BATCH_SECONDS = 0.02  # short calls are timed in batches of about this length
SPINNING_SECONDS = 0.1  # idle threads of a library spin for so long: onnxruntime's for 70 ms


class WrongOutput(Exception):
    """A contender's output is not attention of these inputs."""


@dataclass(frozen=True)
class Contender:
    """Something to time: ``call`` computes, ``array`` views its result as (B, H, Sq, D)."""

    name: str
    call: Callable[[], Any]
    array: Callable[[Any], Array] = np.asarray
    isa: str | None = None
    accuracy: str | None = None  # the dtype whose tolerance holds; None: the inputs'

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Everything that must hold while this contender runs, but is not timed."""
        if self.isa is None:
            yield
        else:
            with attncore.use_isa(self.isa):
                yield


def ours(inputs: Inputs, isa: str, threads: int, precision: Precision = "highest") -> Contender:
    """attncore on an ISA; it allocates its output, as the peers do."""
    query, key, value = inputs.query, inputs.key, inputs.value
    options = {**inputs.options, "num_threads": threads, "precision": precision}
    lower = {"high": "float16", "medium": "bfloat16"} if query.dtype == np.float32 else {}
    return Contender(
        our_name(isa, precision),
        lambda: attncore.attention(query, key, value, **options),
        isa=isa,
        accuracy=lower.get(precision),
    )


def our_name(isa: str, precision: Precision) -> str:
    """Of attncore as a contender."""
    return f"attncore@{isa}" if precision == "highest" else f"attncore@{isa}:{precision}"


def reference_row(case: Case, inputs: Inputs, at: tuple[int, int, int]) -> Array:
    """One output row, (batch, head, row), in float64."""
    batch, head, row = at
    kv_head = head // (case.heads // case.kv_heads)
    key = inputs.key[batch, kv_head].astype(np.float64)
    scores = key @ inputs.query[batch, head, row].astype(np.float64) / math.sqrt(case.dim)
    if case.bias:
        scores += inputs.options["bias"][0, head, row].astype(np.float64)
    distance = np.arange(case.keys) - (row + case.keys - case.queries)
    visible = np.arange(case.keys) < case.lengths[batch]
    if case.causal or case.window:
        visible &= distance <= 0
    if case.window:
        visible &= distance > -case.window
    weights = np.where(visible, np.exp(scores - scores[visible].max(initial=-np.inf)), 0)
    total = weights.sum()
    out: Array = weights @ inputs.value[batch, kv_head].astype(np.float64) / (total or 1)
    return out


def check(
    case: Case,
    inputs: Inputs,
    out: Array,
    who: str,
    samples: int = 12,
    accuracy: str | None = None,
) -> float:
    """The largest relative error over sampled rows; WrongOutput where it is too large."""
    expected = (case.batch, case.heads, case.queries, case.dim)
    if out.shape != expected:
        raise WrongOutput(f"{case.name}: {who} gave the shape {out.shape}, not {expected}")
    rng = np.random.default_rng(1)
    last = (case.batch - 1, case.heads - 1, case.queries - 1)
    places = {(0, 0, 0), last}
    while len(places) < min(samples, case.batch * case.heads * case.queries):
        places.add(tuple(int(rng.integers(0, end + 1)) for end in last))  # type: ignore[arg-type]
    worst = 0.0
    for place in sorted(places):
        row = reference_row(case, inputs, place)
        error = np.linalg.norm(out[place].astype(np.float64) - row) / np.linalg.norm(row)
        worst = max(worst, float(error)) if np.isfinite(error) else math.inf
    if not worst <= TOLERANCE[accuracy or inputs.query.dtype.name]:
        raise WrongOutput(f"{case.name}: {who} is off by {worst:.1e} on sampled rows")
    return worst


def verified(case: Case, inputs: Inputs, contender: Contender) -> float:
    """Run a contender once and check what it gives; its relative error."""
    with contender.ready():
        out = contender.array(contender.call())
    return check(case, inputs, out, contender.name, accuracy=contender.accuracy)


def seconds(contender: Contender, loops: int) -> float:
    """Mean time of a call in one batch of calls."""
    call = contender.call
    start = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - start) / loops


def time_in_rounds(
    contenders: Sequence[Contender],
    rounds: int,
    budget: float = 30.0,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds a call of each contender in each round; slow calls get fewer rounds.

    Every round runs all contenders, each round starts with another one, and each begins with a
    call that is not timed: thread pools of different libraries disturb each other otherwise.
    """
    loops: dict[str, int] = {}
    expected = 0.0
    for contender in contenders:
        with contender.ready():
            once = seconds(contender, 1)
            if once < 1:
                once = min(once, seconds(contender, 3 if once < BATCH_SECONDS else 1))
        loops[contender.name] = max(1, round(BATCH_SECONDS / max(once, 1e-7)))
        warm = once if once < 0.5 else 0.0
        expected += loops[contender.name] * once + warm
    rounds = max(2, min(rounds, int(budget / expected)))
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in range(rounds):
        shift = turn % len(contenders)
        for contender in (*contenders[shift:], *contenders[:shift]):
            time.sleep(SPINNING_SECONDS)  # the threads of the one before no longer take a core
            with contender.ready():
                if loops[contender.name] > 1 or expected < budget / 10:
                    contender.call()
                times[contender.name].append(seconds(contender, loops[contender.name]))
        tick()
    return times


@dataclass(frozen=True)
class Summary:
    """Times of a contender, in seconds."""

    median: float
    spread: float  # distance of the quartiles, relative to the median
    best: float  # what a quiet machine would come near to

    @staticmethod
    def of(times: Sequence[float]) -> Summary:
        """Median and spread of rounds."""
        low, median, high = np.percentile(times, (25, 50, 75))
        return Summary(float(median), float((high - low) / median), float(min(times)))


def product_peak(isa: str, bfloat16: bool, threads: int) -> float:
    """GFLOP/s of an instruction set's own products of bfloat16, or else of float32's multiply-adds."""
    return _core.fma_peak(isa, threads, bfloat16)


def fma_peak(isa: str, dtype: np.dtype[Any], threads: int) -> float:
    """GFLOP/s of multiply-adds that the cores reach now.

    16-bit types are computed in float32, so they share its peak; float64 has half of it.
    """
    peak = product_peak(isa, bfloat16=False, threads=threads)
    return peak / 2 if dtype == np.float64 else peak


def read_bandwidth(held: int, threads: int) -> float:
    """GB/s at which the threads read so many bytes now, of which each reads its share again."""
    return _core.read_bandwidth(held, threads)


def human(time_in_seconds: float) -> str:
    """A time with a unit and three or four digits."""
    units = (("s", 1.0), ("ms", 1e3), ("us", 1e6))
    unit, factor = next((u for u in units if time_in_seconds * u[1] >= 1), units[-1])
    value = time_in_seconds * factor
    return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}"
