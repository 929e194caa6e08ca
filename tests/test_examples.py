"""The examples: their parts against central differences, and each as a user runs it, but small."""

from __future__ import annotations

import importlib
import importlib.util
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attncore
from kit import check_interrupted_save

FOLDER = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(FOLDER))

import parts
from parts import Array

PACKAGES = ("matplotlib", "safetensors", "tokenizers", "tqdm")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
needs_packages = pytest.mark.skipif(
    bool(MISSING), reason=f"the examples need {', '.join(MISSING)}: pip install '.[examples]'"
)
RUNS: dict[str, dict[str, float]] = {
    "translate": {"dim": 16, "heads": 2, "blocks": 1, "batch": 16, "warmup": 10, "dropout": 0.1, "held_out": 20},
    "language_model": {
        "dim": 16, "heads": 2, "blocks": 1, "vocabulary": 300, "context": 24, "batch": 4, "warmup": 5, "rate": 0.01,
        "dropout": 0.1, "validation": 3, "sample": 20,
    },
}  # fmt: skip
both = pytest.mark.parametrize("name", RUNS)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some files to learn a language from."""
    folder = tmp_path_factory.mktemp("library")
    for i in range(60):
        body = "".join(f"    total += {k} * values[{(i + k) % 7}]\n" for k in range(6))
        (folder / f"module{i}.py").write_text(f"def f{i}(values):\n    total = 0\n{body}\n")
    (folder / "test").mkdir()
    (folder / "test" / "left_out.py").write_text("raise SystemExit\n")
    return folder


def arguments(name: str, out: Path, library: Path, steps: int, *more: str) -> list[str]:
    options = {**RUNS[name], "out": out, "steps": steps, "every": 5}
    if name == "language_model":
        options["text"] = library
    return [f"--{option.replace('_', '-')}={value}" for option, value in options.items()] + [*more]


def run(name: str, arguments: list[str]) -> int:
    """The example in this process; its exit status."""
    status: int = importlib.import_module(name).main(arguments)
    return status


def notes(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = importlib.import_module("trainer").read_notes(path)
    return found


def check_gradients(
    part: Any, x: Array, call: Callable[[Array], Array], rng: np.random.Generator
) -> None:
    """Σ d_y · y along random directions of x and of every parameter, in float64."""
    d_y = rng.standard_normal(call(x).shape)
    gradients = {"x": part.backward(d_y), **part.gradients}
    arrays = {"x": x, **part.parameters()}
    assert gradients.keys() == arrays.keys()
    for name, array in arrays.items():
        if array.dtype != np.float64:  # ids have no gradient
            continue
        way, start = 1e-6 * rng.standard_normal(array.shape), array.copy()
        sums = []
        for sign in (1, -1):
            array[...] = start + sign * way
            sums.append(np.vdot(d_y, call(x)))
        array[...] = start
        assert np.vdot(gradients[name], way) == pytest.approx((sums[0] - sums[1]) / 2, rel=1e-6)


def in_double(part: Any) -> Any:
    """The part with float64 weights, so that differences are exact enough."""
    for leaf in [part] if isinstance(part, parts.Leaf) else [leaf for _, leaf in part.parts()]:
        if isinstance(leaf, parts.Leaf):
            leaf.weights = {name: array.astype(np.float64) for name, array in leaf.weights.items()}
        else:
            in_double(leaf)
    return part


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda rng: parts.Linear(6, 4, rng), id="Linear"),
        pytest.param(lambda _: parts.LayerNorm(6), id="LayerNorm"),
        pytest.param(lambda _: parts.RMSNorm(6), id="RMSNorm"),
        pytest.param(lambda rng: parts.MLP(6, 9, rng), id="MLP"),
        pytest.param(lambda rng: parts.MLP(6, 9, rng, squared=True), id="MLP-squared"),
        pytest.param(
            lambda rng: parts.Residual(parts.LayerNorm(6), parts.MLP(6, 9, rng)), id="Residual"
        ),
    ],
)
def test_gradients_of_parts(make: Any, rng: np.random.Generator) -> None:
    part = in_double(make(rng))
    for array in part.parameters().values():
        array[...] += 0.1 * rng.standard_normal(array.shape)
    check_gradients(part, rng.standard_normal((3, 5, 6)), part, rng)


def test_gradient_of_an_embedding(rng: np.random.Generator) -> None:
    part = in_double(parts.Embedding(9, 4, rng))
    check_gradients(part, rng.integers(0, 9, (3, 5)), part, rng)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradient_of_the_cross_entropy(smoothing: float, rng: np.random.Generator) -> None:
    logits, targets = rng.standard_normal((3, 5, 7)), rng.integers(0, 7, (3, 5))
    loss, d_logits = parts.cross_entropy(logits, targets, smoothing)
    wanted = (1 - smoothing) * np.eye(7)[targets] + smoothing / 7
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    assert loss == pytest.approx(-(wanted * np.log(p)).sum(axis=-1).mean())
    np.testing.assert_allclose(d_logits, (p - wanted) / 15, atol=1e-15)


def test_adam_finds_the_bottom_of_a_bowl(rng: np.random.Generator) -> None:
    x, bottom = np.zeros(5), rng.standard_normal(5)
    adam = parts.Adam({"x": x})
    adam.update(1, 0.01, {"x": x - bottom})
    np.testing.assert_allclose(x, 0.01 * np.sign(bottom), rtol=1e-6)  # the first step's length
    for step in range(2, 2000):
        adam.update(step, 0.01, {"x": x - bottom})
    np.testing.assert_allclose(x, bottom, atol=0.01)


def test_rates_rise_to_their_peak_and_fall() -> None:
    roots = [parts.inverse_root(step, peak=3, warmup=10) for step in range(1, 101)]
    waves = [parts.cosine(step, peak=3, warmup=10, steps=100) for step in range(1, 101)]
    for rates in (roots, waves):
        assert max(rates) == rates[9] == 3
        assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert parts.cosine(100, peak=3, warmup=10, steps=100) == pytest.approx(0.3)


@needs_packages
def test_dates_are_written_in_all_styles_and_some_days_held_out(rng: np.random.Generator) -> None:
    translate = importlib.import_module("translate")
    day = translate.dt.date(2023, 9, 5)
    written = [translate.write(day, style) for style in translate.STYLES]
    assert "Tuesday, Sep. 5th, 2023" in written
    assert {"05/09/2023 (day first)", "09/05/2023 (month first)", "5.IX.2023"} <= set(written)
    learnt, held_out = (
        {answer for _, answer in translate.make_pairs(rng, 3000, held_out=which)}
        for which in (False, True)
    )
    assert not learnt & held_out
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", answer) for answer in learnt | held_out)


@needs_packages
def test_files_are_split_and_tests_left_out(library: Path) -> None:
    model = importlib.import_module("language_model")
    learnt, unseen = model.read_texts(library, 0)
    assert len(learnt) > 40
    assert len(unseen) > 0
    assert len(learnt) + len(unseen) == 60
    assert not any("SystemExit" in text for text in learnt + unseen)
    tokenizer = model.Tokenizer.from_str(model.make_tokenizer(learnt, 300))
    assert tokenizer.decode(model.to_ids(tokenizer, ["ü = 1\n"])[1:].tolist()) == "ü = 1\n"


@needs_packages
@both
def test_loss_falls_and_files_are_written(
    name: str, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(name, arguments(name, tmp_path, library, 60)) == 0
    losses = np.array(notes(tmp_path / f"{name}.safetensors")["curves"]["training loss"])
    assert losses[:, 0].tolist() == list(range(1, 61))
    assert losses[-10:, 1].mean() < 0.8 * losses[:3, 1].mean()
    pictures = [f"{name}.png"] + [f"{name}-attention.png"] * (name == "translate")
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {f"{name}.safetensors", *pictures}
    assert all((tmp_path / file).read_bytes()[1:4] == b"PNG" for file in pictures)
    said = {"translate": "of 20 held-out dates", "language_model": "bits per byte of"}[name]
    assert said in capsys.readouterr().out


@needs_packages
@both
def test_resuming_after_an_interrupt_changes_no_byte(
    name: str, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(name, arguments(name, tmp_path / "whole", library, 12)) == 0
    example = importlib.import_module(name)
    learn = example.learn

    def learn_until_interrupted(*given: Any) -> Any:
        if given[-1] == 7:  # the step
            signal.raise_signal(signal.SIGINT)
        return learn(*given)

    with monkeypatch.context() as patch:
        patch.setattr(example, "learn", learn_until_interrupted)
        assert run(name, arguments(name, tmp_path / "parts", library, 12)) == 0
    path = tmp_path / "parts" / f"{name}.safetensors"
    assert notes(path)["step"] == 7
    text = ["--text", str(library)] if name == "language_model" else []
    threads = attncore.get_num_threads()
    attncore.set_num_threads(1 if threads > 1 else 2)  # nor does another number of threads
    try:
        assert run(name, ["--out", str(path.parent), "--resume", *text]) == 0
    finally:
        attncore.set_num_threads(threads)
    assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()


@needs_packages
def test_an_interrupted_write_leaves_the_last_checkpoint(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments("translate", tmp_path, library, 5)
    assert run("translate", given) == 0
    path = tmp_path / "translate.safetensors"
    again = partial(run, "translate", [*given, "--resume", "--steps", "10"])
    check_interrupted_save(again, path, monkeypatch)


@needs_packages
@both
def test_control_c_in_a_process_of_its_own(name: str, library: Path, tmp_path: Path) -> None:
    given = arguments(name, tmp_path, library, 100_000)
    child = subprocess.Popen(
        [sys.executable, str(FOLDER / f"{name}.py"), *given], stdout=subprocess.DEVNULL
    )
    try:
        path = tmp_path / f"{name}.safetensors"
        end = time.monotonic() + 120
        while not path.exists() and child.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=60) == 0
    finally:
        child.kill()
    assert 0 < notes(path)["step"] < 100_000
    assert run(name, [*given, "--resume", "--steps", str(notes(path)["step"] + 2)]) == 0


@needs_packages
def test_what_cannot_be_resumed_is_said(
    library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run("translate", ["--out", str(tmp_path), "--resume"])
    assert stop.value.code == 2
    assert "there is no" in capsys.readouterr().err
    given = arguments("translate", tmp_path, library, 2)
    assert run("translate", given) == 0
    with pytest.raises(ValueError, match="a model of other sizes"):
        run("translate", ["--out", str(tmp_path), "--resume", "--dim", "32"])
    with pytest.raises(SystemExit):
        run("translate", ["--steps", "-1"])
    assert "--steps: is -1, must be at least 1" in capsys.readouterr().err
