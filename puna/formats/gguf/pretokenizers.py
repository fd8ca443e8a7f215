"""How byte-level vocabularies cut text before merging, by the names that llama.cpp has for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from puna.tokenizer.tiktoken_reader import PATTERN as LLAMA3

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Pretokenizer:
    """One way to cut.

    Attributes:
        pattern: what a stretch is; the library's own for GPT-2.
        digits: whether every digit is first cut off for itself.
        whole_words: whether a stretch that is a token is taken before any merge is tried.
        begins_with_bos: whether BOS is added where the file does not say.
    """

    pattern: str
    digits: bool = False
    whole_words: bool = False
    begins_with_bos: bool = False

    def definition(self) -> dict[str, Any]:
        """The pre-tokenizer of a tokenizer.json."""
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        if self.pattern == _GPT2:
            steps: list[dict[str, Any]] = [{**byte_level, "use_regex": True}]
        else:
            split = {"type": "Split", "pattern": {"Regex": self.pattern}}
            steps = [{**split, "behavior": "Isolated", "invert": False}, {**byte_level, "use_regex": False}]
        if self.digits:
            steps.insert(0, {"type": "Digits", "individual_digits": True})
        return {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0]


_LLAMA3 = Pretokenizer(LLAMA3, whole_words=True, begins_with_bos=True)
_SMOLLM = Pretokenizer(_GPT2, digits=True)

PRETOKENIZERS = {  # the first name of each is the one written
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "gpt-2": Pretokenizer(_GPT2),
    "smollm": _SMOLLM,
}


def name_of(document: Mapping[str, Any]) -> str | None:
    """What llama.cpp calls the way in which a tokenizer.json cuts text; None where it has no name here."""
    whole_words = bool(document["model"].get("ignore_merges"))
    steps = _bare(document.get("pre_tokenizer"))
    for name, known in PRETOKENIZERS.items():
        if whole_words == known.whole_words and steps == _bare(known.definition()):
            return name
    return None


def _bare(step: Any) -> Any:
    """A pre-tokenizer without what does not bear on ids, with defaults filled in."""
    if not isinstance(step, dict):
        return None
    if step.get("type") == "Sequence":
        return [part for inner in step.get("pretokenizers", []) for part in _bare(inner) or [None]]
    if step.get("type") == "ByteLevel":
        return [("ByteLevel", step.get("add_prefix_space", True), step.get("use_regex", True))]
    if step.get("type") == "Split" and step.get("behavior") in ("Isolated", "isolated"):
        return [("Split", (step.get("pattern") or {}).get("Regex"), bool(step.get("invert")))]
    if step.get("type") == "Digits":
        return [("Digits", bool(step.get("individual_digits")))]
    return [step]
