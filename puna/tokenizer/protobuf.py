"""SentencePiece's model file: as much of its protocol buffer as Puna needs, read without a library.

The C++ library gives no access to a model's settings or to the type of a piece, and it may abort on a
damaged file; this reader sees both before the library does. Field numbers are those of
`sentencepiece_model.proto`; the encoding is https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from puna.errors import TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2
_SCORE = struct.Struct("<f")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Piece(NamedTuple):  # there are tens of thousands: made in a fraction of a data class's time
    """One row of the vocabulary; `type_at` is where its type's byte stands in the file, if anywhere."""

    text: str
    score: float
    type: int
    type_at: int | None


@dataclass(frozen=True)
class Model:
    """A model file: its vocabulary, and the settings that bear on ids."""

    pieces: list[Piece]
    model_type: int
    byte_fallback: bool
    unk_surface: str
    whitespace_is_suffix: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    has_character_map: bool


class _Field(NamedTuple):
    number: int
    wire: int
    value: int  # a varint's value, or where the content starts
    end: int


@lru_cache(maxsize=1)  # whoever opens a tokenizer asks several times
def parse_model(data: bytes) -> Model:
    """Read a model file's bytes.

    Raises:
        TokenizerError: they are not one.
    """
    pieces: list[Piece] = []
    trainer: dict[int, _Field] = {}
    normalizer: dict[int, _Field] = {}
    try:
        for entry in _fields(data, 0, len(data)):
            if entry.number == 1 and entry.wire == _BYTES:
                pieces.append(_piece(data, entry))
            elif entry.number == 2 and entry.wire == _BYTES:
                trainer = {part.number: part for part in _fields(data, entry.value, entry.end)}
            elif entry.number == 3 and entry.wire == _BYTES:
                normalizer = {part.number: part for part in _fields(data, entry.value, entry.end)}
        unk_surface = _text(data, trainer[44]) if 44 in trainer else " \u2047 "
    except (IndexError, struct.error, UnicodeDecodeError):
        raise TokenizerError("not a SentencePiece model: its fields are damaged or cut short") from None
    if not pieces or not trainer:
        raise TokenizerError("not a SentencePiece model: it holds no vocabulary or no settings")
    character_map = normalizer.get(2)
    return Model(
        pieces=pieces,
        model_type=_number(trainer, 3, UNIGRAM),
        byte_fallback=bool(_number(trainer, 35, 0)),
        unk_surface=unk_surface,
        whitespace_is_suffix=bool(_number(trainer, 24, 0)),
        add_dummy_prefix=bool(_number(normalizer, 3, 1)),
        remove_extra_whitespaces=bool(_number(normalizer, 4, 1)),
        escape_whitespaces=bool(_number(normalizer, 5, 1)),
        has_character_map=character_map is not None and character_map.end > character_map.value,
    )


def _piece(data: bytes, entry: _Field) -> Piece:
    """Read as the library writes it: text, score, and a type where it is not the normal one."""
    at, end = entry.value, entry.end
    if end - at > 6 and data[at] == 0x0A and data[at + 1] < 0x80:
        begin = at + 2 + data[at + 1]  # of the score
        typed = begin + 7 == end and data[end - 2] == 0x18 and data[end - 1] < 0x80
        if (typed or begin + 5 == end) and data[begin] == 0x15:
            (score,) = _SCORE.unpack_from(data, begin + 1)
            text = data[at + 2 : begin].decode()
            return Piece(text, score, data[end - 1], end - 1) if typed else Piece(text, score, NORMAL, None)
    return _any_piece(data, entry)


def _any_piece(data: bytes, entry: _Field) -> Piece:
    """Read field by field, several times as long."""
    text, score, kind, kind_at = "", 0.0, NORMAL, None
    for part in _fields(data, entry.value, entry.end):
        if part.number == 1 and part.wire == _BYTES:
            text = _text(data, part)
        elif part.number == 2 and part.wire == _FIXED32:
            (score,) = struct.unpack_from("<f", data, part.value)
        elif part.number == 3 and part.wire == _VARINT:
            kind, kind_at = part.value, part.end - 1
    return Piece(text, score, kind, kind_at)


def _text(data: bytes, part: _Field) -> str:
    return data[part.value : part.end].decode("utf-8")


def _number(parts: dict[int, _Field], number: int, default: int) -> int:
    part = parts.get(number)
    return part.value if part is not None and part.wire == _VARINT else default


def _fields(data: bytes, at: int, end: int) -> Iterator[_Field]:
    """Each field in data[at:end]; IndexError where one reaches beyond it."""
    while at < end:
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, stop = _varint(data, at)
        elif wire == _BYTES:
            length, value = _varint(data, at)
            stop = value + length
        elif wire in (_FIXED32, _FIXED64):
            value, stop = at, at + (4 if wire == _FIXED32 else 8)
        else:
            raise IndexError
        if stop > end or number == 0:
            raise IndexError
        yield _Field(number, wire, value, stop)
        at = stop


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A little-endian base-128 number and the position after it."""
    byte = data[at]
    if byte < 0x80:
        return byte, at + 1
    value, shift = byte & 0x7F, 7
    while byte >= 0x80:
        at += 1
        byte = data[at]
        value |= (byte & 0x7F) << shift
        shift += 7
        if shift > 70:
            raise IndexError
    return value, at + 1
