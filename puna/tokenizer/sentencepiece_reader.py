"""SentencePiece's tokenizer.model: Llama 1 and 2, and what `train.py` makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sentencepiece

from puna.errors import TokenizerError
from puna.tokenizer import export, protobuf
from puna.tokenizer.codec import BYTE_PIECE, PLACEHOLDER, VOCABULARY_LIMIT, Vocabulary
from puna.tokenizer.protobuf import BYTE, CONTROL, UNKNOWN, USER_DEFINED

_NEVER_JOINED = (CONTROL, UNKNOWN, BYTE)  # text becomes them in other ways, or not at all
_TOO_LARGE = "a vocabulary of {} pieces is beyond the limit of {}"


class SentencePieceCodec:
    """Encodes with the sentencepiece library itself.

    Control symbols never match text in SentencePiece, but user-defined symbols do. Those that look like
    anything but white space are special tokens here: they are given to the library as control symbols, and
    found in a text only on request. `plain` names the ones that are to stay ordinary.
    """

    kind = "SentencePiece"

    def __init__(self, data: bytes, add_bos: bool = True, plain: frozenset[str] = frozenset()) -> None:
        """Raises TokenizerError when `data` is not a model file."""
        self._data, self._add_bos, self._plain = data, add_bos, plain
        self.model = protobuf.parse_model(data)
        if len(self.model.pieces) > VOCABULARY_LIMIT:
            raise TokenizerError(_TOO_LARGE.format(len(self.model.pieces), VOCABULARY_LIMIT))
        hidden = [p for p in self.model.pieces if p.type == USER_DEFINED and _is_special(p.text, plain)]
        self.names = {p.text for p in hidden}
        self._library = _open(_as_control(data, hidden))
        self.vocabulary = self._read_vocabulary()

    def __reduce__(self) -> tuple[type, tuple[bytes, bool, frozenset[str]]]:
        return SentencePieceCodec, (self._data, self._add_bos, self._plain)

    def encode(self, text: str, first: bool) -> list[int]:
        """Every stretch gets its leading space, as each text does in SentencePiece."""
        return self._library.encode(text)

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """On the library's own threads."""
        return self._library.encode(list(texts), num_threads=threads) if texts else []

    def name(self, index: int) -> str:
        """The piece, with U+2581 for a space."""
        return self.model.pieces[index].text

    def definition(self) -> dict[str, Any]:
        """A tokenizer.json that gives the same ids."""
        return export.from_sentencepiece(self.model, self.vocabulary)

    def originals(self) -> dict[str, bytes]:
        """tokenizer.model, unchanged."""
        return {"tokenizer.model": self._data}

    def identity(self) -> bytes:
        """Pieces, the order in which they are joined, the treatment of spaces, the symbols kept ordinary.

        Not the file: one that was rebuilt from another format's tables gives the same ids. Where a model uses
        more than the settings named here (unigram, normalised characters), it is the file all the same.
        """
        model = self.model
        plain = sorted(self._plain)
        if model.model_type != protobuf.BPE or model.has_character_map:
            return b"\0".join([b"sentencepiece", self._data, *(name.encode() for name in plain)])
        settings = (
            model.byte_fallback,
            model.whitespace_is_suffix,
            model.add_dummy_prefix,
            model.remove_extra_whitespaces,
            model.escape_whitespaces,
        )
        pieces = [(piece.text, piece.type) for piece in model.pieces]
        return repr(("sentencepiece", settings, plain, pieces, _joining_order(model.pieces))).encode()

    def _read_vocabulary(self) -> Vocabulary:
        pieces = self.model.pieces
        bos, eos, unk = self._library.bos_id(), self._library.eos_id(), self._library.unk_id()
        special = {CONTROL, UNKNOWN}
        return Vocabulary(
            texts=[_text(piece, self.model.unk_surface) for piece in pieces],
            specials={p.text: i for i, p in enumerate(pieces) if p.type in special or p.text in self.names},
            bos_id=bos if bos >= 0 and self._add_bos else None,
            eos_id=eos if eos >= 0 else None,
            unk_id=unk,
            raw=frozenset(i for i, p in enumerate(pieces) if p.type == BYTE),
            leading_space="each" if self.model.add_dummy_prefix else "none",
            broken="each",
            strips="all" if self.model.remove_extra_whitespaces else "one",
        )


def plain_symbols(data: bytes, special: Mapping[int, bool]) -> frozenset[str]:
    """User-defined symbols that the files beside a model declare as not special, by id."""
    pieces = protobuf.parse_model(data).pieces
    return frozenset(
        p.text for i, p in enumerate(pieces) if p.type == USER_DEFINED and special.get(i) is False
    )


def _joining_order(pieces: Sequence[protobuf.Piece]) -> list[int]:
    """For every piece that can be joined from others, by id, the place of its score among all scores.

    Equal scores share a place: there the leftmost pair is joined first.
    """
    joined = [piece for piece in pieces if len(piece.text) > 1 and piece.type not in _NEVER_JOINED]
    places = {score: place for place, score in enumerate(sorted({piece.score for piece in joined}))}
    return [places[piece.score] for piece in joined]


def _is_special(text: str, plain: frozenset[str]) -> bool:
    return text not in plain and not text.replace(PLACEHOLDER, " ").isspace()


def _as_control(data: bytes, pieces: Sequence[protobuf.Piece]) -> bytes:
    changed = bytearray(data)
    for piece in pieces:
        assert piece.type_at is not None  # a type other than the default is written in the file
        changed[piece.type_at] = CONTROL
    return bytes(changed)


def _open(data: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise TokenizerError(f"not a SentencePiece model: {str(error).splitlines()[0]}") from None


def _text(piece: protobuf.Piece, unk_surface: str) -> bytes:
    if piece.type == BYTE and (match := BYTE_PIECE.fullmatch(piece.text)):
        return bytes([int(match[1], 16)])
    if piece.type == UNKNOWN:
        return unk_surface.encode()
    if piece.type == CONTROL:
        return piece.text.encode()
    return piece.text.replace(PLACEHOLDER, " ").encode()
