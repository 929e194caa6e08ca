"""The demo: its encoder, its text, its memory figures and the whole run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import attncore
from attncore.__main__ import main
from attncore._cli import demo, memory, packages, text
from attncore._cli.encoder import Array, Encoder, gelu
from attncore._cli.textbook import textbook_attention

MISSING = [name for name in packages.DEMO_PACKAGES if not packages.present(name)]
needs_packages = pytest.mark.skipif(
    bool(MISSING), reason=f"the demo needs {', '.join(MISSING)}: {packages.DEMO_INSTALL}"
)
needs_linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)

SENTENCES = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A monkey is playing drums.",
    "Install the library with pip, from a checkout, with a C++ compiler.",
    "word " * 60,
]

PAGE = """# A library

![badge](https://example.org/a.svg)
First [words](https://example.org) of **one** plain paragraph.

```python
code = "is no prose, however many words it has"
```

## Use from C++

Include `<attncore/attncore.hpp>` and link the CMake target `attncore::attncore`.

| a table | is not | prose | either |
| --- | --- | --- | --- |

## Masks
- a boolean mask is True where a query may look
- a bias is a number that is added
"""


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """The trained model."""
    return Encoder()


def test_textbook_is_attention(rng: np.random.Generator) -> None:
    query, key, value = (rng.standard_normal((3, 2, 9, 8)) for _ in range(3))
    lengths = np.array([9, 1, 5])
    expected = attncore.attention(query, key, value, key_lengths=lengths, query_offset=0)
    np.testing.assert_allclose(textbook_attention(query, key, value, lengths), expected, rtol=1e-10)


def test_gelu_is_exact_to_single_precision() -> None:
    x = np.linspace(-9, 9, 4001, dtype=np.float32)
    exact = [value * 0.5 * math.erfc(-value / math.sqrt(2)) for value in x.tolist()]
    np.testing.assert_allclose(gelu(x), exact, atol=1e-6)


@needs_packages
def test_encoder_is_the_same_with_textbook_attention(encoder: Encoder, isa: str) -> None:
    vectors = encoder.encode(SENTENCES)
    expected = encoder.with_attention(demo.attend_by_the_book).encode(SENTENCES)
    assert vectors.shape == (len(SENTENCES), 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(vectors, expected, atol=2e-6)


@needs_packages
def test_long_texts_are_cut(encoder: Encoder) -> None:
    tokens = encoder.tokenize("word " * 400)
    assert len(tokens.ids) == len(tokens.pieces) == 256
    assert (tokens.pieces[0], tokens.pieces[-1]) == ("[CLS]", "[SEP]")


@needs_packages
def test_padding_in_a_batch_does_not_matter(encoder: Encoder) -> None:
    together = encoder.encode(SENTENCES)
    alone = np.concatenate([encoder.encode([sentence]) for sentence in SENTENCES])
    np.testing.assert_allclose(together, alone, atol=2e-6)


@needs_packages
def test_similar_sentences_are_near(encoder: Encoder) -> None:
    eats, bread, baby, drums, *_ = encoder.encode(SENTENCES)
    assert eats @ bread == pytest.approx(0.755, abs=2e-3)  # what the model's authors print
    assert eats @ bread > 0.5 + max(eats @ baby, eats @ drums)


@needs_packages
def test_a_view_of_a_head_is_its_attention(encoder: Encoder) -> None:
    seen: list[tuple[Array, Array, Array]] = []

    def spy(query: Array, key: Array, value: Array, lengths: Array) -> Array:
        seen.append((query, key, value))
        return demo.attend_by_the_book(query, key, value, lengths)

    encoder.with_attention(spy).encode(SENTENCES[:1])
    view = encoder.view(SENTENCES[0], layer=3)
    np.testing.assert_allclose(view.query, seen[3][0], atol=2e-5)
    np.testing.assert_allclose(view.key, seen[3][1], atol=2e-5)


def test_paragraphs_are_prose_with_headings() -> None:
    found = text.paragraphs(PAGE)
    assert [p.heading for p in found] == ["A library", "Use from C++", "Masks"]
    assert found[0].text == "First words of one plain paragraph."
    assert "<attncore/attncore.hpp>" in found[1].text
    assert found[2].text.startswith("a boolean mask is True")
    assert found[1].for_model().startswith("Use from C++: Include")
    assert text.paragraphs("") == []


def test_the_readme_is_found() -> None:
    assert "attncore" in text.readme()


@needs_packages
def test_demo_answers_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    arguments = ["What is a boolean mask?", "--text", str(page), "--out", str(tmp_path / "out")]
    assert main(["demo", *arguments, "--no-table"]) == 0
    out = capsys.readouterr().out
    first = next(line for line in out.splitlines() if line.startswith("1."))
    assert first.endswith("Masks")
    assert (tmp_path / "out" / "attention.png").read_bytes().startswith(b"\x89PNG")


@needs_packages
def test_demo_refuses_what_it_cannot_draw_or_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    assert main(["demo", "--text", str(page), "--head", "12"]) == 1
    assert "--head must be in 0 … 11" in capsys.readouterr().err
    assert main(["demo", "--text", str(tmp_path / "none.md")]) == 1
    assert "none.md" in capsys.readouterr().err
    page.write_text("# Nothing\n", encoding="utf-8")
    assert main(["demo", "--text", str(page)]) == 1
    assert "no paragraphs" in capsys.readouterr().err


@needs_linux
def test_memory_is_measured_beyond_inputs_and_output() -> None:
    tokens = 1024
    scores = memory.HEADS * tokens * tokens * 4
    textbook = memory.measure_in_child("textbook", tokens)
    ours = memory.measure_in_child("attncore", tokens)
    assert 2 * scores < textbook.extra_bytes < 6 * scores
    assert ours.extra_bytes < scores
    assert min(ours.seconds, textbook.seconds) > 0


def test_a_failed_measurement_says_why() -> None:
    with pytest.raises(RuntimeError, match="KeyError"):
        memory.measure_in_child("magic", 16)
