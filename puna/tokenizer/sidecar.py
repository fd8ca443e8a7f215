"""What the files beside a tokenizer say: names of special tokens, end tokens, the chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puna.errors import TokenizerError

SIZE_LIMIT = 64 << 20  # bytes


@dataclass(frozen=True)
class Sidecar:
    """Everything is optional; tokens are names, ids where the files give ids."""

    bos: str | None = None
    eos: str | None = None
    unk: str | None = None
    add_bos: bool | None = None
    end_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    added: Mapping[int, str] = field(default_factory=dict)
    special: Mapping[int, bool] = field(default_factory=dict)


def read_sidecar(directory: Path) -> Sidecar:
    """Gather what the directory's configuration files say; later formats win over older ones.

    Raises:
        TokenizerError: a file is there and cannot be read as what its name says.
    """
    config = {**_read(directory / "special_tokens_map.json"), **_read(directory / "tokenizer_config.json")}
    generation = _read(directory / "generation_config.json")
    model = _read(directory / "config.json")
    added = _listed(directory / "added_tokens.json")
    added |= dict(_added_tokens(config, directory / "tokenizer_config.json"))
    add_bos = config.get("add_bos_token")
    return Sidecar(
        bos=_token(config.get("bos_token")),
        eos=_token(config.get("eos_token")),
        unk=_token(config.get("unk_token")),
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        end_ids=_ids(generation.get("eos_token_id", model.get("eos_token_id"))),
        chat_template=_template(config, directory),
        added={index: content for index, (content, _) in added.items()},
        special={index: special for index, (_, special) in added.items()},
    )


def read_text(path: Path) -> str | None:
    """A small text file's content, None where there is none.

    Raises:
        TokenizerError: it is too large, not UTF-8, or cannot be read.
    """
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > SIZE_LIMIT:
            raise TokenizerError(f"{path}: larger than {SIZE_LIMIT >> 20} MiB, which no such file is")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TokenizerError(f"{path}: not UTF-8 text; the file is damaged") from None
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from None


def parse_json(text: str, origin: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        TokenizerError: it is no JSON, or not an object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{origin}: not valid JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{origin}: expected a JSON object, found {type(value).__name__}")
    return value


def _read(path: Path) -> dict[str, Any]:
    text = read_text(path)
    return {} if text is None else parse_json(text, str(path))


def _token(value: Any) -> str | None:
    """A token is written as its name, or as an object that holds it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if isinstance(item, int) and not isinstance(item, bool))


def _added_tokens(config: dict[str, Any], path: Path) -> Iterator[tuple[int, tuple[str, bool]]]:
    table = config.get("added_tokens_decoder", {})
    if not isinstance(table, dict):
        raise TokenizerError(f"{path}: added_tokens_decoder must be an object")
    for key, value in table.items():
        content = _token(value)
        if not (key.isascii() and key.isdigit()) or len(key) > 20 or content is None:
            raise TokenizerError(f"{path}: added_tokens_decoder[{key[:40]!r}] must map an id to a token")
        yield int(key), (content, isinstance(value, dict) and value.get("special") is True)


def _listed(path: Path) -> dict[int, tuple[str, bool]]:
    """added_tokens.json of older directories: tokens and their ids."""
    table = _read(path)
    wrong = next((name for name, index in table.items() if not isinstance(index, int) or not name), None)
    if wrong is not None:
        raise TokenizerError(f"{path}: {wrong!r} must map a token to its id")
    return {index: (name, True) for name, index in table.items()}


def _template(config: dict[str, Any], directory: Path) -> str | None:
    """A template has a file of its own in newer directories; several are a list with names."""
    own = read_text(directory / "chat_template.jinja")
    if own is not None:
        return own
    value = config.get("chat_template", _read(directory / "chat_template.json").get("chat_template"))
    if isinstance(value, list):
        named = (item for item in value if isinstance(item, dict) and item.get("name") == "default")
        value = next((item.get("template") for item in named), None)
    # JSON can spell half a surrogate pair, which no text holds.
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else None
