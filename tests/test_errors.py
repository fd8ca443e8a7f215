"""The exception tree: exit codes, and suggestions."""

from __future__ import annotations

import doctest
import errno
import os
import signal
from pathlib import Path

import pytest

from puna import errors, progress
from puna.errors import CheckFailed, InputError, Interrupted, ModelError, PunaError, nearest
from puna.files import disk_errors


def test_exit_codes() -> None:
    assert PunaError().exit_code == 1
    assert CheckFailed().exit_code == 3
    assert Interrupted(signal.SIGINT).exit_code == 130
    assert Interrupted(signal.SIGTERM).exit_code == 143
    assert {error.exit_code for error in _below(InputError)} == {2}


def _below(cls: type[PunaError]) -> list[type[PunaError]]:
    return [cls, *(below for child in cls.__subclasses__() for below in _below(child))]


def test_tree_is_drawn_at_the_top() -> None:
    drawn = errors.__doc__ or ""
    assert [
        cls.__name__
        for cls in _below(PunaError)
        if cls.__module__ == "puna.errors" and cls.__name__ not in drawn
    ] == []


@pytest.mark.parametrize(("name", "suggestion"), [("cosin", " Did you mean 'cosine'?"), ("zzz", "")])
def test_nearest(name: str, suggestion: str) -> None:
    assert nearest(name, ["cosine", "linear"]) == suggestion


@pytest.mark.parametrize("module", [errors, progress])
def test_examples_in_docstrings(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]


def test_a_message_is_one_line_of_printable_characters() -> None:
    message = str(ModelError("a\nb\x1b[2J" + "é" * 5000))
    assert message.startswith("a\\nb\\x1b[2Jéé")
    assert message.isprintable()
    assert len(message) < 2100


def test_what_the_system_could_not_read_is_not_blamed_on_the_disk(tmp_path: Path) -> None:
    with (
        pytest.raises(ModelError, match=r"^a mapped file that is read became shorter while writing it$"),
        disk_errors("writing it", tmp_path, ModelError, "free some space"),
    ):
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
