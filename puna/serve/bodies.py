"""Bytes of a request → one of the shapes of schema.py, or a refusal that names the field at fault."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from puna.errors import nearest
from puna.serve.faults import BadRequest
from puna.serve.schema import (
    NOT_HERE,
    OTHER_NAMES,
    UNSUPPORTED,
    Body,
    ChatRequest,
    CompletionRequest,
    Contradiction,
)

DEEPEST = 100  # levels: what walks through values recurses, and no conversation or schema needs as many
FAULTS = 3  # told at once
# Of an object, and looked at: a body that is wrong in a million places would hold everybody up for seconds.
MOST_MEMBERS, MOST_FAULTS = 10_000, 500
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # half of a surrogate pair, or one that stands alone
# What pydantic's kinds of fault expect, in the words of JSON.
_EXPECTED = {
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "none_required": "null",
    "string_too_short": "text that is not empty",
    "too_short": "a list that is not empty",
    "too_long": "at most {max_length} items",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
    "string_pattern_mismatch": "text like {pattern}",
    "union_tag_invalid": "an object whose {discriminator} is one of {expected_tags}",
    "union_tag_not_found": "an object with {discriminator}",
}
PATHS: dict[type[Body], str] = {ChatRequest: "/v1/chat/completions", CompletionRequest: "/v1/completions"}
CLOSE = 0.75  # of names: farther ones are not meant
_PROMPT = "text, a list of token ids, or a list of either"
_WRONG_KIND = ("literal_error", "union_tag_invalid", "union_tag_not_found")
B = TypeVar("B", bound=Body)


def parse_body(shape: type[B], raw: bytes) -> tuple[B, dict[str, Any]]:
    """A request's body as its shape, and as the plain values it had.

    Raises:
        BadRequest: it is no JSON object, or does not fit the shape.
    """
    values = _object(raw)
    try:
        return shape.model_validate(values), values
    except ValidationError as error:
        raise _refusal(shape, values, error) from None


def _object(raw: bytes) -> dict[str, Any]:
    if not raw.strip():
        raise BadRequest("expected a JSON object as the request's body, got an empty one")
    try:
        text = raw.decode("utf-8")
        values = json.loads(text, object_pairs_hook=_pairs, parse_float=_finite, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise BadRequest("the request's body is not UTF-8; JSON is") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise BadRequest(f"the request's body is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise BadRequest(f"expected a JSON object as the request's body, got {_shown(values)}")
    if raw.count(b"[") + raw.count(b"{") > DEEPEST:
        _check_depth(values)
    if _HALF.search(raw):
        _check_text(values)
    return values


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MOST_MEMBERS:
        raise BadRequest(
            f"an object of the request has {len(pairs):,} members; leave out all above {MOST_MEMBERS:,}"
        )
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRequest(f"the field {twice!r} is given twice; leave one")
    return values


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text:.40} is too large")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def _check_depth(values: Any) -> None:
    layer = [values]
    for _ in range(DEEPEST):
        layer = [inner for item in layer for inner in _inner(item) if isinstance(inner, dict | list)]
        if not layer:
            return
    raise _too_deep()


def _too_deep() -> BadRequest:
    return BadRequest(
        f"the request's body may hold values {DEEPEST} levels deep, and goes deeper; flatten it"
    )


def _check_text(values: Any) -> None:
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise BadRequest(
            r"a text of the request has half of a surrogate pair (\ud800 to \udfff); write whole characters"
        ) from None


def _inner(value: Any) -> Iterator[Any]:
    yield from value.values() if isinstance(value, dict) else value


def _refusal(shape: type[Body], values: dict[str, Any], error: ValidationError) -> BadRequest:
    if error.error_count() > MOST_FAULTS:
        return BadRequest(
            f"the request's body has {error.error_count():,} faults; /openapi.json has its shape"
        )
    faults = [(_path(values, fault), fault) for fault in error.errors(include_url=False)]
    told: dict[Path, list[Any]] = {}
    for path, fault in _telling(faults):
        told.setdefault(path if path[:1] != ("prompt",) else path[:1], []).append(fault)
    messages = [_message(shape, path, at_path) for path, at_path in told.items()]
    path, (first, *_) = next(iter(told.items()))
    return BadRequest("; ".join(messages[:FAULTS]), ".".join((*path, *_blamed(first))) or None)


def _blamed(fault: Any) -> Path:
    """The field that contradicts another, below the object which has both."""
    error = fault.get("ctx", {}).get("error")
    return (error.param,) if isinstance(error, Contradiction) else ()


Path = tuple[str, ...]


def _path(values: Any, fault: Any) -> Path:
    """The names and numbers that lead to what is at fault, without the unions' own marks between them."""
    path: list[str] = []
    location: tuple[int | str, ...] = fault["loc"]
    for part in location:
        if part in _members(values):
            values = values[part]
        elif fault["type"] != "missing" or part is not location[-1]:
            continue
        path.append(str(part))
    return tuple(path)


def _members(values: Any) -> Container[Any]:
    if isinstance(values, dict):
        return values
    return range(len(values)) if isinstance(values, list) else ()


def _telling(faults: list[tuple[Path, Any]]) -> list[tuple[Path, Any]]:
    """Those worth telling: of a union's members, the ones that got furthest; of a wrong kind, only that."""
    inner = [
        (path, fault)
        for path, fault in faults
        if not any(other[: len(path)] == path and len(other) > len(path) for other, _ in faults)
    ]
    wrong = {path[:-1] for path, fault in inner if fault["type"] in _WRONG_KIND and path[-1:] == ("type",)}
    return [(path, fault) for path, fault in inner if path[:-1] not in wrong or path[-1] == "type"]


def _message(shape: type[Body], path: Path, faults: list[Any]) -> str:
    """What is wrong at a path; of a union, what each member expected."""
    name, fault = ".".join(path), faults[0]
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    if len(path) == 1 and path[0] in UNSUPPORTED and path[0] in shape.model_fields:
        return f"{name!r} is not supported here; leave it out"
    if fault["type"] == "extra_forbidden":
        return f"unknown field {name!r}.{_instead(shape, path)}"
    if fault["type"] == "missing":
        return f"{name!r} is required"
    expected = _PROMPT if path == ("prompt",) else " or ".join(dict.fromkeys(map(_expected, faults)))
    if path[0] == "logit_bias" and fault["type"] == "string_pattern_mismatch":
        expected = "token ids in digits as keys"
    return f"{name!r}: expected {expected}, got {_got(fault)}"


def _instead(shape: type[Body], path: Path) -> str:
    """What to do with a field that is not known where it is."""
    name = path[-1]
    if len(path) == 1 and shape in PATHS:
        if name in OTHER_NAMES:
            return f" What is meant is {OTHER_NAMES[name]!r} here."
        if name in NOT_HERE:
            return " There is nothing like it here; leave it out."
        others = [p for s, p in PATHS.items() if name in s.model_fields and name not in UNSUPPORTED]
        if others:
            return f" That is a field of {others[0]}; leave it out here."
    return nearest(name, _names(shape, path[:-1]), CLOSE) or " Leave it out."


def _got(fault: Any) -> str:
    """What came; of an object that is of no known kind, that kind."""
    value, kind = fault["input"], fault.get("ctx", {}).get("discriminator", "").strip("'")
    if kind and isinstance(value, Mapping) and value:
        return _shown(value[kind]) if kind in value else "one without it"
    return _shown(value)


def _expected(fault: Any) -> str:
    words = _EXPECTED.get(fault["type"])
    return words.format(**fault.get("ctx", {})) if words is not None else str(fault["msg"])


def _names(shape: type[BaseModel], path: Path) -> list[str]:
    """The fields known at a path; of a union, all its members'."""
    shapes = [shape]
    for part in path:
        if not part.isdigit():
            fields = [s.model_fields[part].annotation for s in shapes if part in s.model_fields]
            shapes = [inner for annotation in fields for inner in _shapes(annotation)]
    return [info.alias or name for s in shapes for name, info in s.model_fields.items()]


def _shapes(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _shapes(argument)


def _shown(value: Any) -> str:
    """A value as JSON has it, briefly."""
    if isinstance(value, Mapping | list) and value:
        return "an object" if isinstance(value, Mapping) else "a list"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
