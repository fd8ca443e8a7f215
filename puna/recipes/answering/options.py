"""What the command line says about sampling and the engine, checked before a model is opened."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.engine.params import SamplingParams
from puna.engine.settings import EngineSettings
from puna.errors import SettingsError
from puna.settings import overridden, parse


@dataclass(frozen=True)
class SamplingOptions:
    """Fields of SamplingParams as they were given, the others left to their defaults; and the engine's."""

    sampling: dict[str, Any]
    engine: EngineSettings


def sampling_options(
    given: Mapping[str, Any],
    changes: Sequence[str] = (),
    *,
    json_schema: str | None = None,
    grammar: Path | None = None,
    several: bool = True,
) -> SamplingOptions:
    """Options, `key=value` changes (`engine.` begins the engine's), and constraints that files may hold.

    `several`: whether more than one answer to a prompt may be asked for.

    Raises:
        SettingsError: an impossible or unknown setting, or a file that cannot be read.
    """
    values = dict(given)
    if json_schema is not None:
        values["json_schema"] = _schema(json_schema)
    if grammar is not None:
        values["grammar"] = _text(grammar, "--grammar")
    values = overridden(values, changes)
    engine = values.pop("engine", {})
    if not isinstance(engine, dict):
        raise SettingsError(f"engine is a table: write engine.key=value, got engine={engine!r}")
    params = parse(SamplingParams, values, "sampling", beside={"engine": EngineSettings})
    if not several:
        refuse_several(params)
    return SamplingOptions(values, parse(EngineSettings, engine, "engine"))


def chosen_seed(given: int | None) -> int:
    """The seed that was given, or a new one: so an answer's record can always say how it was made."""
    return secrets.randbits(32) if given is None else given


def seed_of(first: int, number: int) -> int:
    """The seed of prompt, line or answer `number`, counted from 1: each can be made again alone."""
    return (first + number - 1) % 2**63


def refuse_several(params: SamplingParams) -> None:
    """Raises SettingsError where more than one answer is asked for, which a conversation has no place for."""
    if params.answers > 1:
        raise SettingsError("n and best_of must be 1 in a conversation, whose next answer is one; see /retry")


def _schema(text: str) -> Any:
    """A JSON schema given as it is, or the one in a file."""
    inline = text.lstrip().startswith("{") or text.strip() in ("true", "false")
    source = text if inline else _text(Path(text), "--json-schema")
    try:
        return json.loads(source)
    except (ValueError, RecursionError) as error:
        where = "--json-schema" if inline else text
        raise SettingsError(f"{where}: not valid JSON: {error}") from None


def _text(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise SettingsError(f"{option}: {path} is not UTF-8") from None
    except OSError as error:
        raise SettingsError(f"{option}: {path} cannot be read: {error.strerror}") from None
