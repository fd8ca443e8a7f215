"""Error messages without what somebody wrote: only Puna's own names are left between quotes."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from functools import cache
from typing import Any

from puna.engine.settings import EngineSettings
from puna.serve.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from puna.serve.settings import ServeSettings

MASK = "'…'"
# Whose names an operator must see to mend a client, or the settings; they stand in no prompt.
NAMED = re.compile(r"(unknown field |is not called |pages of )$")
LONGEST = 4000  # characters of a message; a path has more
FAR = 20  # characters before a quote that are looked at
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,40}|https?://[A-Za-z0-9_.:\[\]-]{1,80}|[0-9.:]{1,40}")
# A quote after a letter is an apostrophe, but for those of bytes; one that is cut off goes on to the end.
QUOTED = re.compile(
    r"""(?:(?<!\w)|(?<=\bb))(?P<quote>['"])(?P<text>(?:(?!(?P=quote))[^\\]|\\.)*)(?:(?P=quote)|\\?$)"""
    r"|,? got .*",
    re.DOTALL,
)


def without_values(message: str, own: Container[str] = ()) -> str:
    """An error message without what it quotes of a request, which may be what somebody wrote.

    `own` are names beside those of fields, choices and settings that may be seen: the served model's.

    >>> without_values("'temperature': expected a number, got 'my secret'")
    "'temperature': expected a number"
    >>> without_values("tool 'my secret' is not there")
    "tool '…' is not there"
    """
    message = message[:LONGEST]  # what was cut off from a quoted text is masked with it

    def shown(found: re.Match[str]) -> str:
        text = found["text"]
        if text is None:
            return ""
        before = message[max(0, found.start() - FAR) : found.start()]
        named = NAMED.search(before) is not None and NAME.fullmatch(text) is not None
        return found[0] if named or text in own or _is_ours(text) else MASK

    return QUOTED.sub(shown, message)


def _is_ours(text: str) -> bool:
    """Whether it is a name of the API or of the settings, or leads to one: messages.0.content."""
    first, *more = text.split(".")
    return first in known_names() and all(part in known_names() or part.isdigit() for part in more)


@cache
def known_names() -> frozenset[str]:
    """The fields of requests, the choices they offer, and the settings."""
    shapes = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
    fields = (name for shape in shapes for name in _names(shape.model_json_schema()))
    return frozenset((*fields, *ServeSettings.model_fields, *EngineSettings.model_fields))


def _names(schema: Any) -> Iterator[str]:
    """What a JSON schema calls properties and choices, at any depth."""
    if isinstance(schema, list):
        for item in schema:
            yield from _names(item)
    elif isinstance(schema, dict):
        properties = schema.get("properties", {})
        yield from properties
        choices = (*schema.get("enum", ()), schema.get("const"))
        yield from (choice for choice in choices if isinstance(choice, str))
        for item in (*properties.values(), *(v for key, v in schema.items() if key != "properties")):
            yield from _names(item)
