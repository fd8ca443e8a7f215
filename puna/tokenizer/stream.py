"""Ids → text as they come."""

from __future__ import annotations

import codecs

from puna.errors import TokenizerError
from puna.tokenizer.codec import Vocabulary

# "surrogateescape" turns every undecodable byte into one lone surrogate of this range, which no valid
# text holds: so each broken byte can be counted, and shown as SentencePiece shows it.
_ESCAPED = dict.fromkeys(range(0xDC80, 0xDD00), "\ufffd")


class StreamingDecoder:
    """Turns ids into text one at a time; what `push` and `flush` return joins to `decode` of all of them.

    A character whose bytes are spread over several tokens is held back until it is whole; bytes that
    cannot become a character any more come out as U+FFFD.
    """

    def __init__(self, vocabulary: Vocabulary, specials: bool = False, continuation: bool = False) -> None:
        """`specials` shows special tokens by name; `continuation` keeps the first token's space."""
        self._vocabulary = vocabulary
        self._show = specials
        self._special_ids = frozenset(vocabulary.specials.values()) - {vocabulary.unk_id}
        self._real_space = vocabulary.raw | {vocabulary.unk_id}
        self._at_start = vocabulary.leading_space != "none" and not continuation
        errors = "surrogateescape" if vocabulary.broken == "each" else "replace"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors=errors)

    @property
    def at_start(self) -> bool:
        """Whether the next token loses its leading space."""
        return self._at_start

    @property
    def within_character(self) -> bool:
        """Whether the bytes so far end within a character."""
        return bool(self._utf8.getstate()[0])

    def push(self, index: int) -> str:
        """The text that is certain once this id is known; may be empty.

        Raises:
            TokenizerError: the id is not in the vocabulary.
        """
        texts = self._vocabulary.texts
        if not 0 <= index < len(texts):
            raise TokenizerError(f"id {index} is not in the vocabulary: expected 0 to {len(texts) - 1}")
        if index in self._special_ids:
            return self._special(texts[index])
        text = texts[index]
        if self._at_start and text:
            if text[:1] == b" " and index not in self._real_space:
                text = text[1:]
            self._at_start = not text and self._vocabulary.strips == "all"
        return self._clean(self._utf8.decode(text))

    def flush(self) -> str:
        """What is still held back: the bytes of an unfinished character, as U+FFFD."""
        return self._clean(self._utf8.decode(b"", final=True))

    def _special(self, name: bytes) -> str:
        before = self.flush()
        if not self._show:
            return before
        # Every stretch between special tokens was encoded with its own leading space.
        self._at_start = self._vocabulary.leading_space == "each"
        return before + name.decode("utf-8")

    def _clean(self, text: str) -> str:
        return text.translate(_ESCAPED) if self._vocabulary.broken == "each" and not text.isascii() else text
