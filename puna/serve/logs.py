"""What a server says on standard error: a line for each request, as JSON or text; no keys, no prompts."""

from __future__ import annotations

import json
import logging
import queue
import re
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Container
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from puna.errors import printable
from puna.serve.masks import without_values
from puna.serve.record import Record

Format = Literal["text", "json"]

WAITING = 10_000  # lines that may wait for a slow reader; beyond them lines are left out, and told
LAST_SECONDS = 2.0  # that the last lines may take to be written
LONGEST = 1000  # characters of a path or message
PLAIN = re.compile(r"[!#-&(-~]+")  # can stand in a line of words without quotes


class Log:
    """Writes lines on a thread of its own: a reader of standard error that stops reading stops no answer."""

    def __init__(
        self,
        kind: Format,
        prompts: bool = False,
        stream: TextIO | None = None,
        names: Container[str] = (),
    ) -> None:
        """`prompts`: whether what was asked and answered is written too; `names` are the model's."""
        self.kind, self._prompts, self._stream, self._names = kind, prompts, stream or sys.stderr, names
        self._lines: queue.Queue[str | None] = queue.Queue(WAITING)
        self._left_out = 0
        self._thread = threading.Thread(target=self._write, name="puna-log", daemon=True)
        self._thread.start()

    def request(self, record: Record, client: str | None = None) -> None:
        """An HTTP request has ended; `client` is the address it came from."""
        facts = {
            "id": record.id,
            "key": record.key,
            "client": client,
            "method": record.method,
            "path": printable(record.path, LONGEST),
            "route": record.route,
            "status": record.status,
            "seconds": _rounded(time.monotonic() - record.arrived),
            "stream": record.stream or None,
            "prompt_tokens": record.prompt_tokens or None,
            "completion_tokens": record.completion_tokens or None,
            "finish_reasons": dict(Counter(record.finish_reasons)) or None,
            "queue_seconds": _rounded(record.queued),
            "first_token_seconds": _rounded(record.first_token),
            "gone": record.gone or None,
            "error": None if record.error is None else self._error(record.error),
        }
        if self._prompts:
            facts |= {"prompt": record.prompt, "answer": record.answer}
        self._put("error" if (record.status or 0) >= 500 else "info", "request", facts)

    def say(self, message: str, level: str = "info") -> None:
        """Something about the server itself."""
        self._put(level, "server", {"message": printable(message, LONGEST)})

    def fault(self, error: BaseException, id: str | None = None, what: str = "") -> None:
        """An error that is ours, with where it came from; `id` of the request that met it."""
        frames = "".join(traceback.format_tb(error.__traceback__))
        message = f"{what}{': ' if what else ''}{type(error).__name__}: {self._error(str(error))}"
        self._put("error", "fault", {"id": id, "message": message, "traceback": frames})

    def close(self) -> None:
        """Write what is left, within bounds."""
        try:
            self._lines.put(None, timeout=LAST_SECONDS)
        except queue.Full:
            return
        self._thread.join(LAST_SECONDS)

    def _error(self, message: str) -> str:
        return printable(message if self._prompts else without_values(message, self._names), LONGEST)

    def _put(self, level: str, event: str, facts: dict[str, Any]) -> None:
        known = {name: value for name, value in facts.items() if value is not None}
        line = LINES[self.kind](datetime.now(UTC), level, event, known)
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._left_out += 1

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            left_out, self._left_out = self._left_out, 0
            if left_out:
                facts = {"message": f"{left_out:,} lines were left out: nobody read them in time"}
                line += LINES[self.kind](datetime.now(UTC), "warning", "server", facts)
            try:
                self._stream.write(line)
                self._stream.flush()
            except (OSError, ValueError):  # the reader left, or the stream is closed: answers go on
                continue


class LogHandler(logging.Handler):
    """What the libraries below say, as lines of ours."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Pass it on."""
        if record.exc_info and record.exc_info[1] is not None:
            self._log.fault(record.exc_info[1], what=printable(record.getMessage(), LONGEST))
        else:
            self._log.say(record.getMessage(), record.levelname.lower())


def _json_line(at: datetime, level: str, event: str, facts: dict[str, Any]) -> str:
    head = {"time": at.isoformat(timespec="milliseconds"), "level": level, "event": event}
    # In ASCII: no character of a path or a header can end the line, or turn the direction of writing.
    return json.dumps({**head, **facts}, default=str) + "\n"


def _text_line(at: datetime, level: str, event: str, facts: dict[str, Any]) -> str:
    clock = at.astimezone().strftime("%H:%M:%S.%f")[:-3]
    trace = facts.pop("traceback", "")
    if event == "request":
        words = [facts.pop("method"), _word(facts.pop("path")), str(facts.pop("status", "gone"))]
        words.append(f"{facts.pop('seconds'):.3f}s")
        facts.pop("route", None)
    else:
        words = [level] if level != "info" else []
        words.append(facts.pop("message"))
    words += [f"{name}={_word(value)}" for name, value in facts.items()]
    return f"{clock} {' '.join(words)}\n{_indented(trace)}"


LINES = {"json": _json_line, "text": _text_line}


def _word(value: Any) -> str:
    """A value as one word without blanks, or between quotes."""
    if isinstance(value, dict):
        value = ",".join(f"{name}:{count}" for name, count in value.items())
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if PLAIN.fullmatch(text) else json.dumps(text)


def _indented(trace: str) -> str:
    """Escaped line by line: the source lines in it are ours, but a file may have any name."""
    return "".join(f"    {printable(line, LONGEST)}\n" for line in trace.splitlines())


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
