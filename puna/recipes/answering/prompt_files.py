"""Files of prompts, read line by line: what each line asks for, or what is wrong with it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import zstandard

from puna.data.readers import DECOMPRESSORS, Unreadable, numbered_lines, parse_record
from puna.engine.params import SamplingParams
from puna.errors import DataError, nearest

STANDARD = "-"  # standard input or output
FIELDS = ("id", "prompt", "messages", *SamplingParams.model_fields)
"""What a line of JSON may have."""
MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
"""The first bytes of what is compressed (RFC 1952, RFC 8878), for a stream, which has no name to tell by."""
DEEPEST = 64  # levels of messages: what renders them calls itself for each


@dataclass(frozen=True)
class PromptLine:
    """A line of a file of prompts: `prompt`, text or ids, or the `messages` of a conversation.

    `sampling` are the line's own fields of SamplingParams. Where `fault` says what is wrong with it, it asks
    for nothing.
    """

    number: int
    id: str | int | float | None = None
    prompt: str | list[Any] | None = None
    messages: list[Any] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    fault: str | None = None

    @property
    def named(self) -> dict[str, Any]:
        """Which line it is, as its answer says it."""
        return {"line": self.number, **({} if self.id is None else {"id": self.id})}

    @property
    def asked(self) -> dict[str, Any]:
        """What it asks to be continued, as its answer says it."""
        return {"prompt": self.prompt} if self.messages is None else {"messages": self.messages}


@dataclass(frozen=True)
class Survey:
    """How many lines a file has that are not blank, and the SHA-256 of all of them, in hex."""

    lines: int
    sha256: str


def survey(name: str) -> Survey:
    """Read a file once through.

    Raises:
        DataError: it is missing, of no known kind, or damaged.
    """
    digest, lines = hashlib.sha256(), 0
    with _opened(name) as stream:
        for _, line in numbered_lines(stream):
            lines += 1
            digest.update(line)
    if not lines:
        raise DataError(f"{name} holds no prompts")
    return Survey(lines, digest.hexdigest())


def read_prompts(name: str) -> Iterator[PromptLine]:
    """The lines of a file, in its order; blank ones are passed over, and their numbers too.

    JSON lines, or a .txt file with a prompt in each line; either may be compressed (.gz, .zst). "-" is
    standard input, in JSON lines.

    Raises:
        DataError: the file is missing, of no known kind, or damaged; standard input is something else.
    """
    understand = _text_line if _kind(name) == ".txt" else _json_line
    with _opened(name) as stream:
        begun = name != STANDARD
        for number, line in numbered_lines(stream):
            if not begun and not line.lstrip().startswith(b"{"):
                raise DataError(
                    'standard input must be JSON lines, such as {"prompt": "Once"}; prompts in plain text '
                    "are read from a .txt file, one in each line"
                )
            begun = True
            try:
                yield understand(number, line)
            except Unreadable as fault:
                yield PromptLine(number, fault=str(fault))


def _text_line(number: int, line: bytes) -> PromptLine:
    try:
        return PromptLine(number, prompt=line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8: byte {error.start:,}") from None


def _json_line(number: int, line: bytes) -> PromptLine:
    record = parse_record(line)
    name = record.pop("id", None)
    if not isinstance(name, str | int | float | None) or (
        isinstance(name, float) and not math.isfinite(name)
    ):
        raise Unreadable(f"'id' must be text or a finite number, got {type(name).__name__}")
    return PromptLine(number, name, **_wishes(record))


def _wishes(record: dict[str, Any]) -> dict[str, Any]:
    """A line's prompt or messages, and its sampling; or what is wrong with them, as its fault."""
    prompt, messages = record.pop("prompt", None), record.pop("messages", None)
    unknown = next((key for key in record if key not in FIELDS), None)
    if unknown is not None:
        near = nearest(unknown, FIELDS)
        return {"fault": f"unknown field {unknown!r}.{near or ' Fields: ' + ', '.join(FIELDS)}"}
    if (prompt is None) == (messages is None):
        return {"fault": "a line needs either 'prompt' or 'messages'"}
    fault = _fault_of_prompt(prompt) if messages is None else _fault_of_messages(messages)
    if fault:
        return {"fault": fault}
    return {"prompt": prompt, "messages": messages, "sampling": record}


def _fault_of_prompt(prompt: Any) -> str:
    ids = isinstance(prompt, list) and all(type(item) is int for item in prompt)
    if isinstance(prompt, str) or ids:
        return ""
    held = "a list of something else" if isinstance(prompt, list) else type(prompt).__name__
    return f"'prompt' must be text or a list of token ids, got {held}"


def _fault_of_messages(messages: Any) -> str:
    if not isinstance(messages, list) or not all(isinstance(item, dict) for item in messages):
        return "'messages' must be a list of messages, objects with a role and content"
    return f"'messages' is nested more than {DEEPEST} levels deep" if _is_deeper(messages, DEEPEST) else ""


def _is_deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in inner)


@contextlib.contextmanager
def _opened(name: str) -> Iterator[IO[bytes]]:
    """The bytes of a file as they were before compression."""
    kind = _kind(name)
    if name != STANDARD and kind not in (".jsonl", ".ndjson", ".json", ".txt"):
        raise DataError(
            f"{name}: prompts are read from .jsonl or .txt files, or those compressed (.gz, .zst)"
        )
    shown = "standard input" if name == STANDARD else name
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if name == STANDARD else Path(name).open("rb") as raw:
            suffix = _compression(raw) if name == STANDARD else Path(name).suffix.lower()
            yield DECOMPRESSORS[suffix](raw) if suffix in DECOMPRESSORS else raw
    except OSError as error:
        raise DataError(f"{shown}: cannot be read: {error.strerror or error}") from None
    except (EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{shown}: damaged: {error}") from None


def _compression(stream: IO[bytes]) -> str:
    """The suffix that a file of such bytes would have; they stay to be read."""
    beginning = stream.peek(4) if isinstance(stream, io.BufferedReader) else b""
    return next((suffix for magic, suffix in MAGIC.items() if beginning.startswith(magic)), "")


def _kind(name: str) -> str:
    """The suffix that says what the lines are; a compressed file's is the one before."""
    path = Path(name)
    return Path(path.stem if path.suffix.lower() in DECOMPRESSORS else path.name).suffix.lower()
