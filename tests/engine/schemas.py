"""JSON schemas, values that they admit, and a straight-line judge that shares nothing with the engine."""

from __future__ import annotations

import datetime
import ipaddress
import math
import re
import uuid
from typing import Any

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["red", "né", 'a"b', 3, None, True]}, "maxItems": 3},
        "home": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "wärme": {"type": "number"}},
            "required": ["zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "home"],
    "additionalProperties": False,
}

SCHEMAS: dict[str, Any] = {
    "any": {"type": "object"},
    "person": PERSON,
    "open": {"type": "object", "properties": {"a": {"type": "integer"}, "\n": {"type": "boolean"}}},
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": ["integer", "null"]},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
                },
                "required": ["value"],
                "additionalProperties": False,
            }
        },
    },
    "either": {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "null"}, "minItems": 2}]},
    "numbers": {
        "type": "array",
        "items": {"type": "number", "exclusiveMinimum": -2.5, "maximum": 7.25},
        "minItems": 1,
        "maxItems": 4,
    },
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 100},
    "formats": {
        "type": "object",
        "properties": {
            "day": {"type": "string", "format": "date"},
            "id": {"type": "string", "format": "uuid"},
            "host": {"type": "string", "format": "ipv4"},
        },
        "required": ["day", "id", "host"],
        "additionalProperties": False,
    },
    "pair": {
        "type": "array",
        "prefixItems": [{"const": "é€🦙"}, {"type": "string", "minLength": 2, "maxLength": 2}],
        "items": False,
        "minItems": 2,
    },
    "merged": {
        "allOf": [
            {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
            {"properties": {"x": {"minimum": 3, "maximum": 4}}, "additionalProperties": {"type": "boolean"}},
        ]
    },
    "keys": {
        "type": "object",
        "patternProperties": {"^n[0-9]$": {"type": "integer"}},
        "additionalProperties": {"type": "string", "maxLength": 3},
    },
}

VALUES: dict[str, list[Any]] = {
    "any": [{}, {"a": {"b": [1, -2.5e-7, 'x\n\t"\\', None, {}]}, "né 🦙": [[], True]}],
    "person": [
        {"name": "Ada", "age": 36, "home": {"zip": "01234"}},
        {"name": 'ö"€\\', "age": 0, "tags": ["né", 'a"b', 3], "home": {"zip": "99999", "wärme": -0.5}},
    ],
    "open": [{}, {"a": 1}, {"a": -7, "\n": True, "b": ["x"], "a ": None}],
    "tree": [{"value": 1, "children": [{"value": None, "children": []}, {"value": -3}]}],
    "either": [True, [None, None, None]],
    "numbers": [[0], [-2.4999, 7.25, 1.5]],
    "multiple": [14, 98],
    "formats": [
        {"day": "2024-02-29", "id": "123e4567-e89b-12d3-a456-426614174000", "host": "127.0.0.1"},
    ],
    "pair": [["é€🦙", "🦙\n"]],
    "merged": [{"x": 3}],
    "keys": [{"n1": 5, "n12": "abc", "": ""}],
}

_TYPES: dict[str, Any] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}


def fits(value: Any, schema: Any, root: Any) -> bool:
    """Whether a schema admits a value; of the keywords, those that SCHEMAS use."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        target = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        if not fits(value, target, root):
            return False
    kinds = schema.get("type", list(_TYPES))
    if not any(_TYPES[kind](value) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        return False
    if "enum" in schema and not any(_same(value, one) for one in schema["enum"]):
        return False
    if "const" in schema and not _same(value, schema["const"]):
        return False
    if "anyOf" in schema and not any(fits(value, one, root) for one in schema["anyOf"]):
        return False
    if not all(fits(value, one, root) for one in schema.get("allOf", [])):
        return False
    if isinstance(value, str):
        return _string_fits(value, schema)
    if isinstance(value, list):
        return _array_fits(value, schema, root)
    if isinstance(value, dict):
        return _object_fits(value, schema, root)
    return isinstance(value, bool) or value is None or _number_fits(value, schema)


def _same(value: Any, other: Any) -> bool:
    return value == other and type(value) is type(other)


def _string_fits(value: str, schema: Any) -> bool:
    if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", math.inf):
        return False
    if "pattern" in schema and not re.search(schema["pattern"], value):
        return False
    readers: dict[str, Any] = {
        "date": datetime.date.fromisoformat,
        "uuid": uuid.UUID,
        "ipv4": ipaddress.IPv4Address,
    }
    if schema.get("format") == "date":
        # llguidance judges the form of a date, and not how many days its month has.
        return re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])", value) is not None
    if "format" in schema:
        readers[schema["format"]](value)  # raises where it is none
    return True


def _number_fits(value: float, schema: Any) -> bool:
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    above, below = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
    unbounded = not schema.keys() & {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
    within = low <= value <= high and above < value < below
    return (unbounded or within) and value % schema.get("multipleOf", value or 1) == 0


def _array_fits(value: list[Any], schema: Any, root: Any) -> bool:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf):
        return False
    first = schema.get("prefixItems", [])
    rest = schema.get("items", True)
    return all(fits(v, first[i] if i < len(first) else rest, root) for i, v in enumerate(value))


def _object_fits(value: dict[str, Any], schema: Any, root: Any) -> bool:
    known, by_pattern = schema.get("properties", {}), schema.get("patternProperties", {})
    for key, item in value.items():
        wanted = [known[key]] if key in known else []
        wanted += [one for pattern, one in by_pattern.items() if re.search(pattern, key)]
        if not all(fits(item, one, root) for one in wanted or [schema.get("additionalProperties", True)]):
            return False
    return set(schema.get("required", [])) <= value.keys()
