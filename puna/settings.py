"""Strict settings: frozen pydantic models filled from TOML and `key=value`.

An unknown key is an error that offers the nearest valid name, wherever it stands. Every field belongs to one
of four classes, which decide whether a run may be resumed after it changed:

- meaning (the default): another value gives another result; refused on resume unless allowed;
- fixed: the state that a run saves fits no other value; always refused on resume;
- layout: the same result up to rounding (processes, micro-batch, threads); allowed and logged;
- neutral: the same result (intervals, names); allowed.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import pydantic
import tomli_w
from pydantic.fields import FieldInfo

from puna.errors import SettingsError

Kind = Literal["meaning", "fixed", "layout", "neutral"]
S = TypeVar("S", bound="Settings")
CLOSE = 0.6  # from this likeness on (1 is the same) a name may be what was meant
OFFERED = 3  # names at most

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


def fixed(default: Any, **constraints: Any) -> Any:
    """A field that decides what the state of a run is made of."""
    return pydantic.Field(default, json_schema_extra={"resume": "fixed"}, **constraints)


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


def parse(
    cls: type[S],
    values: Mapping[str, Any],
    origin: str = "settings",
    beside: Mapping[str, type[Settings]] | None = None,
) -> S:
    """Validate plain values.

    Args:
        cls: what they are to become.
        values: nested tables.
        origin: where they came from, for the message.
        beside: groups that stand at the same place and are parsed apart: an unknown name may be theirs.

    Raises:
        SettingsError: in one line, every fault found.
    """
    try:
        return cls.model_validate(values)
    except pydantic.ValidationError as error:
        faults = "; ".join(dict.fromkeys(_explain(cls, fault, beside or {}) for fault in error.errors()))
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
    return declared if declared in ("fixed", "layout", "neutral") else inherited  # type: ignore[return-value]


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


def _explain(cls: type[Settings], fault: Any, beside: Mapping[str, type[Settings]]) -> str:
    """One validation fault as a clause: the dotted key, what was expected, what came."""
    location = [str(part) for part in fault["loc"]]
    key = ".".join(location) or "settings"
    if fault["type"] == "extra_forbidden":
        return f"unknown setting {key!r}.{_instead(cls, location, beside)}"
    if fault["type"] == "missing":
        return f"{key!r} is required"
    if fault["type"] == "model_type":
        _, names = _group(cls, location)
        inner = ", ".join(f"{key}.{name}" for name in names)
        return f"{key!r} is a group of settings, got {fault['input']!r}; give one of them: {inner}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return message if key == "settings" else f"{key!r}: {message}"
    return f"{key!r}: {message[0].lower()}{message[1:]}, got {fault['input']!r}"


def _instead(cls: type[Settings], location: Sequence[str], beside: Mapping[str, type[Settings]]) -> str:
    """What may have been meant by an unknown name: one of its group, or the same in another; or the group."""
    group, names = _group(cls, location[:-1])
    here = {f"{group}{name}": name for name in names}
    others = [*_dotted(cls), *(f"{at}.{name}" for at, part in beside.items() for name in _dotted(part))]
    known = here | {dotted: dotted.rpartition(".")[2] for dotted in others}
    close = difflib.get_close_matches(location[-1], set(known.values()), n=1, cutoff=CLOSE)
    meant = [dotted for dotted, name in known.items() if name in close]
    offered = [dotted for dotted in meant if dotted in here] or meant[:OFFERED]
    if not offered:
        return f" Settings here: {', '.join(names)}"
    return f" Did you mean {' or '.join(map(repr, offered))}?"


def _group(cls: type[Settings], path: Sequence[str]) -> tuple[str, list[str]]:
    """A group as the beginning of its members' dotted names, and their names; unions' gathered together."""
    classes, prefix = [cls], ""
    for part in path:
        fields = [c.model_fields[part].annotation for c in classes if part in c.model_fields]
        # A tagged union puts the tag into the location: it selects no field, the members stay.
        prefix += f"{part}." if fields else ""
        classes = [member for annotation in fields for member in _settings_in(annotation)] or classes
    return prefix, list(dict.fromkeys(name for c in classes for name in c.model_fields))


def _dotted(cls: type[Settings], prefix: str = "") -> Iterator[str]:
    """Every name that can be set, groups before their members."""
    for name, info in cls.model_fields.items():
        yield f"{prefix}{name}"
        for member in _members(info.annotation):
            yield from _dotted(member, f"{prefix}{name}.")


def _members(annotation: Any) -> Iterator[type[Settings]]:
    """The settings that a field holds by its own name: itself, or as one of a union, not in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated):
        for argument in get_args(annotation):
            yield from _members(argument)


def _settings_in(annotation: Any) -> Iterator[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _settings_in(argument)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
