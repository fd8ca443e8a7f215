"""A file of answers that a killed process leaves whole, and that another one goes on with.

A line is written whole or not at all; what a kill tore is cut off when the file is taken up again. Beside it
lies `FILE.puna.json`: the settings and the model that its answers were made with, which may not change.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pydantic

from puna.engine.params import SamplingParams
from puna.errors import DataError, RunBusyError
from puna.files import disk_errors, write_atomically
from puna.settings import Settings, differences, neutral

ADVICE = "make room, and go on with --resume: the answers so far are kept"


class Record(Settings):
    """What decides the answers of a file."""

    format_version: Literal[1] = 1
    model: str
    """The fingerprint of its weights and tokenizer."""
    source: str | None = neutral(None)
    prompts: str
    """The SHA-256 of the lines that were asked."""
    lines: int
    sampling: SamplingParams
    template: str | None = None
    cache_dtype: str = "auto"
    deterministic: bool = True


class AnswerFile:
    """A file of JSON lines at whose end answers are put; `done` says which lines are answered."""

    def __init__(self, path: Path, file: io.FileIO) -> None:
        """`file` is open for reading and writing, and locked."""
        self.path, self.done, self.failed = path, set[int](), 0
        self._file, self._end = file, 0

    def put(self, answer: dict[str, Any]) -> None:
        """Append a line, whole.

        Raises:
            ResourceError: there is no room for it; nothing of it is left.
            DataError: it cannot be written; likewise.
        """
        line = as_line(answer).encode("utf-8")
        with disk_errors(f"writing {self.path}", self.path, DataError, ADVICE):
            try:
                written = 0
                while written < len(line):
                    written += os.pwrite(self._file.fileno(), line[written:], self._end + written)
            except BaseException:
                self._file.truncate(self._end)
                raise
        self._end += len(line)

    def sync(self) -> None:
        """Wait until all is on the disk."""
        with disk_errors(f"writing {self.path}", self.path, DataError, ADVICE):
            os.fsync(self._file.fileno())

    def take_up(self) -> None:
        """Note what is answered, and cut off a line that a kill tore.

        Raises:
            DataError: a line is no answer.
        """
        with open(self._file.fileno(), "rb", closefd=False) as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                answer = self._answer(line, number)
                self.done.add(answer["line"])
                self.failed += "error" in answer
                self._end += len(line)
        with disk_errors(f"writing {self.path}", self.path, DataError, ADVICE):
            self._file.truncate(self._end)

    def _answer(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict) or not isinstance(answer.get("line"), int):
            raise DataError(f"{self.path}: line {number} is no answer that Puna wrote; remove it, and go on")
        return answer


def record_of(path: Path) -> Record | None:
    """What the answers of a file were made with; None where there are none yet.

    Raises:
        DataError: there are answers, and nothing that Puna can read says how they were made.
    """
    _refuse_special(path)
    if not path.exists() or path.stat().st_size == 0:
        return None
    beside = _beside(path)
    try:
        return Record.model_validate_json(beside.read_bytes())
    except (OSError, pydantic.ValidationError):
        raise DataError(
            f"{path} cannot be continued: {beside.name}, which says how its answers were made, is missing, "
            "damaged or of another version; choose another file"
        ) from None


def refuse_existing(path: Path) -> None:
    """Raises DataError where there is a file, which only --resume may go on with."""
    _refuse_special(path)
    if path.exists():
        raise DataError(f"{path} exists; go on with it by --resume, or choose another file")


@contextlib.contextmanager
def answer_file(path: Path, record: Record, resume: bool) -> Iterator[AnswerFile]:
    """Hold a file of answers against other processes, making it if need be.

    Raises:
        DataError: it exists and `resume` is False; its answers were made in another way; it cannot be opened.
        RunBusyError: another process holds it.
        ResourceError: the disk is full.
    """
    with disk_errors(f"opening {path}", path, DataError, ADVICE):
        if not resume:
            refuse_existing(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | (0 if resume else os.O_EXCL), 0o666)
    with io.FileIO(descriptor, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunBusyError(f"another process is writing {path}; wait for it, or stop it") from None
        before = record_of(path)
        if before is None:
            _begin(path, record)
        else:
            _refuse_changes(path, before, record)
        answers = AnswerFile(path, file)
        answers.take_up()
        yield answers
        answers.sync()


def as_line(answer: dict[str, Any]) -> str:
    """JSON in a line, its text readable; half a surrogate pair, which JSON can smuggle in, escaped."""
    text = json.dumps(answer, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(answer)
    return text + "\n"


def _refuse_special(path: Path) -> None:
    if not path.is_file() and (path.exists() or path.is_symlink()):
        raise DataError(f"{path} is no regular file, and answers are kept in one; name another")


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.puna.json")


def _begin(path: Path, record: Record) -> None:
    beside = _beside(path)
    try:
        with disk_errors(f"writing {beside}", path, DataError, "make room"):
            write_atomically(beside, record.model_dump_json(indent=2) + "\n")
    except BaseException:
        path.unlink(missing_ok=True)  # it is empty, and would stand in the way of the next attempt
        raise


def _refuse_changes(path: Path, before: Record, now: Record) -> None:
    changed = [difference for difference in differences(before, now) if difference.kind != "neutral"]
    keys = {difference.key for difference in changed}
    if "prompts" in keys:
        raise DataError(
            f"{path} answers other prompts than these: the file of prompts changed, or is another"
        )
    if "model" in keys:
        raise DataError(f"{path} was made with another model ({before.source}), number type or tokenizer")
    if changed:
        told = "; ".join(map(str, changed))
        raise DataError(f"{path} was made with other settings: {told}; take the same, or another file")
