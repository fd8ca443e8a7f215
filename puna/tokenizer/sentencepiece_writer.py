"""SentencePiece's model file from pieces, or from a tokenizer.json that says the same in another way.

Field numbers are those of `sentencepiece_model.proto`, as in protobuf.py, which reads what is written here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from puna.errors import TokenizerError
from puna.tokenizer import export
from puna.tokenizer.codec import BYTE_PIECE, PLACEHOLDER, VOCABULARY_LIMIT
from puna.tokenizer.merges import by_token, merges
from puna.tokenizer.protobuf import BPE, BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

Row = tuple[str, float, int]
"""A piece's text, score, and type."""

_NO_TOKEN = "<none>"  # a name that no piece bears
_USUAL_EOS = ("</s>", "<|end_of_text|>", "<|endoftext|>")
_INEXPRESSIBLE = "this tokenizer.json cannot be written as a SentencePiece model with the same ids: {}"
_STEPS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}


def model_bytes(
    pieces: Sequence[Row],
    *,
    bos_id: int,
    eos_id: int,
    unk_id: int,
    pad_id: int = -1,
    add_dummy_prefix: bool = True,
    remove_extra_whitespaces: bool = False,
    byte_fallback: bool = True,
) -> bytes:
    """A BPE model file: pieces in the order of their ids, spaces in them written as U+2581.

    An id of -1 says that there is no such token. The same arguments give the same bytes.
    """
    trainer = [
        _number(3, BPE),
        _number(4, len(pieces)),
        _number(35, byte_fallback),
        *(_number(40 + place, index) for place, index in enumerate((unk_id, bos_id, eos_id, pad_id))),
        *_names(pieces, (unk_id, bos_id, eos_id, pad_id)),
    ]
    normalizer = [
        _text(1, "identity"),
        _number(3, add_dummy_prefix),
        _number(4, remove_extra_whitespaces),
        _number(5, 1),
    ]
    parts = [_block(1, _piece(row)) for row in pieces]
    return b"".join([*parts, _block(2, b"".join(trainer)), _block(3, b"".join(normalizer))])


def extended(data: bytes, names: Sequence[str]) -> bytes:
    """A model file with control symbols after its last piece; all else in it stays as it is."""
    return data + b"".join(_block(1, _piece((name, 0.0, CONTROL))) for name in names)


def from_json(document: Mapping[str, Any]) -> bytes:
    """A tokenizer.json of the SentencePiece kind as a model file that gives the same ids.

    Scores say in which order the merges of the document come. Special added tokens become control symbols,
    the others user-defined ones, and ids that nothing bears unused pieces. A Metaspace step that prepends a
    space is refused: it leaves text alone that begins with one, or that follows a special token, where
    SentencePiece puts another.

    Raises:
        TokenizerError: it is of another kind, or no model file gives the same ids.
    """
    try:
        return _from_json(document, document["model"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise TokenizerError("not a tokenizer.json: a part of it is missing or of the wrong type") from None


def _from_json(document: Mapping[str, Any], model: Mapping[str, Any]) -> bytes:
    _refuse_other_kinds(model)
    pairs = _pairs(model)
    rows = _rows(document, pairs)
    _check_merges(rows, pairs)
    ids = {text: index for index, (text, _, _) in enumerate(rows)}
    prefix, cut = _spaces(document, rows)
    return model_bytes(
        rows,
        bos_id=ids.get(_bos(document), -1),
        eos_id=next((ids[name] for name in _USUAL_EOS if name in ids), -1),
        unk_id=ids[model["unk_token"]],
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=cut,
        byte_fallback=bool(model.get("byte_fallback")),
    )


def _names(pieces: Sequence[Row], ids: Sequence[int]) -> Iterator[bytes]:
    """The library finds BOS and its like by these names, not by their ids, and has defaults for them."""
    for place, index in enumerate(ids):
        yield _text(45 + place, pieces[index][0] if index >= 0 else _NO_TOKEN)


def _piece(row: Row) -> bytes:
    text, score, kind = row
    # The type is written even where it is the default: who reads the file may want to change it in place.
    return _text(1, text) + _varint(2 << 3 | 5) + struct.pack("<f", score) + _number(3, kind)


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value & (1 << 64) - 1)  # -1 as the two's complement


def _text(number: int, text: str) -> bytes:
    return _block(number, text.encode("utf-8"))


def _block(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    r"""A number in base 128, lowest digit first.

    >>> _varint(300)
    b'\xac\x02'
    """
    digits = bytearray()
    while value >= 0x80:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


def _refuse_other_kinds(model: Mapping[str, Any]) -> None:
    vocab = model["vocab"]
    whole_bytes = sum(BYTE_PIECE.fullmatch(token) is not None for token in vocab) == 256
    _refuse(
        {
            "it is not a BPE vocabulary": model.get("type", "BPE") != "BPE",
            "it has no token for what is unknown": model.get("unk_token") not in vocab,
            "it drops merges at random": bool(model.get("dropout")),
            "its tokens carry a prefix or suffix": bool(
                model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
            ),
            "it looks for whole words before it merges": bool(model.get("ignore_merges")),
            "its bytes are incomplete": bool(model.get("byte_fallback")) and not whole_bytes,
            "it writes each unknown character for itself": not model.get("byte_fallback")
            and not model.get("fuse_unk"),
        }
    )


def _refuse(faults: Mapping[str, bool]) -> None:
    for fault, found in faults.items():
        if found:
            raise TokenizerError(_INEXPRESSIBLE.format(fault))


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges, in either spelling: pairs, or in older files two tokens with a space between."""
    pairs = [tuple(item.split(" ")) if isinstance(item, str) else tuple(item) for item in model["merges"]]
    if not all(len(pair) == 2 for pair in pairs):
        raise TokenizerError("not a tokenizer.json: a merge must name two tokens")
    return [(left, right) for left, right in pairs]


def _rows(document: Mapping[str, Any], pairs: list[tuple[str, str]]) -> list[Row]:
    """Every piece in the order of ids; a token that no merge makes scores below all that are made."""
    model = document["model"]
    ranks = {text: rank for rank, text in enumerate(dict.fromkeys(a + b for a, b in pairs))}
    added = {token["content"]: token for token in document.get("added_tokens") or []}
    ids = {**model["vocab"], **{text: token["id"] for text, token in added.items()}}
    size = max(ids.values()) + 1
    beyond = min(ids.values()) < 0 or size > VOCABULARY_LIMIT
    _refuse({"two tokens share an id": len(set(ids.values())) != len(ids), "an id is out of range": beyond})
    rows: list[Row] = [(f"<unused{index}>", 0.0, UNUSED) for index in range(size)]
    for text, index in sorted(ids.items(), key=lambda item: item[1]):
        kind = UNKNOWN if text == model["unk_token"] else _type(text, added.get(text), model)
        rows[index] = (text, -float(ranks.setdefault(text, len(ranks))) if kind == NORMAL else 0.0, kind)
    return rows


def _type(text: str, added: Mapping[str, Any] | None, model: Mapping[str, Any]) -> int:
    if added is None:
        return BYTE if model.get("byte_fallback") and BYTE_PIECE.fullmatch(text) else NORMAL
    reaching = any(added.get(option) for option in ("lstrip", "rstrip", "single_word"))
    _refuse({f"the added token {text!r} depends on what stands beside it": reaching})
    return CONTROL if added.get("special") else USER_DEFINED


def _check_merges(rows: Sequence[Row], pairs: list[tuple[str, str]]) -> None:
    normal = [row for row in rows if row[2] == NORMAL]
    ordered = [text for text, _, _ in sorted(normal, key=lambda row: -row[1])]
    implied = merges(ordered, {text for text, _, _ in normal})
    _refuse({"no scores give its merges in their order": by_token(implied) != by_token(pairs)})


def _spaces(document: Mapping[str, Any], rows: Sequence[Row]) -> tuple[bool, bool]:
    """Whether a space comes before every stretch of text, and whether superfluous ones are taken away."""
    normalizer, splitter = _steps(document, "normalizer"), _steps(document, "pre_tokenizer")
    if not splitter:
        for prefix in (True, False):
            for cut in (False, True):
                if normalizer == export.space_steps(prefix, cut):
                    return prefix, cut
    elif not normalizer and len(splitter) == 1 and splitter[0]["type"] == "Metaspace":
        _check_metaspace(splitter[0], rows)
        return False, False
    raise TokenizerError(_INEXPRESSIBLE.format("it changes or splits text before it merges"))


def _check_metaspace(step: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """A Metaspace step prepends no second space, and perhaps only to the first stretch: no model does so."""
    default = "always" if step.get("add_prefix_space", True) else "never"
    normal = [text for text, _, kind in rows if kind == NORMAL]
    _refuse(
        {
            "it puts a space only before text that has none (Metaspace)": (
                step.get("prepend_scheme") or default
            )
            != "never",
            f"its spaces are written as {step['replacement']!r}": step["replacement"] != PLACEHOLDER,
            "it has pieces across words, and splits words (Metaspace)": bool(step.get("split", True))
            and any(PLACEHOLDER in text[1:] for text in normal),
        }
    )


def _steps(document: Mapping[str, Any], role: str) -> list[Any]:
    """The steps of a normalizer or pre-tokenizer, whether it is a sequence or one step."""
    step = document.get(role)
    if step is None:
        return []
    return list(step[_STEPS[role]]) if step["type"] == "Sequence" else [step]


def _bos(document: Mapping[str, Any]) -> str:
    """The token that the document puts before a text, or the usual one."""
    post = document.get("post_processor") or {}
    steps = post.get("single") or [{}]
    return str(steps[0].get("SpecialToken", {}).get("id", "<s>"))
