"""Which kind of tokenizer a path holds, told by content."""

from __future__ import annotations

from pathlib import Path

from puna.errors import TokenizerError
from puna.tokenizer import llama2c_vocabulary
from puna.tokenizer.codec import Codec
from puna.tokenizer.json_reader import JsonCodec, read_document
from puna.tokenizer.protobuf import parse_model
from puna.tokenizer.sentencepiece_reader import SentencePieceCodec, plain_symbols
from puna.tokenizer.sentencepiece_writer import extended
from puna.tokenizer.sidecar import Sidecar, read_sidecar
from puna.tokenizer.tiktoken_reader import TiktokenCodec, looks_like_ranks
from puna.tokenizer.tokenizer import Tokenizer

NAMES = ("tokenizer.model", "tokenizer.json")
SIZE_LIMIT = 512 << 20  # bytes; the largest published vocabularies take about 35 MB
# Tokens that end an answer in published chat models, and that their base vocabularies already hold.
_END_NAMES = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>")


def load(path: str | Path) -> Tokenizer:
    """The tokenizer in a file of any kind, or in a directory with a tokenizer.model or tokenizer.json.

    The files beside it (tokenizer_config.json, generation_config.json, chat_template.jinja, …) are read
    for a directory, and for a file of one of the two usual names. Where a directory holds both, the
    original tokenizer.model is used if tokenizer.json has the same vocabulary; otherwise tokenizer.json,
    which fine-tuned models extend with tokens of their own.

    Raises:
        TokenizerError: nothing is there, or it is damaged, or of no known kind.
    """
    path = Path(path)
    if path.is_dir():
        return _load_directory(path)
    sidecar = read_sidecar(path.parent) if path.name in NAMES else Sidecar()
    return _with_sidecar(_open(path, sidecar), sidecar)


def _load_directory(directory: Path) -> Tokenizer:
    original, modern = (directory / name for name in NAMES)
    sidecar = read_sidecar(directory)
    if original.is_file():
        codec = _open(original, sidecar)
        if modern.is_file() and not _same_vocabulary(codec, modern):
            codec = _open(modern, sidecar)
    elif modern.is_file():
        codec = _open(modern, sidecar)
    else:
        raise TokenizerError(f"{directory}: no tokenizer here; expected {' or '.join(NAMES)}")
    return _with_sidecar(codec, sidecar)


def _open(path: Path, sidecar: Sidecar) -> Codec:
    data = _read(path)
    try:
        if data.lstrip()[:1] == b"{":
            eos = sidecar.eos or next(iter(sidecar.end_ids), None)
            return JsonCodec(data, sidecar.bos, eos, sidecar.unk, sidecar.add_bos)
        if looks_like_ranks(data):
            return TiktokenCodec(data, sidecar.added)
        if llama2c_vocabulary.looks_like_vocabulary(data):
            return llama2c_vocabulary.read(data)
        data = extended(data, _names_beyond(len(parse_model(data).pieces), sidecar))
        plain = plain_symbols(data, sidecar.special)
        return SentencePieceCodec(data, add_bos=sidecar.add_bos is not False, plain=plain)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from None


def _names_beyond(size: int, sidecar: Sidecar) -> list[str]:
    """Tokens that the files beside a SentencePiece model add to it, as Alpaca and Vicuna do, by id.

    Raises:
        TokenizerError: their ids do not follow those of the model.
    """
    beyond = {index: name for index, name in sidecar.added.items() if index >= size}
    wrong = next((index for place, index in enumerate(sorted(beyond)) if index != size + place), None)
    if wrong is not None:
        raise TokenizerError(
            f"the files beside it add a token with id {wrong}, and not all from {size}, where its own end"
        )
    return [beyond[index] for index in sorted(beyond)]


def _with_sidecar(codec: Codec, sidecar: Sidecar) -> Tokenizer:
    specials, size = codec.vocabulary.specials, len(codec.vocabulary.texts)
    named = [specials[name] for name in _END_NAMES if name in specials]
    ends = [index for index in sidecar.end_ids if 0 <= index < size]
    return Tokenizer(codec, [*ends, *named], sidecar.chat_template, sidecar.extras)


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > SIZE_LIMIT:
            raise TokenizerError(f"{path}: {size} bytes; no tokenizer file is larger than {SIZE_LIMIT}")
        data = path.read_bytes()
    except FileNotFoundError:
        raise TokenizerError(f"{path}: no such file or directory") from None
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from None
    if not data.strip():
        raise TokenizerError(f"{path}: the file is empty")
    return data


def _same_vocabulary(codec: Codec, modern: Path) -> bool:
    """Whether a tokenizer.json holds the same tokens under the same ids, and marks the same as special."""
    try:
        document = read_document(_read(modern))
    except TokenizerError as error:
        raise TokenizerError(f"{modern}: {error}") from None
    added, vocab = document.get("added_tokens") or [], document["model"]["vocab"]
    specials = {token.get("content"): token["id"] for token in added}
    if not all(token.get("special") for token in added):
        return False
    size = len({*specials.values(), *(vocab.values() if isinstance(vocab, dict) else range(len(vocab)))})
    return size == len(codec.vocabulary.texts) and specials.items() <= codec.vocabulary.specials.items()
