"""A tokenizer as a directory that `load` and `transformers.AutoTokenizer` open with the same ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from puna.errors import TokenizerError
from puna.files import disk_errors, write_atomically
from puna.tokenizer import export, extras
from puna.tokenizer.codec import Codec
from puna.tokenizer.tokenizer import Tokenizer


def save(tokenizer: Tokenizer, codec: Codec, directory: Path) -> None:
    """Write tokenizer.json, the original file, and the configuration; the same bytes every time.

    Raises:
        TokenizerError: tokenizer.json cannot express this tokenizer, or a file cannot be written.
        ResourceError: the disk is full.
    """
    files = codec.originals()
    if "tokenizer.json" not in files:
        files["tokenizer.json"] = _dump(codec.definition(), indent=None)
    files["special_tokens_map.json"] = _dump(_token_names(tokenizer), indent=2)
    _write(tokenizer, files, directory)


def save_original(tokenizer: Tokenizer, codec: Codec, directory: Path) -> None:
    """Write the original file alone, and the configuration by which `load` gives the same tokenizer.

    Raises:
        TokenizerError: a file cannot be written.
        ResourceError: the disk is full.
    """
    _write(tokenizer, codec.originals(), directory)


def _write(tokenizer: Tokenizer, files: dict[str, bytes], directory: Path) -> None:
    files["tokenizer_config.json"] = _dump(_config(tokenizer), indent=2)
    advice = "free some space and save again"
    with disk_errors(f"saving the tokenizer to {directory}", directory, TokenizerError, advice):
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_atomically(directory / name, data)


def _config(tokenizer: Tokenizer) -> dict[str, Any]:
    config: dict[str, Any] = {
        "add_bos_token": tokenizer.bos_id is not None,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(token.pop("id")): token for token in export.added_tokens(tokenizer.specials)
        },
        **_token_names(tokenizer),
        **{key: value for key, value in tokenizer.extras.items() if key != extras.TEMPLATES},
        "clean_up_tokenization_spaces": False,
        # This class makes transformers take tokenizer.json as it is, instead of rebuilding it.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    template = _templates(tokenizer)
    return config if template is None else {**config, "chat_template": template}


def _templates(tokenizer: Tokenizer) -> str | list[dict[str, str]] | None:
    """One template as its text, several as a list with names."""
    others = tokenizer.extras.get(extras.TEMPLATES)
    if not others:
        return tokenizer.chat_template
    default = {} if tokenizer.chat_template is None else {"default": tokenizer.chat_template}
    return [{"name": name, "template": text} for name, text in {**default, **others}.items()]


def _token_names(tokenizer: Tokenizer) -> dict[str, str]:
    names = {index: name for name, index in tokenizer.specials.items()}
    roles = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": tokenizer.unk_id}
    return {
        role: names[index] if index in names else tokenizer.piece(index)
        for role, index in roles.items()
        if index is not None
    }


def _dump(value: dict[str, Any], indent: int | None) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=indent) + "\n").encode("utf-8")
