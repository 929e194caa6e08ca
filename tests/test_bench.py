"""The benchmarks: the list of cases, the check before timing, bench.py and compare.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import attncore
from attncore._cli import measure
from attncore._cli.case import Case

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))

from cases import CASES, matching

SMALL = [
    Case("plain", 2, 4, 4, 7, 9, 16),
    Case("causal", 1, 2, 2, 33, 33, 16, causal=True),
    Case("later", 1, 4, 2, 5, 40, 16, causal=True),
    Case("window", 1, 2, 2, 50, 50, 16, window=8),
    Case("padding", 3, 2, 2, 20, 20, 16, padding=True),
    Case("bias", 1, 2, 2, 20, 20, 16, bias=True),
]


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a file of benchmarks/ as a user would."""
    return subprocess.run(
        [sys.executable, str(FOLDER / name), *arguments],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def test_cases_have_names_of_their_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert len(set(CASES)) == len(CASES)


def test_cases_are_found_by_name_beginning_and_pattern() -> None:
    assert [case.name for case in matching(["vit"])] == ["vit"]
    assert len(matching(["decode"])) == len(matching(["decode-*k"])) == 4
    assert matching([]) == list(CASES)
    assert matching(["nothing"]) == []


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_visible_pairs_are_counted(case: Case) -> None:
    options = case.inputs(np.dtype(np.float32)).options
    seen = np.ones((case.batch, 1, case.queries, case.keys), bool)
    distance = np.arange(case.keys) - np.arange(case.queries)[:, None] - case.keys + case.queries
    if "causal" in options:
        seen &= distance <= 0
    if "window" in options:
        seen &= distance >= -options["window"][0]
    if "mask" in options:
        seen &= options["mask"]
    assert case.visible == seen.sum()
    assert case.flops == 4 * seen.sum() * case.heads * case.dim


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_what_is_timed_is_right(case: Case, dtype: str, isa: str) -> None:
    inputs = case.inputs(np.dtype(dtype))
    error = measure.verified(case, inputs, measure.ours(inputs, isa, threads=2))
    assert error <= measure.TOLERANCE[dtype]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_a_wrong_output_is_noticed(case: Case) -> None:
    inputs = case.inputs(np.dtype(np.float32))
    right = attncore.attention(inputs.query, inputs.key, inputs.value, **inputs.options)
    everything = case.batch * case.heads * case.queries
    measure.check(case, inputs, right, "right", everything)
    wrongs = [right * 1.001, np.full_like(right, np.nan), right[:, :1]]
    if inputs.options:
        wrongs.append(attncore.attention(inputs.query, inputs.key, inputs.value))
    for wrong in wrongs:
        with pytest.raises(measure.WrongOutput, match=case.name):
            measure.check(case, inputs, wrong, "wrong", everything)


def test_contenders_take_turns() -> None:
    order: list[str] = []

    def contender(name: str) -> measure.Contender:
        def call() -> int:
            order.append(name)
            return sum(range(300_000))

        return measure.Contender(name, call)

    times = measure.time_in_rounds([contender("a"), contender("b")], rounds=3)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    runs = [name for name, before in zip(order, ["", *order[:-1]], strict=True) if name != before]
    assert runs == ["a", "b"] * 3  # tried out, then a b · b a · a b


def test_bench_writes_records_that_compare_reads(tmp_path: Path) -> None:
    pages = [tmp_path / "old.json", tmp_path / "new.json"]
    for page in pages:
        done = script("bench.py", "--case", "tiny-*", "--rounds", "2", "--isa", "all",
                      "--json", str(page))  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("tiny-16") == len(attncore.available_isas())
    records = json.loads(pages[0].read_text(encoding="utf-8"))["records"]
    assert len(records) == 2 * len(attncore.available_isas())
    assert all(record["median"] > 0 and record["gflops"] > 0 for record in records)
    done = script("compare.py", *map(str, pages))
    assert done.returncode == 0, done.stderr
    assert f"geometric mean of {len(records)}" in done.stdout


def test_bench_to_several_precisions(tmp_path: Path) -> None:
    """Of float32: a line and a record each, which compare.py tells apart."""
    page = tmp_path / "page.json"
    done = script("bench.py", "--case", "tiny-16", "--rounds", "2", "--dtype", "float32,float16",
                  "--precision", "all", "--json", str(page))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads(page.read_text(encoding="utf-8"))["records"]
    assert [(record["dtype"], record["precision"]) for record in records] == [
        *(("float32", precision) for precision in ("highest", "high", "medium")),
        ("float16", "highest"),
    ]
    assert done.stdout.count(" medium ") == 1
    assert "geometric mean of 4" in script("compare.py", str(page), str(page)).stdout


def test_bench_refuses_what_is_not_there() -> None:
    for arguments in (
        ["--case", "none"],
        ["--isa", "mmx"],
        ["--dtype", "int8"],
        ["--precision", "low"],
    ):
        done = script("bench.py", *arguments)
        assert done.returncode != 0
        assert "there are: " in done.stderr


@pytest.mark.parametrize("name", ["torch", "ort", "ort-mha", "openvino"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_peers_compute_the_same(case: Case, name: str) -> None:
    import peers

    if name not in peers.installed():
        pytest.skip(f"{peers.PEERS[name][0]} is not installed")
    inputs = case.inputs(np.dtype(np.float32))
    try:
        peer = peers.contender(name, case, inputs, 2)
    except peers.Unsupported as reason:
        pytest.skip(f"{name}: {reason}")
    measure.verified(case, inputs, peer)
