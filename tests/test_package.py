"""What is installed: headers, CMake files, types, and objects that keep their ISA to themselves."""

from __future__ import annotations

import doctest
import importlib
import importlib.metadata
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import attncore

CONSUMER = Path(__file__).parent / "cpp" / "consumer"
LIBRARY = Path(attncore.get_include()).parent / "lib" / "libattncore.a"


def needs(tool: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"no {tool} on this machine")


def run(*command: object) -> str:
    """What `command` prints; a failure shows it."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_version() -> None:
    assert attncore.__version__ == importlib.metadata.version("attncore")


def test_headers() -> None:
    assert (Path(attncore.get_include()) / "attncore" / "attncore.hpp").is_file()


def test_cmake_files() -> None:
    files = {path.name for path in Path(attncore.get_cmake_dir()).iterdir()}
    assert files >= {"attncoreConfig.cmake", "attncoreConfigVersion.cmake", "attncoreTargets.cmake"}


def test_typed() -> None:
    assert any((Path(folder) / "py.typed").is_file() for folder in attncore.__path__)


def test_all_is_complete() -> None:
    """Every public name exists; nothing public is left out of __all__."""
    missing = [name for name in attncore.__all__ if not hasattr(attncore, name)]
    assert missing == []
    assert len(set(attncore.__all__)) == len(attncore.__all__)


@needs("cmake")
@pytest.mark.parametrize("how", ["attncore_DIR", "attncore_ROOT"])
def test_find_package(how: str, tmp_path: Path) -> None:
    """A C++ project finds the library inside the Python package."""
    where = {"attncore_DIR": attncore.get_cmake_dir(), "attncore_ROOT": LIBRARY.parents[1]}[how]
    run("cmake", "-S", CONSUMER, "-B", tmp_path, f"-D{how}={where}", "-DCMAKE_BUILD_TYPE=Release")
    run("cmake", "--build", tmp_path, "--config", "Release")
    assert "0 failures" in run(tmp_path / "consumer")


def exported(path: Path) -> dict[str, list[str]]:
    """For each object in an archive: the symbols that other objects can see, demangled."""
    symbols: dict[str, list[str]] = {}
    member = ""
    for line in run("nm", "--demangle", "--defined-only", "--extern-only", path).splitlines():
        if heading := re.fullmatch(r"(\S+\.o):", line):
            member = heading[1]
            symbols[member] = []
        elif symbol := re.fullmatch(r"[0-9a-f]* +\S (.+)", line):
            symbols[member].append(symbol[1])
    return symbols


def built(isa: str) -> None:
    """Skips what the compiler could not build: nothing that this machine has."""
    if isa in attncore.available_isas():
        return
    if not any(member.startswith(f"{isa}.") for member in exported(LIBRARY)):
        pytest.skip(f"not built: {isa}")


TILES = ["amx", "amx_f32"]
ISAS = [*TILES, "avx512_bf16", "avx512", "avx2"]


@needs("nm")
@pytest.mark.parametrize("isa", ISAS)
def test_isa_objects_export_only_what_bears_their_name(isa: str) -> None:
    """An untagged inline function of an ISA's object could be linked into a caller for all machines: SIGILL there.

    (DW.ref.… is a pointer to the personality routine: data, the same in every object.)
    """
    built(isa)
    members = [names for member, names in exported(LIBRARY).items() if member.startswith(f"{isa}.")]
    assert len(members) == 1
    assert members[0], "the object exports nothing at all"
    leaks = [
        name for name in members[0] if isa not in name.lower() and not name.startswith("DW.ref.")
    ]
    assert leaks == []


def dump(tool: str, *options: str) -> dict[str, str]:
    """What a tool prints of each object of the library."""
    parts = re.split(r"\n(\S+\.o):.*\n", run(tool, *options, LIBRARY))
    return {
        member.partition(".")[0]: text
        for member, text in zip(parts[1::2], parts[2::2], strict=True)
    }


@needs("nm")
@pytest.mark.parametrize("isa", ISAS)
def test_isa_objects_run_nothing_when_they_are_loaded(isa: str) -> None:
    """A table that is not constant would be filled by the ISA's own instructions, on every machine."""
    built(isa)
    assert not re.search("_GLOBAL__sub|__cxx_global_var_init", dump("nm")[isa])


@needs("objdump")
def test_only_amx_has_tiles() -> None:
    """They are configured and released in the same functions, and multiplied."""
    built("amx")
    code = dump("objdump", "--disassemble", "--no-show-raw-insn")
    for isa in TILES:
        functions = re.split(r"\n\n[0-9a-f]+ <", code.pop(isa))
        assert sum("tdpbf16ps" in function for function in functions) > 0
        pairs = [f for f in functions if "ldtilecfg" in f or "tilerelease" in f]
        assert pairs
        assert all(f.count("ldtilecfg") == f.count("tilerelease") for f in pairs)
    assert [member for member, text in code.items() if re.search(r"\btmm\d|%tmm", text)] == []


@needs("nm")
def test_module_keeps_the_library_to_itself() -> None:
    symbols = run("nm", "--demangle", "--dynamic", "--defined-only", attncore._core.__file__)
    assert "PyInit__core" in symbols
    assert [line for line in symbols.splitlines() if " attncore::" in line] == []


def test_stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """_core.pyi says what _core has."""
    pytest.importorskip("mypy")
    monkeypatch.chdir(tmp_path)  # not the checkout: the installed package is meant
    allowed = tmp_path / "allowed.txt"  # pybind11's classes have a metaclass of their own
    allowed.write_text("attncore._core.[A-Z]\\w+\n", encoding="utf-8")
    run(sys.executable, "-m", "mypy.stubtest", "attncore._core", "--allowlist", allowed)


MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(attncore.__path__, "attncore.")
    if not module.name.endswith(("__main__", "._core"))
)


@pytest.mark.parametrize("name", ["attncore", *MODULES])
def test_doctests(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
