"""Every error Puna raises on purpose, and the exit code each one means.

    PunaError                     1    anything else
    ├── InputError                2    the user's input is at fault; the message says how to mend it
    │   ├── SettingsError              a setting: unknown, of the wrong type, out of range, contradictory
    │   ├── DataError                  text, token shards, batches
    │   ├── TokenizerError             a tokenizer file, or text and ids it cannot take
    │   ├── ModelError                 not a model, or a config or weights that do not fit
    │   ├── CheckpointError            a run directory or checkpoint that cannot be used
    │   ├── RunBusyError               a run directory held by another process
    │   ├── ResourceError              memory or disk ran out; the message says what to lower
    │   └── MissingExtraError          an optional dependency is not installed
    ├── CheckFailed               3    the command ran, and its check says no
    └── Interrupted             130/143  SIGINT or SIGTERM, after state was saved

A message is one line: what was expected, what came, what to do.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable

LONGEST = 2000  # characters of a message


class PunaError(Exception):
    """Root of the tree; `exit_code` is what the command line returns for it.

    A message is one line of printable characters, whatever the file name or the value that it quotes.
    """

    exit_code = 1
    told = False
    """Whether its message stands in a log already, so that nobody needs to say it again."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message, LONGEST))


class InputError(PunaError):
    """The user's input is at fault."""

    exit_code = 2


class SettingsError(InputError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another."""


class DataError(InputError):
    """Text, token shards or batches cannot be used."""


class TokenizerError(InputError):
    """A tokenizer file cannot be read, or it cannot take the text or ids it was given."""


class ModelError(InputError):
    """A path is not a model, or a config or weights do not fit together."""


class CheckpointError(InputError):
    """A run directory or a checkpoint cannot be used."""


class RunBusyError(InputError):
    """A run directory is held by another live process."""


class ResourceError(InputError):
    """Memory or disk ran out."""


class MissingExtraError(InputError):
    """A command needs an optional dependency.

    >>> str(MissingExtraError("tensorboard", "train"))
    "tensorboard is not installed; install it with: pip install 'puna[train]'"
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; install it with: pip install 'puna[{extra}]'")


class CheckFailed(PunaError):
    """The command did its work, and what it checked does not hold."""

    exit_code = 3


class Interrupted(PunaError):
    """A signal asked the process to stop; its state was saved first."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message or f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def printable(text: str, longest: int) -> str:
    r"""The text with line ends and control characters escaped, and its middle left out where it is too long.

    >>> printable("a\nb\x1b[2J", 99), printable("a" * 100, 11)
    ('a\\nb\\x1b[2J', 'aaaa … aaaa')
    """
    if len(text) > longest:
        half = (longest - 3) // 2
        text = f"{text[:half]} … {text[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def nearest(name: str, choices: Iterable[str], closeness: float = 0.5) -> str:
    """A suggestion to append to a message, or nothing when no choice is close; `closeness` 1 is the same.

    >>> nearest("adam", ["adamw", "sgd"])
    " Did you mean 'adamw'?"
    >>> nearest("xyz", ["adamw"])
    ''
    """
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=closeness)
    return f" Did you mean {close[0]!r}?" if close else ""
