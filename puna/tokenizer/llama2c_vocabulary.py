"""llama2.c's tokenizer.bin (also tok*.bin): a SentencePiece vocabulary as a list of scores and texts.

The length of the longest token (int32), then for every token its score (float32), length (int32) and bytes;
all little-endian, to the end of the file. Spaces are spaces, BOS and EOS stand between newlines.

The file says nothing of how spaces are treated. SentencePiece either takes superfluous ones away before it
learns, so that no piece holds two in a row, or keeps them, and then pieces usually do. A vocabulary that
keeps them and has no such piece is told apart by its first number, which we write larger than need be:
llama2.c uses it only as the size of a buffer. Models with more ids than tokens need a text for each id all
the same: "[PAD" and the id, at the end.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable

from puna.errors import TokenizerError
from puna.tokenizer.codec import BYTE_PIECE, PLACEHOLDER, VOCABULARY_LIMIT
from puna.tokenizer.protobuf import BYTE, CONTROL, NORMAL, UNKNOWN
from puna.tokenizer.sentencepiece_reader import SentencePieceCodec
from puna.tokenizer.sentencepiece_writer import Row, model_bytes

LONGEST = 1 << 16  # bytes of a token; more tell a file that is no vocabulary
_BOS, _EOS, _UNK = "<s>", "</s>", "<unk>"
_LOWEST = -1e9  # a score below those of all real tokens
_INEXPRESSIBLE = "llama2.c's tokenizer.bin cannot hold it: {}"


def looks_like_vocabulary(data: bytes) -> bool:
    """Whether a file may be one, judged by its length for the longest token and by its first token, a text.

    A model of llama2.c begins with small numbers too, but has numbers where the text would be.
    """
    if len(data) < 12:
        return False
    longest, _, length = struct.unpack_from("<ifi", data)
    return 0 < length <= longest <= LONGEST and b"\0" not in data[12 : 12 + length]


def read(data: bytes) -> SentencePieceCodec:
    """The tokenizer that a tokenizer.bin describes, giving the ids of the one it was made from.

    Raises:
        TokenizerError: the file is none, or damaged.
    """
    (longest,) = struct.unpack_from("<i", data) if len(data) >= 4 else (0,)
    entries = _entries(data, longest)
    rows = [_row(score, text) for score, text in entries]
    while len(rows) > 1 and rows[-1][0] == _filler(len(rows) - 1):
        rows.pop()
    places = {text: index for index, (text, _, kind) in enumerate(rows) if kind in (CONTROL, UNKNOWN)}
    missing = [name for name in (_UNK, _BOS, _EOS) if name not in places]
    if missing or len(places) != sum(kind in (CONTROL, UNKNOWN) for _, _, kind in rows):
        raise TokenizerError(f"not a llama2.c vocabulary: expected {_UNK}, {_BOS} and {_EOS}, each once")
    superfluous = longest == max(len(text.encode()) for _, text in entries)
    return SentencePieceCodec(
        model_bytes(
            rows,
            bos_id=places[_BOS],
            eos_id=places[_EOS],
            unk_id=places[_UNK],
            remove_extra_whitespaces=superfluous and not _runs_of_spaces(text for text, _, _ in rows),
            byte_fallback=sum(kind == BYTE for _, _, kind in rows) == 256,
        )
    )


def write(codec: SentencePieceCodec, vocab_size: int | None = None) -> bytes:
    """The content of a tokenizer.bin, as llama2.c's own export makes it; filled up to `vocab_size` ids.

    Raises:
        TokenizerError: the vocabulary, read again, would give other ids; or is larger than `vocab_size`.
    """
    pieces, size = codec.model.pieces, vocab_size or len(codec.model.pieces)
    if len(pieces) > size:
        raise TokenizerError(_INEXPRESSIBLE.format(f"{len(pieces)} tokens for a model with {size} ids"))
    names = {codec.vocabulary.bos_id: f"\n{_BOS}\n", codec.vocabulary.eos_id: f"\n{_EOS}\n"}
    texts = [names.get(index, piece.text) for index, piece in enumerate(pieces)]
    texts += [_filler(index) for index in range(len(pieces), size)]
    scores = [*(piece.score for piece in pieces), *[_LOWEST] * (size - len(pieces))]
    data = [text.replace(PLACEHOLDER, " ").encode() for text in texts]
    longest = max(map(len, data))
    if not codec.model.remove_extra_whitespaces and not _runs_of_spaces(texts):
        longest += 1  # see the head of this file
    entries = (struct.pack("<fi", score, len(text)) + text for score, text in zip(scores, data, strict=True))
    content = b"".join([struct.pack("<i", longest), *entries])
    if not _same(codec, content):
        raise TokenizerError(
            _INEXPRESSIBLE.format("it has other special tokens, unused ids, or its own way with spaces")
        )
    return content


def _same(codec: SentencePieceCodec, data: bytes) -> bool:
    try:
        again = read(data)
    except TokenizerError:
        return False
    ends = [(each.vocabulary.bos_id, each.vocabulary.eos_id) for each in (codec, again)]
    return ends[0] == ends[1] and codec.identity() == again.identity()


def _entries(data: bytes, longest: int) -> list[tuple[float, str]]:
    """Score and text of every token; only what the file really holds is taken into memory."""
    found: list[tuple[float, str]] = []
    at = 4
    while at < len(data):
        start = at + 8
        score, length = struct.unpack_from("<fi", data, at) if start <= len(data) else (0.0, 0)
        at = start + length
        if not 0 < length <= longest <= LONGEST or at > len(data) or not math.isfinite(score):
            raise TokenizerError(f"not a llama2.c vocabulary: token {len(found)} is damaged or cut short")
        found.append((score, _decoded(data[start:at], len(found))))
        if len(found) > VOCABULARY_LIMIT:
            raise TokenizerError(f"not a llama2.c vocabulary: more than {VOCABULARY_LIMIT} tokens")
    if not found:
        raise TokenizerError("not a llama2.c vocabulary: it holds no token")
    return found


def _decoded(data: bytes, index: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise TokenizerError(f"not a llama2.c vocabulary: token {index} is not UTF-8 text") from None


def _row(score: float, text: str) -> Row:
    name = text.strip("\n")
    if name in (_BOS, _EOS):
        return name, score, CONTROL
    if text == _UNK:
        return text, score, UNKNOWN
    if BYTE_PIECE.fullmatch(text):
        return text, score, BYTE
    return text.replace(" ", PLACEHOLDER), score, NORMAL


def _runs_of_spaces(texts: Iterable[str]) -> bool:
    return any(PLACEHOLDER * 2 in text for text in texts)


def _filler(index: int) -> str:
    return f"[PAD{index}]"
