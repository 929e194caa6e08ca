"""The error table of docs/numerics.md: attncore on every ISA, and torch, against float64.

    python benchmarks/errors.py                            print it
    python benchmarks/errors.py --write docs/numerics.md   put it between the page's two markers

float64 itself is compared with long double, in fewer rows.  Everyone gets the same inputs, rounded to the dtype
before anything is computed.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import attncore
from attncore._cli.bench import DTYPES
from attncore._cli.case import Array, Inputs, dtype_named
from attncore._cli.packages import load, present, progress
from attncore._cli.textbook import textbook_attention
from training import torch_tensor

DIM = 64
SHAPES = {1024: (4, 256), 65536: (1, 64)}  # keys → heads, queries
MARKERS = ("<!-- errors.py -->", "<!-- end of errors.py -->")
LIMIT = 1.1  # of torch's error
MEASURES = {"Relative Frobenius error": 0, "Largest absolute error": 1}

Outputs = Callable[[Inputs], Array]
Errors = dict[str, tuple[float, float]]  # who → Frobenius, largest


def scaled(factor: float) -> Callable[[Array, Array, Array], tuple[Array, Array, Array]]:
    """Queries that let the largest |score| be ``factor``."""

    def apply(query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
        largest = np.abs(query @ key.swapaxes(-1, -2)).max() / np.sqrt(DIM)
        return query * (factor / largest), key, value

    return apply


#: what is done to standard normal query, key and value before they are rounded
KINDS: dict[str, Callable[[Array, Array, Array], tuple[Array, Array, Array]]] = {
    "N(0,1)": lambda query, key, value: (query, key, value),
    "scores to 30": scaled(30),
    "scores to 1e4": scaled(1e4),
    "values + 100": lambda query, key, value: (query, key, value + 100),
}


def made(kind: str, keys: int, dtype: np.dtype[Any], seed: int) -> Inputs:
    """The inputs of one line and seed."""
    heads, queries = SHAPES[keys]
    rng = np.random.default_rng(seed)
    arrays = (rng.standard_normal((1, heads, rows, DIM)) for rows in (queries, keys, keys))
    query, key, value = (x.astype(dtype) for x in KINDS[kind](*arrays))
    return Inputs(query, key, value)


def ours(isa: str) -> Outputs:
    """attncore on an ISA."""

    def call(inputs: Inputs) -> Array:
        with attncore.use_isa(isa):
            return np.asarray(attncore.attention(inputs.query, inputs.key, inputs.value))

    return call


def torch(inputs: Inputs) -> Array:
    """torch's scaled_dot_product_attention."""
    tensors = (torch_tensor(x) for x in (inputs.query, inputs.key, inputs.value))
    out = load("torch").nn.functional.scaled_dot_product_attention(*tensors)
    return np.asarray(out.double().numpy())


def errors(inputs: Inputs, contenders: dict[str, Outputs]) -> Errors:
    """Of each contender's output; of its first rows where the exact ones are long in coming."""
    wide = inputs.query.dtype == np.float64
    exact, rows = (np.longdouble, 16) if wide else (np.float64, inputs.query.shape[2])
    arrays = (x.astype(exact) for x in (inputs.query[:, :, :rows], inputs.key, inputs.value))
    right = textbook_attention(*arrays)
    found: Errors = {}
    for name, call in contenders.items():
        off = call(inputs)[:, :, :rows].astype(exact) - right
        found[name] = (float(np.sqrt((off**2).sum() / (right**2).sum())), float(np.abs(off).max()))
    return found


def geometric_mean(numbers: list[float]) -> float:
    """Of errors, which may be 0."""
    return float(np.exp(np.mean(np.log(np.maximum(numbers, 1e-30)))))


def lines(options: argparse.Namespace, contenders: dict[str, Outputs]) -> Iterator[list[Any]]:
    """dtype, kind, keys and the geometric means of the seeds' errors."""
    work = [(d, k, n) for d in options.dtype.split(",") for k in KINDS for n in options.keys]
    for dtype, kind, keys in progress(work, "errors"):
        runs = [
            errors(made(kind, keys, dtype_named(dtype), seed), contenders)
            for seed in range(options.seeds)
        ]
        means = {
            name: tuple(geometric_mean([run[name][i] for run in runs]) for i in range(2))
            for name in contenders
        }
        yield [dtype, kind, keys, means]


def cell(mean: float, theirs: float | None) -> str:
    """An error, and its ratio to torch's; bold where that is above the limit."""
    if theirs is None:
        return f"{mean:.1e}"
    text = f"{mean:.1e}, {mean / theirs:.2f} ×"
    return f"**{text}**" if mean / theirs > LIMIT else text


def table(found: list[list[Any]], contenders: dict[str, Outputs], measure: str) -> str:
    """One measure's errors in Markdown."""
    isas = [name for name in contenders if name != "torch"]
    at = MEASURES[measure]
    rows = [["dtype", "inputs", "keys", *contenders], ["---"] * (3 + len(contenders))]
    for dtype, kind, keys, means in found:
        theirs = means["torch"][at] if "torch" in means else None
        first = [] if theirs is None else [cell(theirs, None)]
        rows.append(
            [dtype, kind, str(keys), *first, *(cell(means[isa][at], theirs) for isa in isas)]
        )
    return f"{measure}:\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def page(options: argparse.Namespace) -> str:
    """Both tables, and what they depend on."""
    contenders: dict[str, Outputs] = {}
    beside = "torch is not installed"
    if present("torch"):
        contenders["torch"] = torch
        beside = f"torch {load('torch').__version__.partition('+')[0]}"
    contenders |= {isa: ours(isa) for isa in attncore.available_isas()}
    found = list(lines(options, contenders))
    shapes = ", ".join(f"{SHAPES[n][0]} × {SHAPES[n][1]} rows at {n} keys" for n in options.keys)
    about = (
        f"Geometric means over {options.seeds} seeds, D{DIM}, {shapes}; {beside}, and ours as a"
        f" multiple of its error (bold above {LIMIT}).\n{processor()},"
        f" {time.strftime('%Y-%m-%d')}, `python benchmarks/errors.py --write docs/numerics.md`."
    )
    return "\n\n".join([about, *(table(found, contenders, measure) for measure in MEASURES)])


def processor() -> str:
    """The CPU's name, with its family and model where Linux tells them."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    fields = (re.search(rf"^{key}\s*: (.*)$", text, re.MULTILINE)
              for key in ("model name", "cpu family", "model"))  # fmt: skip
    name, family, model = (found[1] if found else "?" for found in fields)
    return f"{name} (family {family}, model {model})"


def write(path: Path, text: str) -> None:
    """Replace what is between the markers."""
    old = path.read_text(encoding="utf-8")
    before, first, rest = old.partition(MARKERS[0])
    _, last, after = rest.partition(MARKERS[1])
    if not (first and last):
        raise SystemExit(f"errors.py: {path} has no markers {' … '.join(MARKERS)}")
    path.write_text(f"{before}{first}\n{text}\n{last}{after}", encoding="utf-8")


def main() -> int:
    """Measure, then print or write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="a page with the markers")
    parser.add_argument("--seeds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--dtype", default=",".join(DTYPES), help="a list (default: %(default)s)")
    parser.add_argument("--keys", type=int, nargs="+", choices=SHAPES, default=list(SHAPES))
    options = parser.parse_args()
    text = page(options)
    if options.write:
        write(options.write, text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
