"""``python -m attncore``: what a shell sees of info, bench and demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import attncore
from attncore.__main__ import main
from attncore._cli import packages


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m attncore`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "attncore", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_info_prints_the_machine_and_the_build() -> None:
    done = shell("info")
    assert done.returncode == 0, done.stderr
    for word in (attncore.isa(), "threads", "compiler", "cuda"):
        assert word.lower() in done.stdout.lower()


def test_info_as_json() -> None:
    done = shell("info", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["isa"] == attncore.isa()


def test_info_follows_the_forced_isa() -> None:
    lowest = attncore.available_isas()[-1]
    done = shell("info", "--json", ATTNCORE_ISA=lowest)
    assert json.loads(done.stdout)["isa"] == lowest


def test_help_and_wrong_command_line() -> None:
    assert "bench" in shell("--help").stdout
    wrong = shell("fly")
    assert wrong.returncode == 2
    assert "fly" in wrong.stderr


def test_bench_prints_a_line_a_case_and_isa(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--rounds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 4 * len(attncore.available_isas())
    assert all("short" in line for line in lines[2:])


def test_bench_refuses_an_unknown_isa(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--isa", "mmx"]) == 1
    error = capsys.readouterr().err
    assert "mmx" in error
    assert attncore.available_isas()[0] in error


def test_demo_without_its_packages_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = packages.present
    monkeypatch.setattr(packages, "present", lambda name: name != "tokenizers" and here(name))
    assert main(["demo"]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert len(error.splitlines()) == 1
    assert "tokenizers" in error
    assert "pip install" in error


def test_importing_attncore_does_not_import_the_commands() -> None:
    code = "import sys, attncore; sys.exit(any('_cli' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_progress_bar_where_stderr_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(packages.progress(range(3), "nothing")) == [0, 1, 2]
    assert capfd.readouterr().err == ""


def test_folder_of_a_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "never_imported"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert packages.present("never_imported")
    assert packages.folder_of("never_imported") == folder
    assert not packages.present("never_written")
