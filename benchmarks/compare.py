"""Set two runs of bench.py --json side by side: ``python benchmarks/compare.py OLD NEW``."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from attncore._cli.measure import human

Record = dict[str, Any]
Key = tuple[str, str, str, int]


def load(path: Path) -> dict[Key, Record]:
    """The records of a run by (case, ISA, dtype with its precision, threads)."""
    page = json.loads(path.read_text(encoding="utf-8"))
    return {(r["case"], r["isa"], numbers(r), r["threads"]): r for r in page["records"]}


def numbers(row: Record) -> str:
    """The dtype, and its precision where that is not the highest."""
    precision = row.get("precision", "highest")
    return row["dtype"] if precision == "highest" else f"{row['dtype']} {precision}"


def verdict(old: Record, new: Record) -> str:
    """Faster or slower, if by more than the two spreads and 3 %; else nothing."""
    change = new["median"] / old["median"] - 1
    noise = max(0.03, old["spread"] + new["spread"])
    if abs(change) <= noise:
        return ""
    return "slower" if change > 0 else "faster"


def best(row: Record) -> str:
    """The ratio to the best peer, where peers ran."""
    ratios = [peer["ratio"] for peer in row.get("peers", {}).values()]
    return f"{min(ratios):.2f}x" if ratios else "-"


def table(old: dict[Key, Record], new: dict[Key, Record]) -> list[str]:
    """A line for each record that both runs have, then the mean and what only one has."""
    head = f"{'case':<23} {'isa':<9} {'dtype':<14} {'thr':>3} {'old':>9} {'new':>9} {'speed':>6}"
    lines = [f"{head} {'best peer':>14}"]
    speeds = []
    for key in (key for key in old if key in new):
        speed = old[key]["median"] / new[key]["median"]
        speeds.append(speed)
        case, isa, dtype, threads = key
        peers = f"{best(old[key])} > {best(new[key])}"
        lines.append(
            f"{case:<23} {isa:<9} {dtype:<14} {threads:>3} {human(old[key]['median']):>9}"
            f" {human(new[key]['median']):>9} {speed:>5.2f}x {peers:>14}"
            f"  {verdict(old[key], new[key])}".rstrip()
        )
    if speeds:
        mean = math.exp(sum(map(math.log, speeds)) / len(speeds))
        lines.append(f"geometric mean of {len(speeds)}: {mean:.3f}x as fast as before")
    for name, only in (("old", old.keys() - new.keys()), ("new", new.keys() - old.keys())):
        lines += [f"only in {name}: {' '.join(map(str, key))}" for key in sorted(only)]
    return lines


def main() -> int:
    """Print the table; status 1 where the runs share nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args()
    old, new = load(options.old), load(options.new)
    print(*table(old, new), sep="\n")
    return 0 if old.keys() & new.keys() else 1


if __name__ == "__main__":
    sys.exit(main())
