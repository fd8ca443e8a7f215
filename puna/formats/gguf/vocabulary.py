"""A tokenizer as GGUF's metadata, giving the same ids in llama.cpp; `gguf_tokenizer` reads them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from puna.errors import TokenizerError
from puna.formats.content import Content
from puna.formats.gguf.pretokenizers import name_of
from puna.formats.gguf.tokenizer import (
    ADD_BOS,
    ADD_EOS,
    BOS,
    DUMMY_PREFIX,
    ENDS,
    FEWER_SPACES,
    MERGES,
    MODEL,
    MORE_ENDS,
    NO_TOKENIZER,
    ORDINARY,
    PAD,
    PRE,
    SCORES,
    TEMPLATE,
    TOKENS,
    TYPES,
    UNK,
)
from puna.tokenizer import protobuf
from puna.tokenizer.codec import Codec
from puna.tokenizer.protobuf import CONTROL, NORMAL, UNUSED, USER_DEFINED
from puna.tokenizer.sentencepiece_reader import SentencePieceCodec
from puna.tokenizer.sentencepiece_writer import from_json
from puna.tokenizer.tiktoken_reader import TiktokenCodec
from puna.tokenizer.tokenizer import Tokenizer

_INEXPRESSIBLE = "a tokenizer with the same ids: {}"
_FILLER_SCORE = -10_000.0


def check_tokenizer(content: Content) -> None:
    """Whether `tokenizer_metadata` can be given.

    Raises:
        TokenizerError: as it would.
    """
    if content.tokenizer is not None and isinstance(content.tokenizer.codec, TiktokenCodec):
        # Nothing in it can be inexpressible, and to list its merges takes seconds.
        _check_size(content.tokenizer, content.config.vocab_size)
    else:
        tokenizer_metadata(content)


def tokenizer_metadata(content: Content) -> dict[str, Any]:
    """The keys `tokenizer.*` for a model with or without tokenizer.

    Raises:
        TokenizerError: GGUF has no words for what this tokenizer does; the message completes "cannot hold …".
    """
    tokenizer = content.tokenizer
    found = _ids(content)
    if tokenizer is None:
        return {MODEL: NO_TOKENIZER, **found}
    _check_size(tokenizer, content.config.vocab_size)
    found[ADD_BOS], found[ADD_EOS] = tokenizer.bos_id is not None, False
    if tokenizer.unk_id is not None:
        found[UNK] = tokenizer.unk_id
    if tokenizer.extras.get("pad_token") in tokenizer.specials:
        found[PAD] = tokenizer.specials[tokenizer.extras["pad_token"]]
    if tokenizer.chat_template is not None:
        found[TEMPLATE] = tokenizer.chat_template
    kind = _byte_level if _is_byte_level(tokenizer.codec) else _sentencepiece
    return {**kind(tokenizer, content.config.vocab_size), **found}


def _check_size(tokenizer: Tokenizer, most: int) -> None:
    if tokenizer.vocab_size > most:
        raise TokenizerError(f"a tokenizer of {tokenizer.vocab_size} tokens, more than the model's {most}")


def _ids(content: Content) -> dict[str, Any]:
    """Begin and end tokens; the tokenizer's own end of text first, where it ends an answer."""
    tokenizer, ends = content.tokenizer, content.end_ids
    eos = tokenizer.eos_id if tokenizer is not None else None
    ordered = sorted(ends, key=lambda index: index != eos)
    found: dict[str, Any] = dict(zip(ENDS, ordered, strict=False))
    if len(ends) > len(ENDS):
        found[MORE_ENDS] = list(ends)
    bos = content.bos_id
    if tokenizer is not None and tokenizer.bos_id is not None:
        bos = tokenizer.bos_id
    return found if bos is None else {BOS: bos, **found}


def _is_byte_level(codec: Codec) -> bool:
    if isinstance(codec, SentencePieceCodec | TiktokenCodec):
        return isinstance(codec, TiktokenCodec)
    steps = codec.definition().get("decoder") or {}
    return any(step.get("type") == "ByteLevel" for step in [steps, *steps.get("decoders", [])])


def _sentencepiece(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    model = _pieces(tokenizer.codec)
    faults = {
        "it is not a BPE model": model.model_type != protobuf.BPE,
        "it normalises characters": model.has_character_map,
        "it writes white space as a suffix": model.whitespace_is_suffix,
        "it does not escape white space": not model.escape_whitespaces,
    }
    _refuse(faults)
    kinds = [piece.type for piece in model.pieces]
    ordinary = [
        index
        for index, piece in enumerate(model.pieces)
        if piece.type == USER_DEFINED and piece.text not in tokenizer.specials
    ]
    found = {
        MODEL: "llama",
        PRE: "default",
        **_tokens([piece.text for piece in model.pieces], kinds, vocab_size),
        SCORES: _filled([piece.score for piece in model.pieces], _FILLER_SCORE, vocab_size),
        DUMMY_PREFIX: model.add_dummy_prefix,
        FEWER_SPACES: model.remove_extra_whitespaces,
    }
    return {**found, ORDINARY: ordinary} if ordinary else found


def _pieces(codec: Codec) -> protobuf.Model:
    if isinstance(codec, SentencePieceCodec):
        return codec.model
    try:
        return protobuf.parse_model(from_json(codec.definition()))
    except TokenizerError as error:
        raise TokenizerError(_INEXPRESSIBLE.format(error)) from None


def _byte_level(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    document = tokenizer.codec.definition()
    model, name = document["model"], name_of(document)
    added = {token["content"]: token for token in document.get("added_tokens") or []}
    _refuse(
        {
            "it changes text before cutting it": document.get("normalizer") is not None,
            "it cuts text in a way that llama.cpp has no name for here": name is None,
            "it drops merges at random": bool(model.get("dropout")),
            "special tokens take spaces with them": any(
                token.get("lstrip") or token.get("rstrip") or token.get("single_word")
                for token in added.values()
            ),
        }
    )
    ids = {**model["vocab"], **{text: token["id"] for text, token in added.items()}}
    texts = [f"[PAD{index}]" for index in range(tokenizer.vocab_size)]
    kinds = [UNUSED] * len(texts)
    for text, index in ids.items():
        texts[index], kinds[index] = text, _kind(text, tokenizer, added)
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    return {MODEL: "gpt2", PRE: name, **_tokens(texts, kinds, vocab_size), MERGES: list(merges)}


def _kind(text: str, tokenizer: Tokenizer, added: Mapping[str, Any]) -> int:
    if text in tokenizer.specials:
        return CONTROL
    return USER_DEFINED if text in added else NORMAL


def _tokens(texts: list[str], kinds: list[int], vocab_size: int) -> dict[str, Any]:
    """Tokens and types; llama.cpp wants as many as the embedding has rows."""
    fillers = [f"[PAD{index}]" for index in range(len(texts), vocab_size)]
    return {TOKENS: texts + fillers, TYPES: _filled(kinds, UNUSED, vocab_size)}


def _filled(values: Sequence[Any], filler: Any, size: int) -> list[Any]:
    return [*values, *[filler] * (size - len(values))]


def _refuse(faults: Mapping[str, bool]) -> None:
    for fault, found in faults.items():
        if found:
            raise TokenizerError(_INEXPRESSIBLE.format(fault))
