"""tokenizer.json of Hugging Face: byte-level and SentencePiece-style vocabularies."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import tokenizers

from puna.errors import TokenizerError
from puna.tokenizer.codec import BYTE_PIECE, PLACEHOLDER, VOCABULARY_LIMIT, ParseOptions, Vocabulary
from puna.tokenizer.export import BYTE_OF
from puna.tokenizer.json_steps import check_steps
from puna.tokenizer.sidecar import parse_json

LeadingSpace = Literal["each", "first", "none"]
Document = dict[str, Any]
# Where no file beside it names the end of a text.
_USUAL_EOS = ("</s>", "<|end_of_text|>", "<|endoftext|>")


class JsonCodec:
    """Encodes with the tokenizers library itself.

    Special tokens in text stay text (`encode_special_tokens`); added tokens that the file does not call
    special are ordinary vocabulary, and text does become them.
    """

    kind = "tokenizer.json"

    def __init__(
        self,
        data: bytes,
        bos: str | None = None,
        eos: str | int | None = None,
        unk: str | None = None,
        add_bos: bool | None = None,
    ) -> None:
        """The special tokens' names (or the id of EOS) come from the files beside it.

        Raises:
            TokenizerError: `data` is not such a file, or of a kind that is not supported.
        """
        self._arguments = (data, bos, eos, unk, add_bos)
        self._document = _with_specials(read_document(data), {bos, eos, unk})
        self._library = _open(self._document)
        rest = _without_first_prefix(self._document)
        self._rest = self._library if rest is None else _open(rest)
        self.vocabulary = self._read_vocabulary(bos, eos, unk, add_bos)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return JsonCodec, self._arguments

    def encode(self, text: str, first: bool) -> list[int]:
        """Only the first stretch gets the leading space where the file says so."""
        library = self._library if first else self._rest
        return _guarded(lambda: library.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """On the library's own threads, whose number it chooses itself."""
        if threads == 1:
            return [self.encode(text, True) for text in texts]
        rows = _guarded(lambda: self._library.encode_batch_fast(list(texts), add_special_tokens=False))
        return [row.ids for row in rows]

    def name(self, index: int) -> str:
        """The token as the file spells it; empty where the vocabulary has a gap."""
        return self._library.id_to_token(index) or ""

    def definition(self) -> Document:
        """The file itself."""
        return self._document

    def originals(self) -> dict[str, bytes]:
        """tokenizer.json, unchanged."""
        return {"tokenizer.json": self._arguments[0]}

    def identity(self) -> bytes:
        """The file as canonical JSON."""
        return b"json\0" + json.dumps(self._document, sort_keys=True).encode()

    def _read_vocabulary(
        self, bos: str | None, eos: str | int | None, unk: str | None, add_bos: bool | None
    ) -> Vocabulary:
        ids: dict[str, int] = self._library.get_vocab(with_added_tokens=True)
        added = self._library.get_added_tokens_decoder()
        specials = {token.content: index for index, token in added.items() if token.special}
        parse = {
            token.content: ParseOptions(token.lstrip, token.rstrip, token.single_word)
            for token in added.values()
            if token.content in specials and (token.lstrip or token.rstrip or token.single_word)
        }
        byte_level = _is_byte_level(self._document)
        texts = [b""] * (max(ids.values(), default=-1) + 1)
        for token, index in ids.items():
            texts[index] = _byte_level_text(token) if byte_level else _piece_text(token)
        for index, extra in added.items():
            texts[index] = extra.content.encode()
        unk = unk or self._document["model"].get("unk_token")
        eos = next((name for name in _USUAL_EOS if name in specials), None) if eos is None else eos
        return Vocabulary(
            texts=texts,
            specials=dict(sorted(specials.items(), key=lambda item: item[1])),
            bos_id=self._bos(ids, bos, add_bos),
            eos_id=ids.get(eos) if isinstance(eos, str) else self._known(eos),
            unk_id=ids.get(unk) if unk is not None else None,
            raw=frozenset()
            if byte_level
            else frozenset(i for t, i in ids.items() if BYTE_PIECE.fullmatch(t)),
            leading_space=_leading_space(self._document),
            broken="prefix" if byte_level else "each",
            parse=parse,
            strips="all" if any(step.get("start", 0) > 1 for step in _strip_steps(self._document)) else "one",
        )

    def _bos(self, ids: Mapping[str, int], bos: str | None, add_bos: bool | None) -> int | None:
        """What this tokenizer puts before a text: many name a BOS token that they never use."""
        if add_bos is not None:
            return ids.get(bos) if bos is not None and add_bos else None
        with_specials = _guarded(lambda: self._library.encode("", add_special_tokens=True).ids)
        index = with_specials[0] if with_specials else None
        return self._known(index) if bos is None or index == ids.get(bos) else None

    def _known(self, index: int | None) -> int | None:
        """An id that the vocabulary has; a file may name others."""
        known = index is not None and 0 <= index < VOCABULARY_LIMIT and self._library.id_to_token(index)
        return index if known else None


def read_document(data: bytes) -> Document:
    """A tokenizer.json as an object, with its ids checked before any table is made.

    Raises:
        TokenizerError: it is not one, or of a kind that is not supported.
    """
    try:
        document = parse_json(data.decode("utf-8"), "tokenizer.json")
    except UnicodeDecodeError:
        raise TokenizerError("not UTF-8 text; the file is damaged") from None
    model = document.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise TokenizerError("not a tokenizer.json: it has no model with a vocabulary")
    if model.get("type", "BPE") not in ("BPE", "Unigram"):
        raise TokenizerError(f"expected a BPE vocabulary, found {model['type']!r}, which no Llama uses")
    vocab = model["vocab"]
    ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
    added = document.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise TokenizerError("not a tokenizer.json: added_tokens must be a list of objects")
    ids += [token.get("id") for token in added]
    wrong = next((i for i in ids if not isinstance(i, int) or not 0 <= i < VOCABULARY_LIMIT), None)
    if wrong is not None:
        raise TokenizerError(
            f"id {wrong!r} in the vocabulary is not a number from 0 to {VOCABULARY_LIMIT - 1}"
        )
    _refuse_options(model)
    check_steps(document)
    return document


def _refuse_options(model: Document) -> None:
    """Settings that make ids a matter of chance, or on which the library ends the process."""
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise TokenizerError(f"the vocabulary's setting {name!r}, which no Llama uses, is not supported")


def _with_specials(document: Document, names: Collection[str | int | None]) -> Document:
    """Tokens that the files beside it call special, marked so here too, or text would become them."""
    added = [
        {**t, "special": t.get("special") or t.get("content") in names}
        for t in document.get("added_tokens") or []
    ]
    return {**document, "added_tokens": added}


def _open(document: Document) -> tokenizers.Tokenizer:
    library = _guarded(lambda: tokenizers.Tokenizer.from_str(json.dumps(document)))
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True
    return library


def _guarded(call: Callable[[], Any]) -> Any:
    """What the library gives; it may find only now that a file contradicts itself."""
    try:
        return call()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of the library derives from BaseException
        raise TokenizerError(f"not a tokenizer.json that can be used: {str(error).splitlines()[0]}") from None


def _parts(document: Document, role: str) -> Iterator[Document]:
    """The steps of a normalizer, pre-tokenizer or decoder, whether it is a sequence or one step."""
    step = document.get(role)
    if not isinstance(step, dict):
        return
    if step.get("type") == "Sequence":
        plural = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
        yield from (part for part in step.get(plural[role], []) if isinstance(part, dict))
    else:
        yield step


def _is_byte_level(document: Document) -> bool:
    steps = [*_parts(document, "decoder"), *_parts(document, "pre_tokenizer")]
    if any(step.get("type") == "ByteLevel" for step in steps):
        return True
    if any(step.get("type") in ("ByteFallback", "Metaspace", "Replace") for step in steps):
        return False
    raise TokenizerError(
        "neither a byte-level nor a SentencePiece-style vocabulary; only these are supported"
    )


def _scheme(step: Document) -> str:
    """When a Metaspace step prepends a space; old files say so with a flag."""
    default = "always" if step.get("add_prefix_space", True) else "never"
    return step.get("prepend_scheme") or default


def _leading_space(document: Document) -> LeadingSpace:
    """Which spaces encoding adds, as far as the file's decoder takes them away again."""
    strips = any(step.get("start", 0) > 0 for step in _strip_steps(document))
    metaspace = [step for step in _parts(document, "decoder") if step.get("type") == "Metaspace"]
    if not strips and not any(_scheme(step) != "never" for step in metaspace):
        return "none"
    if any(step.get("type") == "Prepend" for step in _parts(document, "normalizer")):
        return "each"
    schemes = [_scheme(s) for s in _parts(document, "pre_tokenizer") if s.get("type") == "Metaspace"]
    return "each" if "always" in schemes else "first"


def _strip_steps(document: Document) -> Iterator[Document]:
    return (step for step in _parts(document, "decoder") if step.get("type") == "Strip")


def _without_first_prefix(document: Document) -> Document | None:
    """The same tokenizer for text that does not come first, where that makes a difference."""
    changed = copy.deepcopy({"pre_tokenizer": document.get("pre_tokenizer")})
    steps = [step for step in _parts(changed, "pre_tokenizer") if step.get("type") == "Metaspace"]
    if not any(_scheme(step) == "first" for step in steps):
        return None
    for step in steps:
        step["prepend_scheme"] = "never"
    return {**document, **changed}


def _byte_level_text(token: str) -> bytes:
    try:
        return bytes(BYTE_OF[character] for character in token)
    except KeyError:
        return token.encode()


def _piece_text(token: str) -> bytes:
    match = BYTE_PIECE.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace(PLACEHOLDER, " ").encode()
