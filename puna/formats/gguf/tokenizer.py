"""The tokenizer in a GGUF file's metadata, as the codec of the library that first made it.

"llama" is SentencePiece's: its model file is rebuilt from pieces, scores and types. "gpt2" is byte-level BPE:
a tokenizer.json is rebuilt from tokens and merges; how text is cut before merging is not in the file, but a
name for it, which the table here translates.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from puna.errors import TokenizerError
from puna.formats.gguf.header import brief
from puna.formats.gguf.pretokenizers import PRETOKENIZERS, Pretokenizer
from puna.tokenizer.codec import BYTE_PIECE, VOCABULARY_LIMIT, Codec
from puna.tokenizer.export import added_tokens
from puna.tokenizer.json_reader import JsonCodec
from puna.tokenizer.protobuf import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from puna.tokenizer.sentencepiece_reader import SentencePieceCodec
from puna.tokenizer.sentencepiece_writer import model_bytes
from puna.tokenizer.tokenizer import Tokenizer

PREFIX = "tokenizer.ggml."
MODEL, PRE, TOKENS = f"{PREFIX}model", f"{PREFIX}pre", f"{PREFIX}tokens"
SCORES, TYPES, MERGES = f"{PREFIX}scores", f"{PREFIX}token_type", f"{PREFIX}merges"
ADD_BOS, ADD_EOS = f"{PREFIX}add_bos_token", f"{PREFIX}add_eos_token"
DUMMY_PREFIX, FEWER_SPACES = f"{PREFIX}add_space_prefix", f"{PREFIX}remove_extra_whitespaces"
BOS, UNK, PAD = f"{PREFIX}bos_token_id", f"{PREFIX}unknown_token_id", f"{PREFIX}padding_token_id"
ENDS = tuple(f"{PREFIX}{name}_token_id" for name in ("eos", "eot", "eom"))
TEMPLATE = "tokenizer.chat_template"
ORDINARY = "puna.ordinary_tokens"  # ids of user-defined tokens that any text becomes
MORE_ENDS = "puna.end_token_ids"  # where there are more than three
NO_TOKENIZER = "no_vocab"
FILLER = re.compile(r"\[PAD\d+\]")

_Rows = list[tuple[str, float, int]]


def end_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end an answer."""
    more = metadata.get(MORE_ENDS)
    found = [*(metadata.get(key) for key in ENDS), *(more.tolist() if isinstance(more, array) else [])]
    return tuple(dict.fromkeys(index for index in found if _is_id(index)))


def bos_id(metadata: Mapping[str, Any]) -> int | None:
    """The token that begins a text."""
    index = metadata.get(BOS)
    return index if _is_id(index) else None


def has_tokenizer(metadata: Mapping[str, Any]) -> bool:
    """Whether the file holds one, of whatever kind."""
    return metadata.get(MODEL, NO_TOKENIZER) != NO_TOKENIZER


def read_tokenizer(metadata: Mapping[str, Any], vocab_size: int, origin: Path) -> Tokenizer:
    """The tokenizer that a file describes.

    Raises:
        TokenizerError: it is damaged, larger than the model's vocabulary, or of a kind that is not supported.
    """
    try:
        kind = metadata.get(MODEL)
        reader = {"llama": _sentencepiece, "gpt2": _byte_level}.get(kind) if isinstance(kind, str) else None
        if reader is None:
            raise TokenizerError(
                f"{MODEL} is {brief(kind)}; supported: 'llama' (SentencePiece), 'gpt2' (byte-level BPE)"
            )
        rows = _rows(metadata)
        if len(rows) > vocab_size:
            raise TokenizerError(f"{len(rows)} tokens, but the model's vocabulary has {vocab_size}")
        codec: Codec = reader(metadata, rows)
        ends = [index for index in end_ids(metadata) if index < len(rows)]
        template = metadata.get(TEMPLATE)
        pad = _index(metadata, PAD, rows)
        extras = {} if pad is None or not rows[pad][0] else {"pad_token": rows[pad][0]}
        return Tokenizer(codec, ends, template if isinstance(template, str) else None, extras)
    except TokenizerError as error:
        raise TokenizerError(f"{origin}: {error}") from None


def _sentencepiece(metadata: Mapping[str, Any], rows: _Rows) -> Codec:
    unknown = next((index for index, row in enumerate(rows) if row[2] == UNKNOWN), None)
    if unknown is None:  # some writers mark it as one control token among others; SentencePiece needs it
        unknown = _index(metadata, UNK, rows)
        if unknown is None:
            raise TokenizerError("it has no token for what is unknown, which SentencePiece needs")
        rows[unknown] = (*rows[unknown][:2], UNKNOWN)
    bos, eos, pad = (_index(metadata, key, rows) for key in (BOS, ENDS[0], PAD))
    data = model_bytes(
        rows,
        bos_id=-1 if bos is None else bos,
        eos_id=-1 if eos is None else eos,
        unk_id=unknown,
        pad_id=-1 if pad in (None, unknown, bos, eos) else pad,
        add_dummy_prefix=_flag(metadata, DUMMY_PREFIX, True),
        remove_extra_whitespaces=_flag(metadata, FEWER_SPACES, False),
        byte_fallback=sum(row[2] == BYTE for row in rows) == 256,
    )
    plain = frozenset(rows[index][0] for index in _ordinary(metadata) if index < len(rows))
    return SentencePieceCodec(data, _flag(metadata, ADD_BOS, True), plain)


def _byte_level(metadata: Mapping[str, Any], rows: _Rows) -> Codec:
    cut = _pretokenizer(metadata)
    special = {text: index for index, (text, _, kind) in enumerate(rows) if kind in (CONTROL, UNKNOWN)}
    ordinary = {text: index for index, (text, _, kind) in enumerate(rows) if kind == USER_DEFINED}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            *added_tokens(special),
            *({**token, "special": False} for token in added_tokens(ordinary)),
        ],
        "normalizer": None,
        "pre_tokenizer": cut.definition(),
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": cut.whole_words,
            # Added tokens too: the library would give new ids to those that it does not find here.
            "vocab": {text: index for index, (text, _, kind) in enumerate(rows) if kind != UNUSED},
            "merges": _merges(metadata),
        },
    }
    bos = _index(metadata, BOS, rows)
    return JsonCodec(
        json.dumps(document).encode(),
        bos=None if bos is None else rows[bos][0],
        eos=_index(metadata, ENDS[0], rows),
        add_bos=_flag(metadata, ADD_BOS, cut.begins_with_bos),
    )


def _pretokenizer(metadata: Mapping[str, Any]) -> Pretokenizer:
    name = metadata.get(PRE)
    if not isinstance(name, str) or name not in PRETOKENIZERS:
        known = ", ".join(PRETOKENIZERS)
        raise TokenizerError(
            f"{PRE} is {brief(name)}; how that cuts text is not known here (known: {known}); "
            "give the model's own tokenizer instead"
        )
    return PRETOKENIZERS[name]


def _rows(metadata: Mapping[str, Any]) -> _Rows:
    """Text, score and type of every token, without the fillers at the end."""
    tokens, types = metadata.get(TOKENS), metadata.get(TYPES)
    if not isinstance(tokens, list) or not 0 < len(tokens) <= VOCABULARY_LIMIT:
        raise TokenizerError(f"{TOKENS} is missing, empty or too large")
    if not isinstance(types, array) or len(types) != len(tokens):
        raise TokenizerError(f"{TYPES} must have one number for each of {len(tokens)} tokens")
    if types.typecode in "fd" or not set(types) <= {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}:
        raise TokenizerError(f"{TYPES} holds numbers that are no type of token")
    rows = list(zip(_texts(tokens, TOKENS), _scores(metadata, len(tokens)), types.tolist(), strict=True))
    while rows and rows[-1][2] == UNUSED and FILLER.fullmatch(rows[-1][0]):
        rows.pop()
    if not rows or len({text for text, _, _ in rows}) != len(rows):
        raise TokenizerError(f"{TOKENS} names a token twice, or none at all")
    wrong = next((text for text, _, kind in rows if kind == BYTE and not BYTE_PIECE.fullmatch(text)), None)
    if wrong is not None:
        raise TokenizerError(f"{wrong[:40]!r} is to write one byte, and says not which")
    return rows


def _scores(metadata: Mapping[str, Any], count: int) -> list[float]:
    if metadata[MODEL] != "llama":
        return [0.0] * count
    scores = metadata.get(SCORES)
    if not isinstance(scores, array) or len(scores) != count or not all(map(math.isfinite, scores)):
        raise TokenizerError(f"{SCORES} must have one finite number for each of {count} tokens")
    return [float(score) for score in scores]


def _merges(metadata: Mapping[str, Any]) -> list[list[str]]:
    merges = metadata.get(MERGES)
    if not isinstance(merges, list):
        raise TokenizerError(f"{MERGES} is missing, which a byte-level vocabulary has")
    pairs = [text.split(" ") for text in _texts(merges, MERGES)]
    if not all(len(pair) == 2 for pair in pairs):
        raise TokenizerError(f"{MERGES} must name two tokens each, with a space between")
    return pairs


def _texts(values: list[Any], key: str) -> Iterator[str]:
    try:
        yield from [value.decode() for value in values]
    except (UnicodeDecodeError, AttributeError):
        raise TokenizerError(f"{key} is not UTF-8 text") from None


def _ordinary(metadata: Mapping[str, Any]) -> list[int]:
    ids = metadata.get(ORDINARY)
    return [index for index in ids.tolist() if _is_id(index)] if isinstance(ids, array) else []


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(key, default)
    if not isinstance(value, bool):
        raise TokenizerError(f"{key} is {brief(value)}; expected true or false")
    return value


def _index(metadata: Mapping[str, Any], key: str, rows: _Rows) -> int | None:
    index: Any = metadata.get(key)
    return index if _is_id(index) and index < len(rows) else None


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < VOCABULARY_LIMIT
