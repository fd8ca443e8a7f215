"""The corpus that every Python carries: the source of its standard library.

Modules are divided between training and held-out text as wholes, by the hash of their names, so that no half
of a package gives the other half away. Tests are trained on where they are installed, and never held out: the
held-out text is the same on a machine without them. The tests of a held-out module belong to it and are left
out.

Left out as well: tables and generated files, near copies, and files that are not UTF-8.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from puna.data.readers import Document
from puna.data.similarity import is_generated, is_table, near_copies
from puna.errors import DataError
from puna.files import write_atomically

HELD_OUT = 0.065  # of the bytes that are not tests
LARGEST = 0.02  # the same, of one module to be held out: a larger one would be most of what is scored
NOT_LIBRARY = {"site-packages", "dist-packages", "lib-dynload", "__pycache__"}
TEST_DIRECTORIES = {"test", "tests", "idle_test"}
SMALLEST_CORPUS = 1_000_000  # bytes; a Python with less has no source to speak of

Fate = Literal["train", "held out", "left out"]


@dataclass(frozen=True)
class SourceFile:
    """A file of the library: what became of it and why; `module` is the name it is held out or kept by."""

    path: str
    module: str
    is_test: bool
    size: int
    sha256: str
    fate: Fate = "train"
    reason: str = ""


@dataclass(frozen=True)
class StandardLibrary:
    """Documents for training and held out, and every file with its hash and fate, in order of path."""

    train: list[Document]
    held_out: list[Document]
    files: list[SourceFile]
    root: Path

    def write_manifest(self, path: Path) -> None:
        """Write the list of files as JSON."""
        content = {
            "python": platform.python_version(),
            "implementation": sys.implementation.name,
            "train_bytes": sum(file.size for file in self.files if file.fate == "train"),
            "held_out_bytes": sum(file.size for file in self.files if file.fate == "held out"),
            "held_out_modules": sorted({file.module for file in self.files if file.fate == "held out"}),
            "files": [asdict(file) for file in self.files],
        }
        write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def standard_library(root: Path | None = None, tests: bool = True) -> StandardLibrary:
    """The library of this Python, or the one below `root`; the same Python gives the same result everywhere.

    Args:
        root: the directory that holds `os.py`.
        tests: whether to train on the library's tests, where they are.

    Raises:
        DataError: there is no source of a standard library.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    texts: dict[str, str] = {}
    files = []
    for path in _source_files(root):
        file, text = _read(path, root)
        files.append(file)
        texts[file.path] = text
    if not tests:
        files = [_left_out(file, "a test") if file.is_test else file for file in files]
    files = [_without_tables(file, texts[file.path]) for file in files]
    if sum(file.size for file in files if file.fate == "train") < SMALLEST_CORPUS:
        raise DataError(f"{root}: no source of Python's standard library; train on text of your own instead")
    files = _without_copies(_with_tests_of(_hold_out(files)), texts)
    return StandardLibrary(
        train=[Document(texts[file.path], file.path) for file in files if file.fate == "train"],
        held_out=[Document(texts[file.path], file.path) for file in files if file.fate == "held out"],
        files=files,
        root=root,
    )


def _source_files(root: Path) -> list[Path]:
    found = []
    for parent, directories, names in os.walk(root):  # which, unlike rglob, need not enter what is left out
        directories[:] = [name for name in directories if _is_library(name)]
        found += [Path(parent, name) for name in names if name.endswith(".py")]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(root).parts)


def _is_library(directory: str) -> bool:
    return directory not in NOT_LIBRARY and not directory.startswith("config-")


def _read(path: Path, root: Path) -> tuple[SourceFile, str]:
    data = path.read_bytes()
    parts = path.relative_to(root).parts
    file = SourceFile(
        path="/".join(parts),
        module=_module(parts),
        is_test=not TEST_DIRECTORIES.isdisjoint(parts),
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return _left_out(file, "not UTF-8"), ""
    if "\0" in text or not text.strip():
        return _left_out(file, "empty" if not text.strip() else "holds NUL characters"), ""
    return file, text


def _module(parts: Sequence[str]) -> str:
    """What a file belongs to: its top-level module, or the module that it tests.

    A module in C and its twin in Python are one: `_pydecimal` and `decimal`, `_pyio` and `io`.

    >>> [_module(path.split("/")) for path in ("json/decoder.py", "_pyio.py", "test/test_json/test_dump.py")]
    ['json', 'io', 'json']
    """
    name = parts[1] if parts[0] == "test" and len(parts) > 1 else parts[0]
    name = name.removesuffix(".py")
    if parts[0] == "test":
        name = name.removeprefix("test_").removesuffix("_tests").removesuffix("_test")
    if name.startswith("_") and not name.startswith("__"):
        name = name.lstrip("_").removeprefix("py").lstrip("_") or name
    return name


def _without_tables(file: SourceFile, text: str) -> SourceFile:
    if file.fate == "left out":
        return file
    if file.path.startswith(("pydoc_data/", "encodings/cp", "encodings/mac_", "encodings/iso8859_")):
        return _left_out(file, "a table")
    if is_generated(text):
        return _left_out(file, "generated")
    return _left_out(file, "a table") if is_table(text) else file


def _hold_out(files: list[SourceFile]) -> list[SourceFile]:
    """Hold out whole modules, in the order of the hashes of their names, until they are enough."""
    sizes: dict[str, int] = {}
    for file in files:
        if file.fate == "train" and not file.is_test:
            sizes[file.module] = sizes.get(file.module, 0) + file.size
    total = sum(sizes.values())
    chosen: set[str] = set()
    held = 0
    for module in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if held >= HELD_OUT * total:
            break
        if sizes[module] <= LARGEST * total:
            chosen.add(module)
            held += sizes[module]
    return [
        replace(file, fate="held out")
        if file.fate == "train" and not file.is_test and file.module in chosen
        else file
        for file in files
    ]


def _with_tests_of(files: list[SourceFile]) -> list[SourceFile]:
    """Leave out the tests of modules that are held out."""
    chosen = {file.module for file in files if file.fate == "held out"}
    return [
        _left_out(file, f"tests {module}, which is held out")
        if file.fate == "train" and file.is_test and (module := _tested(file.module, chosen))
        else file
        for file in files
    ]


def _tested(name: str, modules: Iterable[str]) -> str | None:
    """Which of `modules` a test by this name is about: `zipfile64` and `zipfile_x` are about `zipfile`."""
    for module in sorted(modules):
        if name == module or name.startswith(module + "_") or (len(module) > 4 and name.startswith(module)):
            return module
    return None


def _without_copies(files: list[SourceFile], texts: dict[str, str]) -> list[SourceFile]:
    """Leave out near copies, held-out files being compared with first and tests last."""
    rank = {"held out": 0, "train": 1}
    kept = [file for file in files if file.fate != "left out"]
    kept.sort(key=lambda file: (rank[file.fate], file.is_test))  # stable: by path within each
    held_out = sum(file.fate == "held out" for file in kept)
    copies = near_copies([texts[file.path] for file in kept], held_out)
    reasons = {kept[copy].path: f"near copy of {kept[earlier].path}" for copy, earlier in copies.items()}
    return [_left_out(file, reasons[file.path]) if file.path in reasons else file for file in files]


def _left_out(file: SourceFile, reason: str) -> SourceFile:
    return replace(file, fate="left out", reason=reason)
