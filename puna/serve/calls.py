"""An answer's text → the call it is, also while it streams, or plain content."""

from __future__ import annotations

import re
import uuid
from collections.abc import Container, Sequence
from typing import Any

from puna.engine.text import overlap

# As `tools` has calls written, up to their arguments: its pieces in turn, the name between them.
_OPEN, _WITH = '{"name":"', '","parameters":'
_BEGUN = re.compile(rf"[ \n]{{0,2}}{re.escape(_OPEN)}([a-zA-Z0-9_-]+){_WITH}")
_NAMING = re.compile(rf"{re.escape(_OPEN)}[a-zA-Z0-9_-]+")


class ToolCallReader:
    """An answer that may be a call, read while it comes: its text in pieces, deltas of OpenAI's out.

    A delta is {"content": text} or {"tool_calls": [{"index": 0, …}]}. The arguments of all of them joined are
    the call's, to the letter. Content is given without the one of `ends` that it ends with. What begins as a
    call and is cut before its arguments is neither: nothing is given of it, and the reason says "length".
    """

    def __init__(self, ends: Sequence[str] = (), names: Container[str] = (), formed: bool = False) -> None:
        """`formed`: what is no call of one of `names` may be JSON, as `tools` has it; else it is words."""
        self._ends, self._names, self._formed = ends, names, formed
        self._held = ""  # what may still become either, or an end
        self._free = False
        self._arguments: _Object | None = None

    def push(self, text: str) -> list[dict[str, Any]]:
        """What is certain now that the answer goes on by this text."""
        if self._arguments is not None:
            return _argument_deltas(self._arguments.push(text))
        self._held += text
        begun = None if self._free else _BEGUN.match(self._held)
        if begun is not None and (begun[1] in self._names or not self._formed):
            self._arguments = _Object()
            return [_head(begun[1]), *_argument_deltas(self._arguments.push(self._held[begun.end() :]))]
        self._free = self._free or begun is not None or not self._may_be_call()
        return self._content() if self._free else []

    def finish(self, reason: str | None) -> tuple[list[dict[str, Any]], str | None]:
        """What was held back until the end, and why the answer ended.

        "tool_calls" where there is a whole call, else what came.
        """
        if self._arguments is not None:
            return [], "tool_calls" if self._arguments.closed and reason in ("stop", "length") else reason
        cut = not self._free and not self._formed and "{" in self._held
        return ([] if cut or self._held in self._ends else _content_deltas(self._held)), reason

    def _may_be_call(self) -> bool:
        """Whether what is held may go on as a call."""
        text = self._held.lstrip(" \n")
        if not self._formed:
            return text[:1] in ("", "{")
        naming = _NAMING.match(text)
        return _OPEN.startswith(text) if naming is None else _WITH.startswith(text[naming.end() :])

    def _content(self) -> list[dict[str, Any]]:
        """What is held, but for what may be an end."""
        text = self._held
        keep = max((len(end) if text.endswith(end) else overlap(text, end) for end in self._ends), default=0)
        self._held = text[len(text) - keep :]
        return _content_deltas(text[: len(text) - keep])


class _Object:
    """Finds the end of a JSON object."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = self._escaped = False

    @property
    def closed(self) -> bool:
        return self._depth < 0

    def push(self, text: str) -> str:
        """What of it belongs to the object; a call's own brace after it does not."""
        for place, character in enumerate(text):
            if self.closed:
                return text[:place]
            self._step(character)
        return text

    def _step(self, character: str) -> None:
        if self._quoted:
            self._quoted = self._escaped or character != '"'
            self._escaped = not self._escaped and character == "\\"
        elif character == '"':
            self._quoted = True
        elif character in "{[":
            self._depth += 1
        elif character in "]}":
            self._depth = self._depth - 1 or -1


def answer_message(
    reader: ToolCallReader, text: str, reason: str | None
) -> tuple[dict[str, Any], str | None]:
    """A whole answer: its `content`, null beside a call, and a call in `tool_calls`; and why it ended.

    A call that was cut before its arguments leaves an empty `content`.
    """
    deltas = reader.push(text)
    held, reason = reader.finish(reason)
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    if not calls:
        return {"content": "".join(delta["content"] for delta in [*deltas, *held])}, reason
    function = {
        "name": calls[0]["function"]["name"],
        "arguments": "".join(call["function"]["arguments"] for call in calls),
    }
    return {
        "content": None,
        "tool_calls": [{"id": calls[0]["id"], "type": "function", "function": function}],
    }, reason


def _head(name: str) -> dict[str, Any]:
    function = {"name": name, "arguments": ""}
    call = {"index": 0, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
    return {"tool_calls": [call]}


def _argument_deltas(text: str) -> list[dict[str, Any]]:
    return [{"tool_calls": [{"index": 0, "function": {"arguments": text}}]}] if text else []


def _content_deltas(text: str) -> list[dict[str, Any]]:
    return [{"content": text}] if text else []
