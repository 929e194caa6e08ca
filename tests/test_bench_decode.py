"""benchmarks/decode.py: what a step costs, the memory it sees, the checks, the script."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import attncore
from attncore import _core
from attncore._cli.measure import WrongOutput
from test_bench import FOLDER, script

sys.path.insert(0, str(FOLDER))

from appending import appending
from cases import APPENDS, DECODE_CASES
from steppers import check, numbers, query_of, verified
from steps import BITS, QUANTISED, Step
from stores import Pools, Store, stores
from training import Unsupported

LINES = {f"{case}/{label}": x for case, lines in DECODE_CASES.items() for label, x in lines.items()}


def small(step: Step) -> Step:
    """The same step with few keys."""
    page = step.keys // 64 if step.page == step.keys else min(step.page, 16)
    return replace(
        step, batch=min(step.batch, 3), keys=step.keys // 64, page=page, prefix=step.prefix // 64,
        queries=min(step.queries, 4), held=1 << 18,
    )  # fmt: skip


SMALL = {name: small(step) for name, step in LINES.items()}


def supported(name: str, step: Step, found: list[Store]) -> np.ndarray:
    try:
        return verified(name, step, found, threads=2)[1]
    except Unsupported as reason:
        pytest.skip(str(reason))


def memory_of(step: Step, found: list[Store]) -> int:
    """The bytes of one sequence's keys and values, factors and all."""
    entry = found[0].entry(0)
    arrays = (entry.key, None if step.latent else entry.value, entry.key_scale, entry.value_scale)
    return sum(x.nbytes for x in arrays if x is not None)


@pytest.mark.parametrize("name", SMALL)
def test_what_is_timed_is_right(name: str, isa: str) -> None:
    step = SMALL[name]
    out = supported(name, step, stores(step, Pools()))
    assert out.dtype.name == step.query_dtype or step.by == "torch"


@pytest.mark.parametrize("name", SMALL)
def test_a_step_reads_the_memory_that_it_counts(name: str) -> None:
    step = SMALL[name]
    found = stores(step, Pools())
    assert len(found) >= step.sets
    one = replace(step, batch=1, sharing=False, held=0)
    assert memory_of(one, stores(one, Pools())) == one.bytes
    whole = replace(step, sharing=False).bytes
    saved = (step.batch - 1) * step.prefix * step.kv_heads * step.row_bytes * step.sharing
    assert whole - step.bytes == saved


@pytest.mark.parametrize("name", SMALL)
def test_visible_pairs_are_counted(name: str) -> None:
    step = SMALL[name]
    pairs = 0
    for keys, queries in zip(step.lengths, step.query_lengths, strict=True):
        ahead = np.arange(keys) - np.arange(queries)[:, None] - (keys - queries)
        pairs += int((ahead <= 0).sum() if step.causal else ahead.size)
    assert step.flops == pairs * 2 * step.heads * (step.dim + step.value_dim)
    assert step.tokens == step.query_lengths.sum()


@pytest.mark.parametrize("name", [name for name in LINES if LINES[name].spread])
def test_unequal_lengths_are_the_same_work(name: str) -> None:
    unequal = LINES[name]
    equal = replace(unequal, spread=0.0)
    assert unequal.flops == pytest.approx(equal.flops, rel=0.01)
    assert unequal.lengths.max() > 3 * np.median(unequal.lengths)


@pytest.mark.parametrize("name", [name for name in SMALL if SMALL[name].page])
def test_pages_are_in_no_order_and_each_has_one_owner(name: str) -> None:
    step = replace(SMALL[name], sharing=False, held=1 << 20)
    found = stores(step, Pools())
    used = []
    for store in found:
        table, lengths = store.arguments[2:]
        used += [table[at, : -(-n // step.page)] for at, n in enumerate(lengths)]
    pages = np.concatenate(used)
    assert len(np.unique(pages)) == len(pages)
    assert pages.max() < len(found[0].arguments[0])
    if len(pages) > 10:
        assert (np.diff(pages) != 1).mean() > 0.5


@pytest.mark.parametrize("heads", [8, 32])
def test_a_shared_prefix_is_the_same_tokens_with_and_without_sharing(heads: int) -> None:
    lines = DECODE_CASES[f"prefix-{heads}-bfloat16"]
    apart, shared = (stores(small(x), Pools()) for x in (lines["apart"], lines["shared"]))
    step = small(lines["shared"])
    first = apart[0].entry(0)
    for store, batch in itertools.product((*apart, *shared), range(step.batch)):
        entry = store.entry(batch)
        for x, like, own in zip(
            (entry.key, entry.value), (first.key, first.value),
            (apart[0].entry(batch).key, apart[0].entry(batch).value), strict=True,
        ):  # fmt: skip
            np.testing.assert_array_equal(x[:, : step.prefix], like[:, : step.prefix])
            np.testing.assert_array_equal(x[:, step.prefix :], own[:, step.prefix :])
    count = step.prefix // step.page
    assert all((store.arguments[2][:, :count] == store.arguments[2][0, :count]).all()
               for store in shared)  # fmt: skip
    assert len({int(store.arguments[2][0, 0]) for store in shared}) == step.batch
    outs = [
        supported("prefix", small(lines[x]), y) for x, y in (("apart", apart), ("shared", shared))
    ]
    assert outs[0].tobytes() == outs[1].tobytes()


@pytest.mark.parametrize("name", ["queries-4/attncore", "small-l2/attention", "rows-2-d64/float32"])
def test_a_wrong_output_is_noticed(name: str) -> None:
    step = replace(SMALL[name], stored="float32")
    found = stores(step, Pools())
    query, out = query_of(step), supported(name, step, found)
    check(name, step, query, found[0], out)
    wrongs = [out * np.float32(1.001), np.full_like(out, np.nan), out[..., :-1], out[:, ::-1]]
    for wrong in wrongs:
        with pytest.raises(WrongOutput, match=name):
            check(name, step, query, found[0], wrong)


@pytest.mark.parametrize("stored", BITS)
def test_stored_numbers_are_what_their_reader_says(stored: str) -> None:
    step = Step(1, 2, 2, 1, 40, 16, stored, page=8, held=0)
    entry = stores(step, Pools())[0].entry(0)
    scale = None if entry.key_scale is None else entry.key_scale[1]
    rows = numbers(step, entry.key[1], scale)
    assert rows.shape == (40, 16)
    assert 0.3 < rows.std() < 3
    assert abs(rows.mean()) < 0.3
    if stored == "int4":
        low = (int(entry.key[1, 0, 0]) & 15) - 16 * bool(entry.key[1, 0, 0] & 8)
        assert entry.key_scale is not None
        assert rows[0, 0] == low * np.float64(entry.key_scale[1, 0])
    assert (entry.key_scale is not None) == (stored in QUANTISED)


@pytest.mark.parametrize("name", APPENDS)
def test_what_is_appended_is_there(name: str) -> None:
    contender = appending(name, APPENDS[name])
    contender.call()
    contender.call()  # there is room again


def test_the_bandwidth_probe() -> None:
    for held in (1, 1 << 16, 1 << 20, 1000):
        for threads in (1, 3):
            assert 0.1 < _core.read_bandwidth(held, threads) < 1e5
    for wrong in (0, -1, 2**63 - 1):
        with pytest.raises(ValueError, match=f"bytes: is {wrong}, must be 1 … 2"):
            _core.read_bandwidth(wrong, 1)


def test_the_script_writes_records_that_compare_reads(tmp_path: Path) -> None:
    page = tmp_path / "page.json"
    done = script("decode.py", "--case", "small-l2", "--held", "1", "--rounds", "2",
                  "--json", str(page))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads(page.read_text(encoding="utf-8"))["records"]
    assert records[0]["case"] == "small-l2/attention"
    assert records[0]["first"] == 1
    assert all(record["isa"] == attncore.isa() for record in records)
    for name in (
        "median",
        "gbytes",
        "read_share",
        "peak_share",
        "roof_share",
        "read_gbytes",
        "peak_gflops",
    ):
        assert all(record[name] > 0 for record in records), name
    assert script("compare.py", str(page), str(page)).returncode == 0


def test_the_script_knows_its_cases() -> None:
    done = script("decode.py", "--list")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [*DECODE_CASES, "append"]
    done = script("decode.py", "--case", "none")
    assert done.returncode != 0
    assert "there are: " in done.stderr
