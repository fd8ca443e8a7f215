"""A vocabulary of made-up words, for models that have none: every id is text, and text ids."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from puna.tokenizer.export import byte_level

LETTERS = "etaoinshrdlu"


def write_tokenizer(directory: Path, size: int) -> None:
    """Write a tokenizer.json of so many tokens: all bytes, as far as they go, then words after a space.

    It has no special tokens and merges nothing, so that whatever a model with random weights says has a text.
    """
    tokens = list(itertools.islice(itertools.chain(_bytes(), _words()), size))
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    document: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {token: index for index, token in enumerate(tokens)}, "merges": []},
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")


def _bytes() -> Iterator[str]:
    return (byte_level(bytes([byte])) for byte in range(256))


def _words() -> Iterator[str]:
    for length in itertools.count(2):
        for letters in itertools.product(LETTERS, repeat=length):
            yield byte_level(f" {''.join(letters)}".encode())
