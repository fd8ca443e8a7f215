"""What commands print, and where."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from typing import Any

from puna.recipes.answering.terminal import note

__all__ = ["announce", "emit", "note", "write"]

PATIENCE = 1.0  # seconds that a person waits without a word


def emit(result: dict[str, Any], as_json: bool) -> None:
    """A command's result as one line of JSON, the last of its output, where it is asked for."""
    if as_json:
        print(json.dumps(result))  # in ASCII, so that no terminal's encoding can spoil it


def write(text: str) -> None:
    """A piece of an answer, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def announce(line: str) -> Callable[[], None]:
    """Note what takes long, on a terminal, unless the function returned is called in time."""
    timer = threading.Timer(PATIENCE, note, [line])
    timer.daemon = True  # a command that fails meanwhile waits for nobody
    if sys.stderr.isatty():
        timer.start()
    return timer.cancel
