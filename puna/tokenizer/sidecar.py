"""What the files beside a tokenizer say: names of special tokens, end tokens, chat templates."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puna.errors import TokenizerError
from puna.tokenizer.codec import VOCABULARY_LIMIT
from puna.tokenizer.extras import read_extras, token_name

SIZE_LIMIT = 64 << 20  # bytes
_DEFAULT = "default"  # the name of the chat template that is meant where none is named
_MORE_TEMPLATES = "additional_chat_templates"


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
    extras: Mapping[str, Any] = field(default_factory=dict)


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
    templates = _templates(config, directory)
    return Sidecar(
        bos=token_name(config.get("bos_token")),
        eos=token_name(config.get("eos_token")),
        unk=token_name(config.get("unk_token")),
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        end_ids=_ids(generation.get("eos_token_id", model.get("eos_token_id"))),
        chat_template=templates.pop(_DEFAULT, None),
        added={index: content for index, (content, _) in added.items()},
        special={index: special for index, (_, special) in added.items()},
        extras=read_extras(config, templates, str(directory / "tokenizer_config.json")),
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


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if isinstance(item, int) and not isinstance(item, bool))


def _added_tokens(config: dict[str, Any], path: Path) -> Iterator[tuple[int, tuple[str, bool]]]:
    table = config.get("added_tokens_decoder", {})
    if not isinstance(table, dict):
        raise TokenizerError(f"{path}: added_tokens_decoder must be an object")
    for key, value in table.items():
        content = token_name(value)
        if not (key.isascii() and key.isdigit()) or len(key) > 20 or content is None:
            raise TokenizerError(f"{path}: added_tokens_decoder[{key[:40]!r}] must map an id to a token")
        yield int(key), (content, isinstance(value, dict) and value.get("special") is True)


def _listed(path: Path) -> dict[int, tuple[str, bool]]:
    """added_tokens.json of older directories: tokens and their ids."""
    added: dict[int, tuple[str, bool]] = {}
    for key, index in _read(path).items():
        name = token_name(key)
        if name is None or type(index) is not int or not 0 <= index < VOCABULARY_LIMIT or index in added:
            raise TokenizerError(f"{path}: {key[:40]!r} must map a token to an id of its own")
        added[index] = (name, True)
    return added


def _templates(config: dict[str, Any], directory: Path) -> dict[str, str]:
    """Chat templates by name; several are a list with names, or files of their own."""
    value = config.get("chat_template", _read(directory / "chat_template.json").get("chat_template"))
    pairs: list[tuple[Any, Any]] = [(_DEFAULT, value)]
    if isinstance(value, list):
        pairs = [(item.get("name"), item.get("template")) for item in value if isinstance(item, dict)]
    files = {path.stem: path for path in sorted((directory / _MORE_TEMPLATES).glob("*.jinja"))}
    if sum(path.stat().st_size for path in files.values() if path.is_file()) > SIZE_LIMIT:
        raise TokenizerError(f"{directory / _MORE_TEMPLATES}: larger than {SIZE_LIMIT >> 20} MiB together")
    files[_DEFAULT] = directory / "chat_template.jinja"
    pairs += [(name, read_text(path)) for name, path in files.items()]
    # JSON can spell half a surrogate pair, which no text holds.
    return {
        name.encode("utf-8", "replace").decode(): text.encode("utf-8", "replace").decode()
        for name, text in pairs
        if isinstance(name, str) and isinstance(text, str)
    }
