"""What one kind of tokenizer file must offer; `Tokenizer` does the rest, once for all kinds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

VOCABULARY_LIMIT = 1 << 22  # ids; tables are made only for vocabularies below it
PLACEHOLDER = "\u2581"  # what SentencePiece writes for a space
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Vocabulary:
    """What every id writes, and which ids mean more than their text.

    Attributes:
        texts: by id, the bytes it adds to a text; a special token's are its name.
        specials: name → id of the tokens that text becomes only on request.
        bos_id, eos_id: what begins and ends a text, None where the tokenizer has no such habit.
        unk_id: what stands for characters that cannot be written; it shows as `texts` says.
        raw: ids that write one raw byte (byte fallback); a leading space among them is real.
        leading_space: how encoding puts a space before a text, for decoding to take it away again:
            before "each" stretch between special tokens, before the "first", or before "none".
        strips: whether decoding takes away that "one" space, or "all" tokens of mere space at the start.
        broken: what decoding shows for bytes that are no UTF-8: U+FFFD for "each" byte (SentencePiece)
            or for each longest "prefix" of a character (tiktoken, tokenizers' byte level).
        parse: per special name, the options of `specials.Pattern`.
    """

    texts: Sequence[bytes]
    specials: Mapping[str, int]
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    raw: frozenset[int]
    leading_space: Literal["each", "first", "none"]
    broken: Literal["each", "prefix"]
    parse: Mapping[str, ParseOptions] = field(default_factory=dict)
    strips: Literal["one", "all"] = "one"


@dataclass(frozen=True)
class ParseOptions:
    """How far a special token reaches when it is looked for in a text (tokenizer.json only)."""

    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class Codec(Protocol):
    """Ordinary text → ids, by one library; must be picklable and safe to call from several threads."""

    @property
    def kind(self) -> str:
        """The kind of file, in words."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The tables for everything but encoding."""

    def encode(self, text: str, first: bool) -> list[int]:
        """Ids of text without special tokens; `first` says that it begins the text, BOS not counted."""

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """`encode(text, first=True)` of each, in order."""

    def name(self, index: int) -> str:
        """The token as its own vocabulary spells it, for people to read."""

    def definition(self) -> dict[str, Any]:
        """The content of a tokenizer.json that gives the same ids.

        Raises:
            TokenizerError: the format cannot express this tokenizer.
        """

    def originals(self) -> dict[str, bytes]:
        """The files it came from, by the name they bear in a directory."""

    def identity(self) -> bytes:
        """Bytes that are equal for two tokenizers exactly when their ids are."""
