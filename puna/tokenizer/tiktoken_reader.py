"""tiktoken's tokenizer.model: Llama 3."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tiktoken

from puna.errors import TokenizerError
from puna.tokenizer import export
from puna.tokenizer.codec import VOCABULARY_LIMIT, Vocabulary

# How Llama 3 cuts text before merging: contractions, words with one sign before them, up to three digits,
# signs with the line ends after them, line ends, white space. From Meta's llama3, tokenizer.py.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = 256
_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
# tiktoken's expression gives up on longer runs of white space; Meta's code cuts them at the same length.
LONGEST_SPACE = 25_000
_LONG_SPACE = re.compile(rf"\s{{{LONGEST_SPACE + 1},}}")
_ROW = re.compile(rb"([A-Za-z0-9+/]+=*) (\d{1,9})")


class TiktokenCodec:
    """Encodes with the tiktoken library itself, by Llama 3's rules."""

    kind = "tiktoken"

    def __init__(self, data: bytes, names: Mapping[int, str] | None = None) -> None:
        """`names` are other names of special tokens, by id (Llama 3.1 named some of the reserved ones).

        Raises:
            TokenizerError: `data` is not a list of ranks.
        """
        self._data, self._names = data, dict(names or {})
        self._ranks = read_ranks(data)
        specials = special_names(len(self._ranks), self._names)
        self._library = tiktoken.Encoding(
            "puna", pat_str=PATTERN, mergeable_ranks=self._ranks, special_tokens=specials
        )
        bos, eos = len(self._ranks), len(self._ranks) + 1
        texts = [*sorted(self._ranks, key=self._ranks.__getitem__), *(name.encode() for name in specials)]
        self.vocabulary = Vocabulary(
            texts=texts,
            specials=specials,
            bos_id=bos,
            eos_id=eos,
            unk_id=None,
            raw=frozenset(),
            leading_space="none",
            broken="prefix",
        )

    def __reduce__(self) -> tuple[type, tuple[bytes, dict[int, str]]]:
        return TiktokenCodec, (self._data, self._names)

    def encode(self, text: str, first: bool) -> list[int]:
        """Special tokens in the text stay text."""
        return [index for part in _cut_long_space(text) for index in self._library.encode_ordinary(part)]

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """The library lets other threads run while it encodes."""
        if threads == 1:
            return [self.encode(text, True) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda text: self.encode(text, True), texts))

    def name(self, index: int) -> str:
        r"""The token's text, with bytes that are no character as \xNN."""
        return self.vocabulary.texts[index].decode("utf-8", errors="backslashreplace")

    def definition(self) -> dict[str, Any]:
        """A tokenizer.json that gives the same ids."""
        return export.from_ranks(self._ranks, PATTERN, self.vocabulary)

    def originals(self) -> dict[str, bytes]:
        """tokenizer.model, unchanged."""
        return {"tokenizer.model": self._data}

    def identity(self) -> bytes:
        """The ranks' file and the names of the special tokens."""
        return b"\0".join([b"tiktoken", self._data, *(name.encode() for name in self.vocabulary.specials)])


def looks_like_ranks(data: bytes) -> bool:
    """Whether the first line is a token in base 64 and a number."""
    return _ROW.fullmatch(data.partition(b"\n")[0].rstrip(b"\r")) is not None


def read_ranks(data: bytes) -> dict[bytes, int]:
    """Token → rank, of a file with one of each per line.

    Raises:
        TokenizerError: a line is malformed, or the ranks are not 0, 1, 2, … with all single bytes.
    """
    ranks: dict[bytes, int] = {}
    lines = data.splitlines()
    if len(lines) > VOCABULARY_LIMIT:
        raise TokenizerError(f"{len(lines)} lines of ranks are beyond the limit of {VOCABULARY_LIMIT}")
    for number, line in enumerate(lines, 1):
        match = _ROW.fullmatch(line)
        if match is None:
            if not line.strip():
                continue
            raise TokenizerError(f"line {number} of the ranks is not a token in base 64 and a number")
        try:
            token = base64.b64decode(match[1], validate=True)
        except binascii.Error:
            raise TokenizerError(f"line {number} of the ranks is not valid base 64") from None
        if token in ranks or int(match[2]) != len(ranks):
            raise TokenizerError(f"line {number} of the ranks: expected a new token with rank {len(ranks)}")
        ranks[token] = len(ranks)
    missing = sum(bytes([byte]) not in ranks for byte in range(256))
    if missing:
        raise TokenizerError(
            f"the ranks lack {missing} of the 256 single bytes; the file is damaged or cut short"
        )
    return ranks


def special_names(ranks: int, names: Mapping[int, str]) -> dict[str, int]:
    """Name → id of Llama 3's 256 special tokens, which follow the ranks; `names` replaces some.

    Raises:
        TokenizerError: two ids have one name.
    """
    reserved = (f"<|reserved_special_token_{n}|>" for n in range(SPECIALS))
    usual = [_NAMED[n] if n in _NAMED else next(reserved) for n in range(SPECIALS)]
    specials = {names.get(ranks + n, name): ranks + n for n, name in enumerate(usual)}
    if len(specials) != SPECIALS:
        raise TokenizerError("two special tokens have the same name in tokenizer_config.json")
    return specials


def _cut_long_space(text: str) -> Iterator[str]:
    at = 0
    for match in _LONG_SPACE.finditer(text) if len(text) > LONGEST_SPACE else ():
        # Meta's code lets a stretch begin with LONGEST_SPACE white characters, then starts the next.
        for end in range(match.start() + LONGEST_SPACE, match.end(), LONGEST_SPACE):
            yield text[at:end]
            at = end
    if at < len(text):
        yield text[at:]
