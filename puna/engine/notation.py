"""What a constraint asks for, in llguidance's own notation and within bounds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from puna.engine import patterns
from puna.engine.params import SamplingParams
from puna.errors import InputError

# Beyond these the library takes seconds and more, unbounded by its own limits.
LONGEST = {"json_schema": 100_000, "regex": 4_000, "grammar": 10_000, "choice": 100_000}  # characters
MOST = {
    "members of an allOf": 16,
    "properties of an object": 1000,
    "remainders of multipleOf": 50_000,
    "intersections": 16,
    "repeats": 100,
}
ESCAPES = '"\\bfnrt'
_COMPACT = {
    "whitespace_flexible": False,
    "whitespace_pattern": None,
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
    "json_allowed_escapes": ESCAPES,
}
_MERGED = {"multipleOf", "$ref", "anyOf", "oneOf"}  # beside each other they hold together, as in an allOf
_FAR = 10**9  # beyond all bounds, and short in a message
_JSON = "%json "
# Last, so that it wins over a grammar's own. Forcing would leave one spelling in tokens where many are right.
_OPTIONS = '\n%llguidance {"no_forcing": true, "allow_invalid_utf8": false}\n'


def described(params: SamplingParams) -> tuple[str, str] | None:
    """What is asked for, in words and as a grammar; None: nothing.

    Raises:
        InputError: it is malformed, or too long or complex to be compiled.
    """
    if params.json_schema is not None:
        return "the JSON schema", f"start: {json_rule(params.json_schema)}{_OPTIONS}"
    if params.regex is not None:
        return "the regular expression", _from_pattern(patterns.translate(_bounded(params.regex, "regex")))
    if params.grammar is not None:
        return "the grammar", _checked_grammar(params.grammar) + _OPTIONS
    if params.choice:
        _bounded("".join(params.choice), "choice")
        return "the choice", _from_pattern("|".join(map(patterns.literal, params.choice)))
    return None


def json_rule(schema: dict[str, Any] | bool) -> str:
    """The piece of a grammar that a JSON schema becomes; True admits any object, as OpenAI's `json_object`.

    References are relative to the schema, wherever in a grammar it stands.

    Raises:
        InputError: it is no schema, or too long or complex to be compiled.
    """
    wanted = {"type": "object"} if schema is True else schema
    if not isinstance(wanted, dict):
        raise InputError(f"expected a JSON schema as an object, or true for any object, got {wanted!r:.80}")
    _check_schema(wanted)
    try:
        text = json.dumps({**wanted, "x-guidance": _COMPACT}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the JSON schema cannot be written as JSON: {error}") from None
    return _JSON + _bounded(text, "json_schema")


def _checked_grammar(grammar: str) -> str:
    """The same; the schemas in it are held to a schema's bounds, what is around them to a grammar's."""
    around, schemas = _parted(grammar)
    _few(around.count("&"), "intersections")
    _few(around.count("{") + around.count("~"), "repeats")
    _bounded(around, "grammar")
    _bounded("".join(schemas), "json_schema")
    parsed = [json.loads(schema) for schema in schemas]
    for schema in parsed:
        _check_schema(schema)
    _few(sum(map(_remainders, parsed)), "remainders of multipleOf")
    return grammar


def _parted(grammar: str) -> tuple[str, list[str]]:
    """A grammar without the JSON schemas in it, and they."""
    first, *others = grammar.split(_JSON)
    around, schemas = [first], []
    for text in others:
        try:
            _, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            end = 0  # malformed, or the words of a text or a comment
        schemas += [text[:end]] if end else []
        around.append(text[end:])
    return _JSON.join(around), schemas


def _from_pattern(pattern: str) -> str:
    return f"start: /(?:{pattern})/{_OPTIONS}"  # an empty one would begin a comment


def _check_schema(schema: Any) -> None:
    for node in _nodes(schema):
        for key, things in (("allOf", "members of an allOf"), ("properties", "properties of an object")):
            if isinstance(node.get(key), list | dict):
                _few(len(node[key]), things)
        least, more = node.get("minProperties"), node.get("additionalProperties", True)
        if isinstance(least, int) and least > 1 and (more is not False or "patternProperties" in node):
            raise InputError(
                "the JSON schema has minProperties above 1, which one key repeated would seem to satisfy; "
                'name the keys in "required", or forbid "additionalProperties"'
            )
    _few(_remainders(schema), "remainders of multipleOf")


def _remainders(schema: Any) -> int:
    """How many of them tell an answer's numbers apart: a state each, all made before it begins."""
    nodes = list(_nodes(schema))
    values = [node.get("multipleOf") for node in nodes]
    found = {_units(value) for value in values if isinstance(value, int | float)}
    if any("allOf" in node or len(node.keys() & _MERGED) > 1 for node in nodes):
        return min(max(sum(found), math.lcm(*found)), _FAR)  # one number may have to fit several of them
    return sum(found)


def _units(value: float) -> int:
    """A number without its point: 0.25 is 25 of the last digit."""
    if isinstance(value, int):
        return min(abs(value), _FAR)
    if not math.isfinite(value):
        return _FAR
    _, digits, exponent = Decimal(str(value)).as_tuple()
    assert isinstance(exponent, int), "only what is no number has another"
    return min(int("".join(map(str, digits))) * 10 ** max(exponent, 0), _FAR)


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in it, itself included."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value


def _bounded(text: str, name: str) -> str:
    if len(text) > LONGEST[name]:
        raise InputError(
            f"{name} has {len(text)} characters; at most {LONGEST[name]} are compiled; shorten it"
        )
    return text


def _few(count: int, things: str) -> None:
    if count > MOST[things]:
        raise InputError(
            f"a constraint has {count} {things}; at most {MOST[things]} are compiled; simplify it"
        )
