"""API keys: from a file and the environment, compared in constant time, each with limits of its own."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import math
import os
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_IROTH

from puna.errors import SettingsError
from puna.progress import counted

ENVIRONMENT = "PUNA_API_KEYS"
MINUTE = 60.0
COMMENT = re.compile(r"(^|\s)#.*")
SHORT = 16  # characters; a shorter key can be guessed
SOON = 1  # seconds after which one of a key's own requests may have ended

Header = tuple[bytes, bytes]


@dataclass(frozen=True)
class Key:
    """A key by its name; of itself only SHA-256 is kept, so that no dump or message can show it."""

    name: str
    digest: bytes


class Busy(Exception):
    """A key asks too often, or too much at once."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Allowance:
    """What one key, or everyone where there are none, may ask; times are of `time.monotonic`."""

    def __init__(self, per_minute: int | None, at_once: int | None) -> None:
        """None: as much as they like."""
        self._per_minute, self._at_once = per_minute, at_once
        self._taken: deque[float] = deque()
        self._running = 0

    def take(self, now: float) -> None:
        """Count a request in; `give_back` it when it has ended.

        Raises:
            Busy: it is one too many, and does not count.
        """
        while self._taken and self._taken[0] <= now - MINUTE:
            self._taken.popleft()
        if self._per_minute is not None and len(self._taken) >= self._per_minute:
            wait = max(1, math.ceil(self._taken[0] + MINUTE - now))
            raise Busy(
                f"{counted(self._per_minute, 'request')} a minute {_are(self._per_minute)} allowed; "
                f"try again in {counted(wait, 'second')}",
                wait,
            )
        if self._at_once is not None and self._running >= self._at_once:
            raise Busy(
                f"{counted(self._at_once, 'request')} at once {_are(self._at_once)} allowed; "
                "try again when one has ended",
                SOON,
            )
        if self._per_minute is not None:
            self._taken.append(now)
        self._running += 1

    def give_back(self) -> None:
        """A request that was counted in has ended."""
        self._running -= 1


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


class Keys:
    """Who may ask; without any key everybody."""

    def __init__(
        self, keys: Sequence[Key] = (), per_minute: int | None = None, at_once: int | None = None
    ) -> None:
        self._keys = tuple(keys)
        self._everyone = Allowance(per_minute, at_once)
        self._allowances = {key: Allowance(per_minute, at_once) for key in keys}

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, presented: bytes) -> Key | None:
        """The key that a client came with; equally quick for every wrong one."""
        digest = hashlib.sha256(presented).digest()
        found: Key | None = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def allowance(self, key: Key | None) -> Allowance:
        """What a key may ask."""
        return self._everyone if key is None else self._allowances[key]


def read_keys(file: str | None, environment: Mapping[str, str] = os.environ) -> tuple[list[Key], list[str]]:
    """The keys of a file and of the environment, and what is to be said about them.

    Raises:
        SettingsError: the file cannot be read, holds none, or a line of it is no key; a key came twice; the
            setting or the variable is there, and empty.
    """
    # Whoever names a place for keys believes the server closed: it must not be open.
    if file is not None and not file.strip():
        raise SettingsError("api_keys is empty; name a file of keys, or leave it out")
    if ENVIRONMENT in environment and not environment[ENVIRONMENT].strip():
        raise SettingsError(f"{ENVIRONMENT} is set and holds no key; give it one, or unset it")
    lines = [] if file is None else _lines(file)
    text = environment.get(ENVIRONMENT, "")
    parts = [(f"{ENVIRONMENT}, part {n}", part) for n, part in enumerate(text.split(","), 1)] if text else []
    keys = [_key(where, line, f"key-{n}") for n, (where, line) in enumerate([*lines, *parts], 1)]
    _check_unlike(keys)
    return [key for _, key, _ in keys], [*_open_to_all(file), *_short(keys)]


def presented(headers: Iterable[Header], basic: bool) -> bytes | None:
    """The key among a request's headers; None where there is none, or more than one.

    `basic`: a password counts too, so that a browser can ask its user for it.
    """
    given = [value for name, value in headers if name == b"authorization"]
    if len(given) != 1:
        return None
    scheme, _, rest = given[0].partition(b" ")
    if scheme.lower() == b"bearer":
        return rest.strip()
    return _password(rest.strip()) if basic and scheme.lower() == b"basic" else None


def _password(encoded: bytes) -> bytes | None:
    try:
        _, colon, password = base64.b64decode(encoded, validate=True).partition(b":")
    except binascii.Error:
        return None
    return password if colon else None


def _lines(file: str) -> list[tuple[str, str]]:
    """What stands in a file beside blank lines and comments, and where."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"api_keys: {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"api_keys: {file} is no text; expected a key in each line") from None
    lines = [
        (f"{file}, line {n}", COMMENT.sub("", line).strip()) for n, line in enumerate(text.splitlines(), 1)
    ]
    lines = [(where, line) for where, line in lines if line]
    if not lines:
        raise SettingsError(f"api_keys: {file} holds no key; give it a line with one, or leave api_keys out")
    return lines


def _key(where: str, line: str, default_name: str) -> tuple[str, Key, int]:
    """Where a key stands, the key and its length. Messages never quote the line."""
    *names, key = line.split() or [""]
    if not key or len(names) > 1 or not (key.isascii() and key.isprintable()):
        raise SettingsError(
            f"{where}: expected a key of printable ASCII characters, perhaps after a name and white space"
        )
    name = names[0] if names else default_name
    return where, Key(name, hashlib.sha256(key.encode()).digest()), len(key)


def _check_unlike(keys: Iterable[tuple[str, Key, int]]) -> None:
    seen: dict[bytes, str] = {}
    for where, key, _ in keys:
        if key.digest in seen:
            raise SettingsError(f"{where}: the same key as that of {seen[key.digest]}; leave one of them out")
        seen[key.digest] = where


def _open_to_all(file: str | None) -> list[str]:
    if file is None or not Path(file).stat().st_mode & S_IROTH:
        return []
    return [f"{file} holds keys and every user of this machine may read it; chmod 600 closes it"]


def _short(keys: Iterable[tuple[str, Key, int]]) -> list[str]:
    names = [key.name for _, key, length in keys if length < SHORT]
    if not names:
        return []
    return [f"keys of fewer than {SHORT} characters can be guessed: {', '.join(names)}"]
