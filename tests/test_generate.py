"""examples/generate.py: what a cache, forks, guesses and rollback must not change."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from test_examples import arguments, library, needs_packages, run

__all__ = ["library"]  # a fixture

pytestmark = needs_packages
PROMPT = "def f1(values):\n    total = 0\n    total += 0 * values[1]\n"


@pytest.fixture(scope="module")
def checkpoint(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small model that has learnt a little."""
    folder = tmp_path_factory.mktemp("model")
    assert run("language_model", arguments("language_model", folder, library, 60)) == 0
    return folder / "language_model.safetensors"


def generate() -> Any:
    return importlib.import_module("generate")


def cached_model(checkpoint: Path, **options: Any) -> tuple[Any, Any, list[int]]:
    """The model, the same with a cache, and the prompt's ids."""
    model, heads, tokenizer = generate().read_model(checkpoint, 0)
    given = {"pages": 100, "page_size": 4, "dtype": "float32", **options}
    cached = generate().CachedModel(model, heads, **given)
    return model, cached, tokenizer.encode(PROMPT).ids


def test_logits_are_those_without_a_cache(checkpoint: Path, rng: np.random.Generator) -> None:
    """Prefill, single tokens, forks and what follows a rollback, of sequences of other lengths."""
    model, cached, _ = cached_model(checkpoint)
    ids: list[int] = rng.integers(0, len(model.embedding.weights["table"]), 30).tolist()
    first = cached.add()
    steps = [cached(np.array([ids[:10]]), [first]), cached(np.array([ids[10:11]]), [first])]
    fork = cached.fork(first)
    steps += [cached(np.array([ids[11:15]]), [first])]
    expected = model(np.array([ids]))[0]
    np.testing.assert_allclose(np.concatenate(steps, 1)[0], expected[:15], rtol=0, atol=1e-5)

    other = [ids[:11] + ids[3:7], ids[:15] + ids[2:4]]
    cached(np.array([ids[20:25]]), [first])
    cached.truncate(first, 15)
    both = cached(np.array([other[1][15:], other[0][11:13]]), [first, fork])
    for logits, tokens in zip(both, (other[1], other[0][:13]), strict=True):
        np.testing.assert_allclose(logits, model(np.array([tokens]))[0, -2:], rtol=0, atol=1e-5)
    cached.free(first)
    cached.free(fork)
    assert [cache.free_pages for cache in cached.caches] == [100]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_every_way_gives_the_same_tokens(checkpoint: Path, temperature: float) -> None:
    model, cached, prompt = cached_model(checkpoint)
    sampler = generate().Sampler(temperature, 3)
    shared = cached.add()
    logits = cached(np.array([prompt]), [shared])[0, -1]
    entries = [cached.fork(shared) for _ in range(3)]
    drawn = generate().decode(cached, sampler, prompt, logits, entries, 40)
    tokens = [ids for ids, _ in drawn]
    assert all(len(ids) == 40 for ids in tokens)
    assert len({tuple(ids) for ids in tokens}) == (3 if temperature > 0 else 1)
    plain = generate().decode_without_cache(model, sampler, prompt, 40)
    assert plain == tokens[0]
    for guesses in (1, 5):
        entry = cached.fork(shared)
        ids, passes = generate().decode_with_guesses(
            cached, sampler, prompt, logits, entry, 40, guesses
        )
        assert ids == tokens[0]
        assert 40 / (guesses + 1) <= passes <= 40
        if temperature == 0:
            assert passes < 40  # it repeats itself, and that is guessed
        cached.free(entry)
    for (ids, needed), entry in zip(drawn, entries, strict=True):
        rows = model(np.array([prompt + ids]))[0, len(prompt) - 1 : -1].astype(float)
        log_p = rows - np.logaddexp.reduce(rows, axis=1, keepdims=True)
        bits = -log_p[np.arange(40), ids].mean() / np.log(2)
        assert needed == pytest.approx(bits, abs=1e-4)
        cached.free(entry)


def test_guesses_are_what_followed_before() -> None:
    look_up = generate().look_up
    assert look_up([1, 2, 3, 4, 9, 1, 2, 5, 1, 2], 2) == [5, 1]  # the last time counts
    assert look_up([1, 2, 3, 1, 2], 9) == [3, 1, 2]
    assert look_up([7, 7, 7], 3) == [7]
    for ids in ([], [1], [1, 2], [1, 2, 3, 2, 1]):
        assert look_up(ids, 3) == []


def test_as_a_user_runs_it(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--checkpoint", str(checkpoint), "--prompt", PROMPT, "--tokens", "24", "--seed", "1"]
    assert run("generate", given) == 0
    text = capsys.readouterr().out
    assert len(re.findall(r"\d tokens +\d+ tokens/s", text)) == 4
    assert text.count("the same tokens") == 2
    assert PROMPT in text
    pages, apart = map(int, re.findall(r"(\d+) pages, not (\d+)", text)[0])
    assert 0 < pages < apart
    assert run("generate", [*given, "--guesses", "0", "--check", "0", "--batch", "1"]) == 0
    assert "same" not in capsys.readouterr().out
    for dtype in ("bfloat16", "int8", "int4"):
        assert run("generate", [*given, "--dtype", dtype, "--check", "9"]) == 0


def test_random_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("generate", ["--tokens", "5", "--check", "3", "--prompt", "ü = 1"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("random weights, so the text is noise: there is no out")
    assert text.count("the same tokens") == 2
    assert "ü = 1" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--batch", "0"], "--batch: is 0, must be at least 1"),
        (["--page-size", "0"], "--page-size: is 0, must be at least 1"),
        (["--guesses", "-1"], "--guesses: is -1, must be at least 0"),
        (["--dtype", "float64"], "--dtype"),
        (["--checkpoint", "nowhere"], "--checkpoint: there is no nowhere"),
    ],
)
def test_options_that_do_not_fit(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run("generate", given)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_another_models_checkpoint(library: Path, tmp_path: Path) -> None:
    assert run("translate", arguments("translate", tmp_path, library, 1)) == 0
    with pytest.raises(ValueError, match=r"translate\.safetensors: holds no language model"):
        run("generate", ["--checkpoint", str(tmp_path / "translate.safetensors")])
