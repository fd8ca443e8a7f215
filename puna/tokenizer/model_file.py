"""tokenizer.model for tokenizers that came as tokenizer.json, where such a file gives the same ids."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from puna.errors import TokenizerError
from puna.tokenizer import export, sentencepiece_writer
from puna.tokenizer.codec import Codec
from puna.tokenizer.merges import by_token
from puna.tokenizer.sentencepiece_reader import SentencePieceCodec
from puna.tokenizer.tiktoken_reader import PATTERN, SPECIALS, TiktokenCodec

_INEXPRESSIBLE = "this byte-level tokenizer.json cannot be written as Llama 3's ranks with the same ids: {}"


def model_file(codec: Codec) -> Codec:
    """The codec of a tokenizer.model: the one given, or a SentencePiece model or ranks made of its JSON.

    Raises:
        TokenizerError: no such file gives the same ids.
    """
    if "tokenizer.model" in codec.originals():
        return codec
    document = codec.definition()
    try:
        byte_level = "ByteLevel" in str(document.get("pre_tokenizer"))
        if byte_level:
            return _ranks(document, codec.vocabulary.specials)
        return SentencePieceCodec(sentencepiece_writer.from_json(document))
    except (KeyError, TypeError, AttributeError):
        raise TokenizerError("not a tokenizer.json: a part of it is missing or of the wrong type") from None


def _ranks(document: Mapping[str, Any], specials: Mapping[str, int]) -> TiktokenCodec:
    """Llama 3's file: every token that is no special one, in the order of ids, which is that of merging."""
    vocab = {token: index for token, index in document["model"]["vocab"].items() if token not in specials}
    ordered = sorted(vocab, key=vocab.__getitem__)
    if [vocab[token] for token in ordered] != list(range(len(ordered))):
        raise TokenizerError(_INEXPRESSIBLE.format("the ids of its tokens have gaps"))
    if sorted(specials.values()) != list(range(len(ordered), len(ordered) + SPECIALS)):
        raise TokenizerError(
            _INEXPRESSIBLE.format(f"it does not have {SPECIALS} special tokens after the others")
        )
    try:
        tokens = [bytes(export.BYTE_OF[character] for character in token) for token in ordered]
    except KeyError:
        raise TokenizerError(_INEXPRESSIBLE.format("a token is not spelled in bytes")) from None
    data = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    codec = TiktokenCodec(data, {index: name for name, index in specials.items()})
    _check(document, codec.definition())
    return codec


def _check(document: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Whether a document cuts and merges as the ranks do."""
    theirs, model = document["model"], ours["model"]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in theirs["merges"]]
    if any(len(pair) != 2 for pair in pairs):
        raise TokenizerError(_INEXPRESSIBLE.format("a merge does not name two tokens"))
    merges = by_token((left, right) for left, right in pairs)
    faults = {
        "it merges in another order": merges != by_token((left, right) for left, right in model["merges"]),
        "it merges whole words too": not theirs.get("ignore_merges"),
        "it changes text before it is cut": document.get("normalizer") is not None,
        "it cuts text in another way": not _cuts_alike(document.get("pre_tokenizer")),
    }
    for fault, found in faults.items():
        if found:
            raise TokenizerError(_INEXPRESSIBLE.format(fault))


def _cuts_alike(step: Any) -> bool:
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    if [part["type"] for part in steps] != ["Split", "ByteLevel"]:
        return False
    split, spell = steps
    return (
        split["pattern"] == {"Regex": PATTERN}
        and (split["behavior"], split["invert"]) == ("Isolated", False)
        and not spell["add_prefix_space"]
        and not spell["use_regex"]
    )
