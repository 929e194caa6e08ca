"""Draw records of bench.py --json: peers' ratios, roofline fractions, time and memory against length.

python benchmarks/bench.py --peers --memory --json run.json
python benchmarks/plot.py run.json docs/performance.png     several runs may be given
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from attncore._cli.packages import load

Record = dict[str, Any]
LENGTH = "length-"
COLOURS = {
    "attncore": "#1b6ca8", "torch": "#e4572e", "ort": "#76b041", "ort-mha": "#b9d98b",
    "openvino": "#8e6c8a",
}  # fmt: skip


def records_of(paths: list[Path]) -> list[Record]:
    """All records, each with the read bandwidth that its run measured."""
    records: list[Record] = []
    for path in paths:
        page = json.loads(path.read_text(encoding="utf-8"))
        read = page["environment"]["read_gbytes"]
        records += [{**row, "read_gbytes": read} for row in page["records"]]
    return records


def roofline(row: Record) -> float | None:
    """The share of what bounds the case: multiply-adds, or reading; pairs of bfloat16 count twice."""
    if row["case"].startswith("tiny"):
        return None
    pairs = row["isa"] == "avx512_bf16" and row["dtype"] == "bfloat16"
    multiplying = row["peak_share"] / (2 if pairs else 1)
    return float(max(multiplying, row["gbytes"] / row["read_gbytes"]))


def label(row: Record) -> str:
    """What a bar is called."""
    return f"{row['case']} {row['dtype'].replace('bfloat', 'bf').replace('float', 'f')}"


def draw_ratios(axes: Any, rows: list[Record]) -> None:
    """Bars of each peer's time by ours, on a logarithmic axis."""
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    height = 0.8 / max(1, len(names))
    for at, name in enumerate(names):
        has = [
            (y, row["peers"][name]["ratio"]) for y, row in enumerate(rows) if name in row["peers"]
        ]
        places = [y + (at + 0.5) * height - 0.4 for y, _ in has]
        axes.barh(places, [ratio - 1 for _, ratio in has], height, left=1, color=COLOURS[name],
                  label=name)  # fmt: skip
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 4, 8, 16]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.minorticks_off()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_title("a peer's time by attncore's: right of 1 attncore is faster")
    axes.legend(loc="center right", fontsize=8)
    name_bars(axes, rows)


def draw_roofline(axes: Any, rows: list[Record]) -> None:
    """Bars of the share of the multiply-add peak or of the read bandwidth."""
    shares = [100 * (roofline(row) or 0) for row in rows]
    axes.barh(range(len(rows)), shares, 0.7, color=COLOURS["attncore"])
    for y, share in enumerate(shares):
        axes.text(share + 1, y, f"{share:.0f}", va="center", fontsize=8)
    axes.set_xlim(0, max([100, *(share + 8 for share in shares)]))
    axes.set_title(
        "attncore: % of the multiply-add peak,\nor of the read bandwidth where that bounds"
    )
    name_bars(axes, rows)


def name_bars(axes: Any, rows: list[Record]) -> None:
    """A bar or a group of bars a record, the first at the top."""
    axes.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)


def draw_lengths(time_axes: Any, memory_axes: Any, rows: list[Record]) -> None:
    """Curves of everyone's time and peak memory."""
    tokens = {row["case"]: int(row["case"].removeprefix(LENGTH)) for row in rows}
    for name, colour in COLOURS.items():
        ours = name == "attncore"
        has = [row for row in rows if ours or name in row["peers"]]
        lengths = [tokens[row["case"]] for row in has]
        times = [row["median"] if ours else row["peers"][name]["median"] for row in has]
        style = {"color": colour, "label": name, "marker": "o", "markersize": 4}
        if has:
            time_axes.loglog(lengths, np.array(times) * 1e3, **style)
        known = [(n, row["memory"].get(name)) for n, row in zip(lengths, has, strict=True)
                 if row.get("memory", {}).get(name)]  # fmt: skip
        if known:
            memory_axes.loglog([n for n, _ in known], [m / 2**20 for _, m in known], **style)
    for axes, title in (
        (time_axes, "time, ms"),
        (memory_axes, "memory beyond inputs and output, MiB"),
    ):
        ticks = sorted({tokens[row["case"]] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=10)
        axes.set_xticks(ticks, [f"{n // 1024}k" if n >= 1024 else str(n) for n in ticks])
        axes.set_title(f"{title}\ncausal, 4 heads of 64, {rows[0]['dtype']}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


def main() -> int:
    """Draw what the runs have."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN.json")
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    records = records_of(options.runs)
    lengths = [row for row in records if row["case"].startswith(LENGTH)]
    rows = [row for row in records if row not in lengths]
    load("matplotlib").use("Agg")
    plot = load("matplotlib.pyplot")
    height = max(4.0, 0.3 * len(rows))
    figure, axes = plot.subplots(
        2, 2, figsize=(13, height + 4), layout="constrained", height_ratios=(height, 4)
    )
    if rows:
        draw_ratios(axes[0, 0], [row for row in rows if row["peers"]])
        draw_roofline(axes[0, 1], [row for row in rows if roofline(row) is not None])
    if lengths:
        draw_lengths(axes[1, 0], axes[1, 1], lengths)
    figure.savefig(options.picture, dpi=80)
    plot.close(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
