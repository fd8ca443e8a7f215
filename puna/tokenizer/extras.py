"""What a tokenizer_config.json says that decides no ids: padding, lengths, more special tokens, templates.

Nothing in Puna depends on it. It is carried along for the programs that open a saved directory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from puna.errors import TokenizerError

TEMPLATES = "chat_templates"  # name → text of those that are not the default
SIZE_LIMIT = 1 << 20  # characters of all of it as JSON
_LARGEST = 1e38  # transformers writes 1e30 for "no limit"


def read_extras(config: Mapping[str, Any], templates: Mapping[str, str], origin: str) -> Mapping[str, Any]:
    """What `config` says under the keys of KNOWN, as plain JSON values, and templates with names.

    Raises:
        TokenizerError: a value is of the wrong type, or all are too large.
    """
    found: dict[str, Any] = {}
    for key, (plain, expected) in KNOWN.items():
        value = config.get(key)
        if value in (None, "", [], {}):
            continue
        found[key] = plain(value)
        if found[key] is None:
            raise TokenizerError(f"{origin}: {key} must be {expected}, found {repr(value)[:60]}")
    if templates:
        found[TEMPLATES] = dict(templates)
    if len(json.dumps(found)) > SIZE_LIMIT:
        raise TokenizerError(f"{origin}: its settings and templates are longer than {SIZE_LIMIT} characters")
    return found


def token_name(value: Any) -> str | None:
    """A token is written as its name, or as an object that holds it."""
    if isinstance(value, dict):
        value = value.get("content")
    # JSON can spell half a surrogate pair, which no text holds.
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) and value else None


def _side(value: Any) -> str | None:
    return value if value in ("left", "right") else None


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < _LARGEST and not math.isnan(value) else None


def _names(value: Any) -> list[str] | None:
    names = [token_name(item) for item in value] if isinstance(value, list) else [None]
    return [name for name in names if name is not None] if None not in names else None


def _named(value: Any) -> dict[str, str] | list[str] | None:
    """Newer directories give these tokens names, or list them."""
    if not isinstance(value, dict):
        return _names(value)
    names = _names(list(value.values()))
    keys = [key.encode("utf-8", "replace").decode() for key in value]
    return None if names is None else dict(zip(keys, names, strict=True))


KNOWN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "pad_token": (token_name, "the name of a token"),
    "sep_token": (token_name, "the name of a token"),
    "cls_token": (token_name, "the name of a token"),
    "mask_token": (token_name, "the name of a token"),
    "additional_special_tokens": (_names, "a list of tokens"),
    "extra_special_tokens": (_named, "a list of tokens, or tokens by name"),
    "add_eos_token": (_flag, "true or false"),
    "padding_side": (_side, "'left' or 'right'"),
    "truncation_side": (_side, "'left' or 'right'"),
    "model_max_length": (_number, "a number"),
}
