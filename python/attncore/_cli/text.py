"""The demo's text: the project's README, as paragraphs with the heading above each."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path

MIN_WORDS = 5
LIST_WORDS = 40


@dataclass(frozen=True)
class Paragraph:
    """Some text of a page and the heading that it stands under."""

    heading: str
    text: str

    def for_model(self) -> str:
        """What the encoder reads: a paragraph says more beside its heading."""
        return f"{self.heading}: {self.text}" if self.heading else self.text


def readme() -> str:
    """The README of the source checkout, or the description in the installed package."""
    checkout = Path(__file__).resolve().parents[3]
    page = checkout / "README.md"
    if page.is_file() and (checkout / "pyproject.toml").is_file():
        return page.read_text(encoding="utf-8")
    try:
        metadata = importlib.metadata.metadata("attncore")
    except importlib.metadata.PackageNotFoundError:
        return ""
    description = metadata.get_payload() or metadata.get("Description")  # type: ignore[attr-defined]
    return str(description or "")


def paragraphs(markdown: str) -> list[Paragraph]:
    """The prose of a Markdown page: no code, tables, pictures or comments."""
    page = re.sub(r"<!--.*?-->", "", markdown, flags=re.DOTALL)
    page = re.sub(r"^ {0,3}(```|~~~).*?^ {0,3}\1[^\n]*$", "", page, flags=re.DOTALL | re.MULTILINE)
    found: list[Paragraph] = []
    heading, lines = "", list[str]()

    def close() -> None:
        text = _plain(" ".join(lines))
        if len(text.split()) >= MIN_WORDS:
            found.append(Paragraph(heading, text))
        lines.clear()

    for line in page.splitlines():
        if title := re.match(r"#{1,6}\s+(.*)", line):
            close()
            heading = _plain(title[1])
        elif not line.strip() or (line.startswith("    ") and not lines):
            close()
        elif not line.lstrip().startswith("|"):
            item = re.match(r"\s*([-*+]|\d+\.)\s+", line)
            if item and len(" ".join(lines).split()) > LIST_WORDS:
                close()  # a long list becomes several paragraphs
            lines.append(line[item.end() :] if item else line)
    close()
    return found


def _plain(markdown: str) -> str:
    """Text without Markdown's marks; code spans keep every character."""
    parts = markdown.split("`")
    for index in range(0, len(parts), 2):  # odd parts stand between backquotes
        part = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", parts[index])  # pictures
        part = re.sub(r"<[^>\s][^>]*>", "", part)
        parts[index] = re.sub(r"\*\*|__", "", part)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", "".join(parts))  # links keep their words
    return re.sub(r"\s+", " ", text).strip()
