"""The one tokenizer that everybody else holds."""

from __future__ import annotations

import hashlib
import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from puna.errors import TokenizerError
from puna.tokenizer import specials as special_tokens
from puna.tokenizer.codec import Codec
from puna.tokenizer.stream import StreamingDecoder


class Tokenizer:
    """Text ↔ ids, whatever file it came from.

    Every valid text survives: `decode(encode(text)) == text`, unless it holds U+2581, which SentencePiece
    cannot tell from a space, or the file itself asks for text to be changed (extra spaces removed,
    characters normalised). Lone surrogates, which are no valid text, become U+FFFD, one each.

    May be pickled, and used from several threads.
    """

    def __init__(
        self,
        codec: Codec,
        end_ids: Sequence[int] = (),
        chat_template: str | None = None,
        extras: Mapping[str, Any] | None = None,
    ) -> None:
        """`end_ids` end an answer besides the end of text; `extras` are those of extras.py."""
        self._codec = codec
        self._vocabulary = codec.vocabulary
        eos = () if self._vocabulary.eos_id is None else (self._vocabulary.eos_id,)
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys((*eos, *end_ids)))
        self.chat_template = chat_template
        self._extras = dict(extras or {})

    def __repr__(self) -> str:
        return f"Tokenizer({self.kind}, vocab_size={self.vocab_size})"

    @property
    def codec(self) -> Codec:
        """What reads and writes its kind of file, for formats that store a tokenizer in their own way."""
        return self._codec

    @property
    def kind(self) -> str:
        """The kind of file it came from, in words."""
        return self._codec.kind

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return len(self._vocabulary.texts)

    @property
    def bos_id(self) -> int | None:
        """What begins a text; None where this tokenizer puts nothing there."""
        return self._vocabulary.bos_id

    @property
    def eos_id(self) -> int | None:
        """What ends a text."""
        return self._vocabulary.eos_id

    @property
    def unk_id(self) -> int | None:
        """What stands for characters that the vocabulary cannot write."""
        return self._vocabulary.unk_id

    @property
    def specials(self) -> Mapping[str, int]:
        """Name → id of every special token."""
        return self._vocabulary.specials

    @property
    def extras(self) -> Mapping[str, Any]:
        """What its files say that decides no ids, for `save` to write again."""
        return MappingProxyType(self._extras)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of what decides ids: equal fingerprints give equal ids."""
        ends = f"{self.bos_id} {self.eos_id}".encode()
        return hashlib.sha256(self._codec.identity() + b"\0" + ends).hexdigest()

    def encode(self, text: str, bos: bool = True, eos: bool = False, specials: bool = False) -> list[int]:
        """Ids of a text, after BOS where the tokenizer has one; `specials` parses special tokens in the text.

        A text that itself begins with BOS (`specials=True`) does not get another.

        Raises:
            TokenizerError: `eos` is asked of a tokenizer without one.
        """
        text = _well_formed(text)
        if specials:
            return self._frame(
                self.encode_parts(special_tokens.split(text, self.specials, self.pattern)), bos, eos
            )
        return self._frame(self._codec.encode(text, first=True), bos, eos)

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Ids of stretches of ordinary text and special ids, in order; nothing is added."""
        ids: list[int] = []
        for place, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._codec.encode(_well_formed(part), first=place == 0)
        return ids

    def encode_batch(
        self,
        texts: Sequence[str],
        bos: bool = True,
        eos: bool = False,
        specials: bool = False,
        threads: int | None = None,
    ) -> list[list[int]]:
        """`encode` of each text, on several threads (all cores unless said)."""
        if specials:
            return [self.encode(text, bos, eos, specials) for text in texts]
        whole = [_well_formed(text) for text in texts]
        rows = self._codec.encode_batch(whole, threads or os.cpu_count() or 1)
        return [self._frame(ids, bos, eos) for ids in rows]

    def decode(self, ids: Iterable[int], specials: bool = False, continuation: bool = False) -> str:
        """The text of ids; special tokens are left out, or shown by name with `specials`.

        The space that encoding puts before a text is taken away again; `continuation` keeps it, so that
        `decode(prompt) + decode(rest, continuation=True)` reads as the whole.

        Raises:
            TokenizerError: an id is not in the vocabulary.
        """
        decoder = self.stream(specials, continuation)
        return "".join([*(decoder.push(operator.index(index)) for index in ids), decoder.flush()])

    def stream(self, specials: bool = False, continuation: bool = False) -> StreamingDecoder:
        """A decoder for ids that come one at a time."""
        return StreamingDecoder(self._vocabulary, specials, continuation)

    def piece(self, index: int) -> str:
        """A token as its own vocabulary spells it, for people to read.

        Raises:
            TokenizerError: the id is not in the vocabulary.
        """
        self._check(index)
        return self._codec.name(index)

    def token_bytes(self, index: int) -> bytes:
        """What a token adds to a text; for a special token, its name.

        Raises:
            TokenizerError: the id is not in the vocabulary.
        """
        self._check(index)
        return self._vocabulary.texts[index]

    def is_byte(self, index: int) -> bool:
        """Whether a token is there to write one raw byte (SentencePiece's byte fallback)."""
        return index in self._vocabulary.raw

    def save(self, directory: str | Path) -> None:
        """Write a directory that `load` and `transformers.AutoTokenizer` open with the same ids.

        Raises:
            TokenizerError: the directory cannot be written, or tokenizer.json cannot express this tokenizer.
            ResourceError: the disk is full.
        """
        from puna.tokenizer import saving

        saving.save(self, self._codec, Path(directory))

    @cached_property
    def pattern(self) -> re.Pattern[str] | None:
        """Matches a special token in text; None where there are none."""
        return special_tokens.compile_pattern(self.specials, self._vocabulary.parse)

    def _frame(self, ids: list[int], bos: bool, eos: bool) -> list[int]:
        if bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        if not eos:
            return ids
        if self.eos_id is None:
            raise TokenizerError("this tokenizer has no token for the end of a text; encode with eos=False")
        return [*ids, self.eos_id]

    def _check(self, index: int) -> None:
        if not 0 <= index < self.vocab_size:
            raise TokenizerError(f"id {index} is not in the vocabulary: expected 0 to {self.vocab_size - 1}")


def _well_formed(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates as U+FFFD; the same object for valid text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
