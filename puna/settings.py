"""Strict settings: frozen pydantic models filled from TOML and `key=value`.

An unknown key is an error that offers the nearest valid name. Every field belongs to one of three
classes, which decide whether a run may be resumed after it changed:

- meaning (the default): another value gives another result; refused on resume unless allowed;
- layout: the same result up to rounding (processes, micro-batch, threads); allowed and logged;
- neutral: the same result (intervals, names); allowed.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import tomli_w
from pydantic.fields import FieldInfo

from puna.errors import SettingsError, nearest

Kind = Literal["meaning", "layout", "neutral"]
S = TypeVar("S", bound="Settings")


_PARTS = re.compile(r"""'[^']*'|"[^"]*"|[^.]+""")  # of a dotted key, as TOML writes it
BYTES = re.compile(r"(\d+(?:\.\d+)?) ?([kmgt]?)(i?)b", re.IGNORECASE)


def _byte_count(value: Any) -> Any:
    """What a text such as 2GB or 512MiB stands for; other values as they are."""
    if not isinstance(value, str):
        return value
    found = BYTES.fullmatch(value.strip())
    if found is None:
        raise ValueError(f"expected bytes as a number, or such as 2GB or 512MiB, got {value!r}")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " "))


Bytes = Annotated[int, pydantic.BeforeValidator(_byte_count)]
"""A number of bytes; 2GB, 512MiB and their like are taken too."""


class Settings(pydantic.BaseModel):
    """Base of all settings: immutable, no type coercion, unknown keys refused, numbers finite."""

    model_config = pydantic.ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        protected_namespaces=(),
        validate_default=True,
        allow_inf_nan=False,
    )


def layout(default: Any, **constraints: Any) -> Any:
    """A field that changes results by rounding only."""
    return pydantic.Field(default, json_schema_extra={"resume": "layout"}, **constraints)


def neutral(default: Any, **constraints: Any) -> Any:
    """A field that does not change results."""
    return pydantic.Field(default, json_schema_extra={"resume": "neutral"}, **constraints)


@dataclass(frozen=True)
class Difference:
    """One setting whose value changed; `key` is dotted, values are None where absent."""

    key: str
    old: Any
    new: Any
    kind: Kind

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} → {self.new!r}"


def read_settings(cls: type[S], path: Path | None = None, overrides: Sequence[str] = ()) -> S:
    """Settings from a TOML file and `key.sub=value` overrides, later ones winning.

    Raises:
        SettingsError: the file cannot be read or parsed, a key is unknown, or a value is wrong.
    """
    values = overridden({} if path is None else read_toml(path), overrides)
    origin = str(path) if path is not None else "settings"
    return parse(cls, values, f"{origin} with {' '.join(overrides)}" if path and overrides else origin)


def overridden(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Plain values, changed in place by `key.sub=value`, later ones winning.

    Raises:
        SettingsError: an override is no assignment, or goes through a value that is no table.
    """
    for override in overrides:
        _apply_override(values, override)
    return values


def parse(cls: type[S], values: Mapping[str, Any], origin: str = "settings") -> S:
    """Validate plain values; `origin` names where they came from in the message.

    Raises:
        SettingsError: in one line, every fault found.
    """
    try:
        return cls.model_validate(values)
    except pydantic.ValidationError as error:
        faults = "; ".join(dict.fromkeys(_explain(cls, fault) for fault in error.errors()))
        raise SettingsError(f"{origin}: {faults}") from None


def to_toml(settings: Settings) -> str:
    """The settings as TOML; fields that are None are left out, since TOML has no null."""
    return tomli_w.dumps(_without_none(settings.model_dump(mode="json")))


def differences(old: Settings, new: S) -> list[Difference]:
    """Every setting in which two resolved settings of one class differ, by dotted key."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        Difference(
            key, before.get(key, (None,))[0], after.get(key, (None,))[0], (after.get(key) or before[key])[1]
        )
        for key in {**before, **after}
        if before.get(key, (None,))[0] != after.get(key, (None,))[0]
    ]


def _leaves(
    settings: Settings, prefix: str = "", inherited: Kind = "meaning"
) -> Iterator[tuple[str, tuple[Any, Kind]]]:
    for name, info in type(settings).model_fields.items():
        value, kind = getattr(settings, name), _kind(info, inherited)
        if isinstance(value, Settings):
            yield from _leaves(value, f"{prefix}{name}.", kind)
        else:
            yield f"{prefix}{name}", (value, kind)


def _kind(info: FieldInfo, inherited: Kind) -> Kind:
    extra = info.json_schema_extra
    declared = extra.get("resume") if isinstance(extra, dict) else None
    return declared if declared in ("layout", "neutral") else inherited  # type: ignore[return-value]


def read_toml(path: Path) -> dict[str, Any]:
    """The plain values of a TOML file.

    Raises:
        SettingsError: it cannot be read or parsed.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such settings file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise SettingsError(f"expected key=value, got {override!r}")
    *parents, last = (part.strip("'\"") for part in _PARTS.findall(key) or [key])
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise SettingsError(f"{key}: {parent!r} is a value, not a table")
    values[last] = _parse_value(text)


def _parse_value(text: str) -> Any:
    """A TOML value, or JSON; or the text itself, so that `name=demo` needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return _json_or_text(text)


def _json_or_text(text: str) -> Any:
    """An object or a list as JSON writes it; anything else is text."""
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _explain(cls: type[Settings], fault: Any) -> str:
    """One validation fault as a clause: the dotted key, what was expected, what came."""
    location = [str(part) for part in fault["loc"]]
    key = ".".join(location) or "settings"
    if fault["type"] == "extra_forbidden":
        names = _field_names(cls, location[:-1])
        near = nearest(location[-1], names)
        return f"unknown setting {key!r}.{near or ' Settings here: ' + ', '.join(names)}"
    if fault["type"] == "missing":
        return f"{key!r} is required"
    if fault["type"] == "model_type":
        inner = ", ".join(f"{key}.{name}" for name in _field_names(cls, location))
        return f"{key!r} is a group of settings, got {fault['input']!r}; give one of them: {inner}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return message if key == "settings" else f"{key!r}: {message}"
    return f"{key!r}: {message[0].lower()}{message[1:]}, got {fault['input']!r}"


def _field_names(cls: type[Settings], path: Sequence[str]) -> list[str]:
    """The valid names at a dotted path; members of unions are gathered together."""
    classes: list[type[Settings]] = [cls]
    for part in path:
        fields = [c.model_fields[part].annotation for c in classes if part in c.model_fields]
        # A tagged union puts the tag into the location: it selects no field, the members stay.
        classes = [member for annotation in fields for member in _settings_in(annotation)] or classes
    return [name for c in classes for name in c.model_fields]


def _settings_in(annotation: Any) -> Iterator[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _settings_in(argument)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
