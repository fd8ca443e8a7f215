"""tokenizer.json for tokenizers that came in another form, giving the same ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from puna.errors import TokenizerError
from puna.tokenizer import protobuf
from puna.tokenizer.codec import PLACEHOLDER, Vocabulary
from puna.tokenizer.merges import merges

ALL_SPACES = 1 << 20  # more than any text begins with
_INEXPRESSIBLE = "this SentencePiece model cannot be written as tokenizer.json with the same ids: {}"


def from_sentencepiece(model: protobuf.Model, vocabulary: Vocabulary) -> dict[str, Any]:
    """A BPE model with byte fallback over text whose spaces are U+2581.

    Raises:
        TokenizerError: the model uses what the format cannot express.
    """
    _refuse_inexpressible(model, vocabulary)
    normal = [p for p in model.pieces if p.type in (protobuf.NORMAL, protobuf.USER_DEFINED)]
    ordered = [p.text for p in sorted(normal, key=lambda p: -p.score)]  # stable: equal scores by id
    names = {p.text for p in normal}
    unk = None if vocabulary.unk_id is None else model.pieces[vocabulary.unk_id].text
    return _document(
        vocabulary,
        normalizer={
            "type": "Sequence",
            "normalizers": space_steps(model.add_dummy_prefix, model.remove_extra_whitespaces),
        },
        pre_tokenizer=None,
        decoder=_decoder(model),
        model={
            "type": "BPE",
            "dropout": None,
            "unk_token": unk,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.byte_fallback,
            "ignore_merges": False,
            "vocab": {piece.text: index for index, piece in enumerate(model.pieces)},
            "merges": [list(pair) for pair in merges(ordered, names)],
        },
    )


def from_ranks(ranks: Mapping[bytes, int], pattern: str, vocabulary: Vocabulary) -> dict[str, Any]:
    """A byte-level BPE model over the stretches that `pattern` finds."""
    in_order = sorted(ranks, key=ranks.__getitem__)
    return _document(
        vocabulary,
        normalizer=None,
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        model={
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {byte_level(token): ranks[token] for token in in_order},
            "merges": [[byte_level(left), byte_level(right)] for left, right in merges(in_order, ranks)],
        },
    )


def byte_level(token: bytes) -> str:
    """Bytes as the visible characters that byte-level vocabularies spell them with.

    >>> byte_level(b" a")
    'Ġa'
    """
    return token.decode("latin-1").translate(_VISIBLE)


def _visible() -> dict[int, str]:
    """GPT-2's table: printable Latin-1 stands for itself, every other byte for U+0100 and up, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


_VISIBLE = _visible()
BYTE_OF = {character: byte for byte, character in _VISIBLE.items()}


def _refuse_inexpressible(model: protobuf.Model, vocabulary: Vocabulary) -> None:
    faults = {
        "it is not a BPE model": model.model_type != protobuf.BPE,
        "it normalises characters": model.has_character_map,
        "it writes white space as a suffix": model.whitespace_is_suffix,
        "it does not escape white space": not model.escape_whitespaces,
        "it has unused pieces": any(p.type == protobuf.UNUSED for p in model.pieces),
        "it has user-defined symbols that text becomes": any(
            p.type == protobuf.USER_DEFINED and p.text not in vocabulary.specials for p in model.pieces
        ),
    }
    for fault, found in faults.items():
        if found:
            raise TokenizerError(_INEXPRESSIBLE.format(fault))


def space_steps(add_prefix: bool, remove_extra: bool) -> list[dict[str, Any]]:
    """A normalizer's steps that treat spaces as SentencePiece does with these two settings."""
    steps: list[dict[str, Any]] = []
    if remove_extra:
        steps += [
            # SentencePiece drops its own placeholder at the end of a text, and only there.
            _replace({"Regex": f"\\A +|[ {PLACEHOLDER}]+\\z"}, ""),
            _replace({"Regex": " {2,}"}, " "),
        ]
    if add_prefix:
        steps.append({"type": "Prepend", "prepend": PLACEHOLDER})
    return [*steps, _replace({"String": " "}, PLACEHOLDER)]


def _decoder(model: protobuf.Model) -> dict[str, Any]:
    steps = [_replace({"String": PLACEHOLDER}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if model.add_dummy_prefix:
        most = ALL_SPACES if model.remove_extra_whitespaces else 1
        steps.append({"type": "Strip", "content": " ", "start": most, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _document(vocabulary: Vocabulary, **parts: Any) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(vocabulary.specials),
        "normalizer": parts["normalizer"],
        "pre_tokenizer": parts["pre_tokenizer"],
        "post_processor": _begin_with_bos(vocabulary),
        "decoder": parts["decoder"],
        "model": parts["model"],
    }


def added_tokens(specials: Mapping[str, int]) -> list[dict[str, Any]]:
    """Special tokens as tokenizer.json lists them, by id."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ordered: Sequence[tuple[str, int]] = sorted(specials.items(), key=lambda item: item[1])
    return [{"id": index, "content": name, **flags} for name, index in ordered]


def _begin_with_bos(vocabulary: Vocabulary) -> dict[str, Any] | None:
    if vocabulary.bos_id is None:
        return None
    name = next(name for name, index in vocabulary.specials.items() if index == vocabulary.bos_id)

    def bos(part: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": part}}

    def text(letter: str, part: int) -> dict[str, Any]:
        return {"Sequence": {"id": letter, "type_id": part}}

    return {
        "type": "TemplateProcessing",
        "single": [bos(0), text("A", 0)],
        "pair": [bos(0), text("A", 0), bos(1), text("B", 1)],
        "special_tokens": {name: {"id": name, "ids": [vocabulary.bos_id], "tokens": [name]}},
    }
