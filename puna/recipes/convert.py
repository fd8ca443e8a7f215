"""`puna convert` and `puna verify`: what they print, and what they return."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import puna.tokenizer
from puna import formats
from puna.errors import SettingsError
from puna.formats.convert import convert as write
from puna.formats.proof.verify import VerifySettings, compare
from puna.progress import Track

Say = Callable[[str], None]


_ENDINGS = {".gguf": "gguf", ".bin": "llama2c", ".pt": "llama2c"}


def format_of(destination: Path) -> str:
    """The format that a destination's name asks for.

    Raises:
        SettingsError: it could be any.
    """
    if destination.suffix not in _ENDINGS:
        raise SettingsError(f"{destination}: say which format with --to: {', '.join(formats.FORMATS)}")
    return _ENDINGS[destination.suffix]


def convert(
    source: formats.Source,
    destination: Path,
    to: str,
    settings: dict[str, Any],
    *,
    origin: str,
    tokenizer: Path | None,
    weights_only: bool,
    verify: VerifySettings | None,
    force: bool,
    say: Say,
    track: Track,
) -> dict[str, Any]:
    """Convert, tell what was found and left out, and return the record.

    Raises:
        InputError, CheckFailed: as `puna.formats.convert.convert`.
    """
    chosen = None if tokenizer is None else puna.tokenizer.load(tokenizer)
    done = write(
        source,
        destination,
        to,
        settings,
        tokenizer=chosen,
        weights_only=weights_only,
        verify=verify,
        force=force,
        origin=origin,
        track=track,
    )
    for note in done.notes:
        say(f"note: {note}")
    for line in ["not verified, as asked"] if done.comparison is None else done.comparison.lines():
        say(line)
    for what in done.left_out:
        say(f"left out of the result, and of the comparison: {what}")
    say(f"Written: {destination}")
    return {"path": str(done.path), **done.record}


def verify(
    first: formats.Source, second: formats.Source, settings: VerifySettings, say: Say, track: Track
) -> dict[str, Any]:
    """Compare two models, print the figures and return them.

    Raises:
        ModelError: they cannot be compared.
    """
    comparison = compare(first, second, settings, track)
    for source in (first, second):
        for note in source.notes:
            say(f"note: {source.path}: {note}")
    for line in comparison.lines():
        say(line)
    return comparison.as_dict()
