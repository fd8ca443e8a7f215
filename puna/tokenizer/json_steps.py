"""The steps of a tokenizer.json before any library runs them: how far a text may grow, tables that lie."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from typing import Any

from puna.errors import TokenizerError

ROLES = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
MOST_GROWTH = 256  # times; no published tokenizer's steps can do more than 80, and real text grows threefold
_CHAINS = (("normalizer", "pre_tokenizer"), ("decoder",))  # what a text runs through without a break
_MOST_STEPS, _LONGEST_IN_STEP = 10_000, 10_000  # values of any kind; characters
_PARTS = ("normalizers", "pretokenizers", "decoders")
# Characters that one can become; the worst of NFKC is U+FDFA.
_FACTORS = {
    "NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 2, "BertNormalizer": 24, "ByteLevel": 5,
}  # fmt: skip


def check_steps(document: Mapping[str, Any]) -> None:
    """Refuse steps without end, steps that make long texts of short ones, and damaged tables.

    Raises:
        TokenizerError: the document has such a step.
    """
    for role in ROLES:
        _refuse_endless(document.get(role), role)
    for chain in _CHAINS:
        size = 1.0
        for role in chain:
            for step in _flat(document.get(role)):
                size = _grown(step, size)
                if size > MOST_GROWTH:
                    longer = f"more than {MOST_GROWTH} times as long"
                    raise TokenizerError(f"not a tokenizer.json: its {role} can make a text {longer}")


def _refuse_endless(value: Any, role: str) -> None:
    waiting, seen = [value], 0
    while waiting:
        item = waiting.pop()
        seen += 1
        if seen > _MOST_STEPS or (isinstance(item, str) and len(item) > _LONGEST_IN_STEP):
            raise TokenizerError(f"not a tokenizer.json: its {role} has too many steps or too long texts")
        if isinstance(item, dict):
            waiting += [part for name, part in item.items() if name != "precompiled_charsmap"]
        elif isinstance(item, list):
            waiting += item


def _flat(step: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a role in their order, however deep the sequences are."""
    waiting = [step]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting += reversed(item)
        elif isinstance(item, dict):
            yield item
            waiting += [item[name] for name in _PARTS if name in item]


def _grown(step: Mapping[str, Any], size: float) -> float:
    """The most characters that `size` of them become; told by fields, as old files do not name types."""
    kind = step.get("type")
    size *= _FACTORS.get(kind, 1) if isinstance(kind, str) else 1
    if "precompiled_charsmap" in step:
        size *= _longest_replacement(step["precompiled_charsmap"])
    if "replacement" in step:
        size *= 2  # Metaspace puts one character before each stretch
    if isinstance(prefix := step.get("prepend"), str):
        size += len(prefix)
    if isinstance(content := step.get("content"), str) and "pattern" in step:
        size *= _replaced(step["pattern"], content)
    return size


def _replaced(pattern: Any, content: str) -> float:
    """A text is replaced as a whole; a regular expression may match between any two characters too."""
    text = pattern.get("String") if isinstance(pattern, dict) else None
    return max(1.0, len(content) / len(text)) if isinstance(text, str) and text else 1.0 + len(content)


def _longest_replacement(table: Any) -> int:
    """Characters in the longest text of SentencePiece's table: the size of a trie, the trie, texts with NUL.

    Raises:
        TokenizerError: the table holds less than it says.
    """
    try:
        data = base64.b64decode(table, validate=True)
        size = int.from_bytes(data[:4], "little")
        if len(data) < 8 or not 0 < size <= len(data) - 4 or size % 4:
            raise ValueError
        return max(1, *map(len, data[4 + size :].decode("utf-8").split("\0")))
    except (TypeError, ValueError, binascii.Error):
        raise TokenizerError("not a tokenizer.json: its precompiled_charsmap is damaged") from None
