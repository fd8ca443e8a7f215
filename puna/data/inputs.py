"""Files, directories and glob patterns → the files they mean, in an order that no machine changes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from puna.errors import DataError


@dataclass(frozen=True)
class InputFile:
    """A file, and its name in reports: the name of the input that led to it, and the path below that."""

    path: Path
    name: str
    size: int  # bytes on disk
    modified: int  # nanoseconds since 1970


def list_files(inputs: Sequence[str | Path]) -> list[InputFile]:
    """Every file of the inputs, in order, each once; hidden files in directories are left out.

    Raises:
        DataError: there is no input, or one of them is missing or holds no file.
    """
    if not inputs:
        raise DataError("no input was given; name files, directories or glob patterns")
    found: dict[Path, InputFile] = {}
    for given in inputs:
        for file in _files_of(str(given)):
            found.setdefault(file.path.resolve(), file)
    return list(found.values())


def _files_of(given: str) -> list[InputFile]:
    path = Path(given).expanduser()
    if path.is_dir():
        files = list(_below(path, path.resolve().parent))
    elif path.exists():
        files = [_named(path, path.parent.resolve())]
    elif _has_wildcard(given):
        files = list(_matches(path))
    else:
        raise DataError(f"{given}: no such file or directory")
    if not files:
        raise DataError(f"{given}: {'holds' if path.is_dir() else 'matches'} no file")
    return files


def _below(directory: Path, base: Path) -> Iterator[InputFile]:
    """Files at any depth, sorted by path; links to directories are not followed: they may form a circle."""
    found = []
    for parent, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    for path in sorted(found, key=lambda path: path.parts):
        if path.is_file():
            yield _named(path, base)


def _matches(pattern: Path) -> Iterator[InputFile]:
    """Files that match, and all in directories that match, named from the last fixed directory on."""
    fixed = Path(*itertools.takewhile(lambda part: not _has_wildcard(part), pattern.parts))
    base = fixed.resolve().parent
    for path in sorted(fixed.glob(str(pattern.relative_to(fixed)))):
        if any(part.startswith(".") for part in path.relative_to(fixed).parts):
            continue
        if path.is_dir():
            yield from _below(path, base)
        elif path.is_file():
            yield _named(path, base)


def _named(path: Path, base: Path) -> InputFile:
    # Only the directory is resolved: a link to a file keeps the name it has here.
    name = (path.parent.resolve() / path.name).relative_to(base).as_posix()
    status = path.stat()
    return InputFile(path, name, status.st_size, status.st_mtime_ns)


def _has_wildcard(text: str) -> bool:
    return any(sign in text for sign in "*?[")
