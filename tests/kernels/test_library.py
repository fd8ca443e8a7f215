"""Compiling at first use: kept, shared between processes, rebuilt when damaged, and never required."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from puna.kernels.compiler import default_compiler, missing
from puna.kernels.library import Library, cache_directory, compiled, openmp_fork

SOURCE = 'extern "C" int answer() { return 42; }\n'

needs_compiler = pytest.mark.skipif(bool(missing(default_compiler())), reason="compiling needs a compiler")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "small.cpp"
    path.write_text(SOURCE)
    return path


def built(source: Path, directory: Path) -> Library:
    return compiled(source, default_compiler(), directory)


def answer(library: Library) -> int:
    assert library.functions is not None, library.fault
    return library.functions.answer()


@needs_compiler
def test_the_second_process_finds_it_compiled(source: Path, tmp_path: Path) -> None:
    first, second = built(source, tmp_path / "kept"), built(source, tmp_path / "kept")
    assert answer(first) == answer(second) == 42
    assert first.seconds > 0 and second.seconds == 0
    assert sorted(path.suffix for path in (tmp_path / "kept").iterdir()) == [".so", ".sum"]


@needs_compiler
def test_another_source_is_another_library(source: Path, tmp_path: Path) -> None:
    built(source, tmp_path / "kept")
    source.write_text(SOURCE.replace("42", "43"))
    assert answer(built(source, tmp_path / "kept")) == 43


@needs_compiler
def test_another_header_is_another_library(source: Path, tmp_path: Path) -> None:
    """Headers lie beside the source; what they held before is never found for what they hold now."""
    header = tmp_path / "number.hpp"
    header.write_text("constexpr int NUMBER = 42;\n")
    source.write_text('#include "number.hpp"\nextern "C" int answer() { return NUMBER; }\n')
    assert answer(built(source, tmp_path / "kept")) == 42
    assert built(source, tmp_path / "kept").seconds == 0
    header.write_text("constexpr int NUMBER = 43;\n")
    assert answer(built(source, tmp_path / "kept")) == 43
    header.write_text("constexpr int NUMBER = 42;\n")
    again = built(source, tmp_path / "kept")
    assert answer(again) == 42 and again.seconds == 0


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "changed", "no sum"])
def test_a_damaged_library_is_built_again(source: Path, tmp_path: Path, damage: str) -> None:
    built(source, tmp_path / "kept")
    (library,) = (tmp_path / "kept").glob("*.so")
    whole = library.read_bytes()
    if damage == "no sum":
        library.with_suffix(".sum").unlink()
    else:
        library.unlink()  # this process has the old file loaded: it must stay as it is
        library.write_bytes(whole[: len(whole) // 2] if damage == "cut" else whole[:-1] + b"!")

    assert built(source, tmp_path / "kept").seconds > 0
    assert library.read_bytes() == whole


@needs_compiler
def test_what_is_kept_is_this_users_alone(source: Path, tmp_path: Path) -> None:
    directory = tmp_path / "kept"
    directory.mkdir(mode=0o777)
    directory.chmod(0o777)
    built(source, directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


@needs_compiler
def test_a_link_to_elsewhere_is_not_trusted(source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "kept").symlink_to(tmp_path / "elsewhere")
    assert answer(built(source, tmp_path / "kept")) == 42
    assert not list((tmp_path / "elsewhere").iterdir())


@needs_compiler
def test_a_directory_that_cannot_be_written_to_costs_only_time(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert answer(built(source, tmp_path / "file" / "kept")) == 42


@needs_compiler
def test_several_processes_at_once_all_get_it(source: Path, tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from puna.kernels.library import compiled\n"
    script += "assert compiled(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])).functions.answer() == 42"
    command = [sys.executable, "-c", script, str(source), default_compiler(), str(tmp_path / "kept")]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert answer(built(source, tmp_path / "kept")) == 42


def test_without_a_compiler_there_is_one_line(source: Path, tmp_path: Path) -> None:
    found = compiled(source, "no-such-compiler", tmp_path / "kept")
    assert found == Library(None, "there is no C++ compiler (no-such-compiler); install g++ or clang")


@needs_compiler
def test_a_source_that_cannot_be_compiled_is_one_line(source: Path, tmp_path: Path) -> None:
    source.write_text("no C++\n")
    found = built(source, tmp_path / "kept")
    assert found.functions is None
    assert "cannot build a library" in found.fault and "\n" not in found.fault


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "puna" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert cache_directory() == Path.home() / ".cache" / "puna" / "kernels"


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="looks into /proc")
def test_threads_come_from_the_runtime_that_torch_uses() -> None:
    """Its address lies in a library that torch has loaded: no second pool is started beside it."""
    address = openmp_fork()
    if address is None:
        pytest.skip("this torch has no OpenMP")
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [(*(int(end, 16) for end in line[0].split("-")), line[-1]) for line in lines]
    (home,) = (name for low, high, name in spans if low <= address < high)
    assert "omp" in Path(home).name
    assert "torch" in Path(home).parts or os.path.realpath(home).startswith(("/usr", "/lib"))


@needs_compiler
def test_what_does_not_load_is_not_kept(source: Path, tmp_path: Path) -> None:
    liar = tmp_path / "liar"
    liar.write_text(
        '#!/bin/sh\nwhile [ "$1" != -o ] && [ $# -gt 0 ]; do shift; done\necho junk > "${2:-/dev/null}"\n'
    )
    liar.chmod(0o755)
    library = compiled(source, str(liar), tmp_path / "kept")
    assert library.functions is None and "cannot be used" in library.fault
    assert "\n" not in library.fault
    assert not list((tmp_path / "kept").iterdir())


@pytest.mark.parametrize("compiler", ['g++ "', "", "no-such-compiler --fast"])
def test_a_compiler_that_is_none_is_one_line(source: Path, tmp_path: Path, compiler: str) -> None:
    library = compiled(source, compiler, tmp_path / "kept")
    assert library.functions is None
    assert library.fault and "\n" not in library.fault


@needs_compiler
def test_a_user_without_a_home(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert cache_directory() is None
    assert answer(compiled(source, default_compiler(), None)) == 42
