"""Records of bench.py as a Markdown table: a line a (case, ISA, dtype, threads), ratios of peers beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attncore._cli.measure import human

Record = dict[str, Any]


def line(row: Record, peers: Sequence[str]) -> list[str]:
    """The cells of a record; a peer that could not run has "–"."""
    share = f"{100 * row['peak_share']:.0f} %"
    ratios = (f"{row['peers'][x]['ratio']:.2f} ×" if x in row["peers"] else "–" for x in peers)
    time = f"{human(row['median'])}, {row['gflops']:.0f} GFLOP/s"
    return [row["case"], row["isa"], row["dtype"], str(row["threads"]), time, share, *ratios]


def table(records: Sequence[Record]) -> str:
    """All records; a ratio is the peer's time divided by ours: above 1 attncore is faster."""
    peers = list(dict.fromkeys(name for row in records for name in row["peers"]))
    head = ["case", "ISA", "dtype", "threads", "attncore", "of peak", *peers]
    rows = [head, ["---"] * len(head), *(line(row, peers) for row in records)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
