"""The examples of README and docs run as they stand."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

import attncore

README = Path(__file__).parent.parent / "README.md"
PAGES = [README, *(README.parent / "docs" / f"{name}.md" for name in ("caching", "layers"))]


def blocks(language: str, page: Path = README) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples(page: Path, tmp_path: Path) -> None:
    examples = blocks("python", page)
    assert examples
    for example in examples:
        program = tmp_path / "example.py"
        program.write_text(example)
        runpy.run_path(str(program))


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake on this machine")
def test_cpp_example(tmp_path: Path) -> None:
    """Its program, linked as its CMake lines say, against the installed package."""
    (program,) = blocks("cpp")
    (cmake,) = blocks("cmake")
    find, link = cmake.strip().splitlines()
    (tmp_path / "main.cpp").write_text(program)
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(readme LANGUAGES CXX)\n"
        f"{find}\nadd_executable(program main.cpp)\n{link}\n"
    )
    build = tmp_path / "build"
    for command in (
        [
            "cmake",
            "-S",
            str(tmp_path),
            "-B",
            str(build),
            f"-Dattncore_DIR={attncore.get_cmake_dir()}",
        ],
        ["cmake", "--build", str(build)],
        [str(build / "program")],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_flow_picture_names_files_that_exist() -> None:
    """What the picture of the architecture names is in the tree."""
    root = README.parent
    picture = README.read_text().split("## How it works")[1].split("```")[1]
    paths = re.findall(r"(?:cpp|python)/[\w/.*]+", picture)
    assert len(paths) > 5
    for path in paths:
        assert list(root.glob(path.rstrip("/"))), path
