"""benchmarks/errors.py: the table that it prints and writes, the errors in it, the scripts beside it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import attncore
from test_bench import FOLDER, script

sys.path.insert(0, str(FOLDER))

import errors
import options
from attncore._cli.case import Case
from attncore._cli.textbook import textbook_attention


def shorter(case: Case) -> Case:
    """The case with an eighth of its tokens."""
    return replace(case, queries=case.queries // 8, keys=case.keys // 8)


CHEAP = ("--keys", "1024", "--seeds", "1", "--dtype", "float32")


def test_the_table_replaces_what_is_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{errors.MARKERS[0]}\nthe old table\n{errors.MARKERS[1]}\nafter\n")
    done = script("errors.py", *CHEAP, "--write", str(page))
    assert done.returncode == 0, done.stderr
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "the old table" not in text
    lines = [line for line in text.splitlines() if line.startswith("| float32")]
    assert len(lines) == len(errors.MEASURES) * len(errors.KINDS)
    assert all(isa in text for isa in attncore.available_isas())


def test_a_page_without_markers_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(SystemExit, match="markers"):
        errors.write(page, "table")
    assert page.read_text() == "nothing"


@pytest.mark.parametrize("kind", errors.KINDS)
def test_a_known_error_is_found(kind: str) -> None:
    """float32 inputs; the right answer off by 1 % everywhere."""
    inputs = errors.made(kind, 1024, np.dtype(np.float32), seed=0)
    right = textbook_attention(*(x.astype(np.float64) for x in (inputs.query, inputs.key, inputs.value)))  # fmt: skip
    frobenius, largest = errors.errors(inputs, {"off": lambda _: 1.01 * right})["off"]
    assert frobenius == pytest.approx(0.01)
    assert largest == pytest.approx(0.01 * np.abs(right).max())


@pytest.mark.parametrize(("kind", "largest"), [("scores to 30", 30), ("scores to 1e4", 1e4)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_scores_reach_what_the_line_says(kind: str, largest: float, dtype: str) -> None:
    inputs = errors.made(kind, 1024, np.dtype(dtype), seed=1)
    query, key = (x.astype(np.float64) for x in (inputs.query, inputs.key))
    assert np.abs(query @ key.swapaxes(-1, -2)).max() / 8 == pytest.approx(largest, rel=1e-2)


def test_a_run_is_drawn_and_written_as_a_table(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run, page, picture = (tmp_path / name for name in ("run.json", "run.md", "run.png"))
    done = script("bench.py", "--case", "tiny-16", "--case", "length-512", "--rounds", "2", "--memory",
                  "--json", str(run), "--markdown", str(page))  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = page.read_text(encoding="utf-8").splitlines()
    assert len(rows) == 4
    assert len({row.count("|") for row in rows}) == 1
    done = script("plot.py", str(run), str(picture))
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_bar_of_options_is_measured() -> None:
    """On shapes an eighth as long: that the lines run, not what they show."""
    for line in options.lines("float32", threads=2):
        small = replace(line, case=shorter(line.case), plain=shorter(line.plain), options=())
        assert options.measured(small, np.dtype(np.float32), 2, rounds=2) > 0
