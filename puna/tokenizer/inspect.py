"""What a tokenizer knows, and how well it fits a text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from puna.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Contents:
    """A vocabulary by kind of token; `longest` are ids, the longest text first."""

    kind: str
    vocab_size: int
    special_tokens: int
    byte_tokens: int
    longest: list[int]
    fingerprint: str


@dataclass(frozen=True)
class Fit:
    """How a tokenizer cuts given text; counts leave BOS and EOS out."""

    texts: int
    bytes: int
    characters: int
    tokens: int
    fallback_tokens: int
    unknown_tokens: int
    distinct_tokens: int

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token; 0 for no text."""
        return self.bytes / self.tokens if self.tokens else 0.0

    @property
    def fallback_share(self) -> float:
        """Share of the tokens that write one raw byte."""
        return self.fallback_tokens / self.tokens if self.tokens else 0.0


def contents(tokenizer: Tokenizer, longest: int = 20) -> Contents:
    """Count what is in the vocabulary, and find its longest ordinary tokens."""
    special = set(tokenizer.specials.values())
    ordinary = [index for index in range(tokenizer.vocab_size) if index not in special]
    ranked = sorted(ordinary, key=lambda index: (-len(tokenizer.token_bytes(index)), index))
    return Contents(
        kind=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        special_tokens=len(special),
        byte_tokens=sum(map(tokenizer.is_byte, ordinary)),
        longest=ranked[:longest],
        fingerprint=tokenizer.fingerprint,
    )


def fit(tokenizer: Tokenizer, texts: Iterable[str]) -> Fit:
    """Encode texts and count."""
    count = size = characters = tokens = fallback = unknown = 0
    seen: set[int] = set()
    for text in texts:
        ids = tokenizer.encode(text, bos=False)
        count, size, characters = (
            count + 1,
            size + len(text.encode("utf-8", "replace")),
            characters + len(text),
        )
        tokens += len(ids)
        fallback += sum(map(tokenizer.is_byte, ids))
        unknown += 0 if tokenizer.unk_id is None else ids.count(tokenizer.unk_id)
        seen.update(ids)
    return Fit(count, size, characters, tokens, fallback, unknown, len(seen))


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[int, str]]:
    """Each id with the token as its vocabulary spells it."""
    return [(index, tokenizer.piece(index)) for index in ids]
