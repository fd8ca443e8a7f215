"""A new tokenizer by LLaMA's rules, with SentencePiece's own trainer.

The rules (LLaMA, section 2.1, and the settings stored in the published tokenizer.model): byte-pair
encoding; every number is split into digits; unknown characters fall back to bytes; no normalisation;
white space is kept, and runs of it are pieces; a space before every text; ids 0, 1, 2 are unknown, BOS, EOS.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import re
import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import sentencepiece
from pydantic import Field

from puna.errors import TokenizerError
from puna.progress import Track, Tracker, silent
from puna.settings import Settings
from puna.tokenizer.codec import VOCABULARY_LIMIT
from puna.tokenizer.sentencepiece_reader import SentencePieceCodec
from puna.tokenizer.tokenizer import Tokenizer

SPECIALS = 3  # unknown, BOS, EOS
SMALLEST = 256 + SPECIALS + 1
# The trainer drops, without a word, sentences that are too long or hold one of these two characters, and
# fails on words beyond 65,535 characters: texts reach it in stretches of at most STRETCH, split at both.
STRETCH = 4096
_DROPPED = re.compile("[\0\u2585]")
_BLOCK = 64 * 1024  # characters; what a sample takes or leaves as a whole
_LIMIT_IN_MESSAGE = re.compile(r"value <= (\d+)")
_NEEDED_IN_MESSAGE = re.compile(r"required_chars\. \d+ vs (\d+)")


class TokenizerSettings(Settings):
    r"""What to train.

    `sample_bytes` bounds what is learned from: of more text, a fixed sample spread over all of it is taken.
    `character_coverage` is the share of the text's characters that get ids of their own; the rest are
    written as bytes. `newlines` as "bytes" is LLaMA's way, each line for itself; "learned" makes pieces such
    as ":\n", and takes fewer tokens for source code. `split_scripts` keeps letters and signs in separate
    pieces, as LLaMA does.
    """

    vocab_size: int = Field(32_000, ge=SMALLEST, le=VOCABULARY_LIMIT)
    sample_bytes: int = Field(32_000_000, ge=1)
    character_coverage: float = Field(0.99995, gt=0.0, le=1.0)
    newlines: Literal["bytes", "learned"] = "bytes"
    split_scripts: bool = True


def train(
    texts: Iterable[str],
    settings: TokenizerSettings,
    destination: str | Path | None = None,
    track: Track = silent,
    total_bytes: int = 0,
) -> Tokenizer:
    """Train on texts; `destination` is the directory to save to.

    `total_bytes` is how much text there is, where that is known, for the progress alone.

    The same texts in the same order and the same settings give the same bytes.

    Raises:
        TokenizerError: there is no text, or it supports only a smaller or a larger vocabulary.
    """
    with track("Reading text for the tokenizer", total_bytes, "B") as bar:
        blocks = sample(_counted(texts, bar), settings.sample_bytes)
    with track("Training the tokenizer", settings.vocab_size, "pieces") as bar:
        data = _train(sentences(blocks, settings.newlines), settings)
        bar.advance(settings.vocab_size)
    tokenizer = Tokenizer(SentencePieceCodec(data))
    if destination is not None:
        tokenizer.save(destination)
    return tokenizer


def sample(texts: Iterable[str], limit: int) -> list[str]:
    """At most `limit` bytes of the texts, as blocks in their order; all of them where they are fewer.

    Which blocks stay depends on their place and content alone: those with the smallest hashes.
    """
    kept: list[tuple[int, int, str, int]] = []  # a heap, the largest hash first
    total = 0
    for place, block in enumerate(block for text in texts for block in _blocks(text, _BLOCK)):
        data = block.encode("utf-8", "replace")
        digest = hashlib.blake2b(data, digest_size=8, salt=place.to_bytes(8, "little")).digest()
        heapq.heappush(kept, (-int.from_bytes(digest, "little"), place, block, len(data)))
        total += len(data)
        while total > limit and len(kept) > 1:
            total -= heapq.heappop(kept)[3]
    return [block for _, block in sorted((place, block) for _, place, block, _ in kept)]


def sentences(blocks: Iterable[str], newlines: Literal["bytes", "learned"]) -> Iterator[str]:
    r"""Blocks as the trainer takes them: nothing in them is dropped, however long a line is.

    >>> list(sentences(["a b\nc"], "bytes")), list(sentences(["a b\nc"], "learned"))
    (['a b', 'c'], ['a b\nc'])
    """
    for block in blocks:
        for part in _DROPPED.split(block):
            lines = part.split("\n") if newlines == "bytes" else [part]
            for line in lines:
                yield from _blocks(line, STRETCH)


def _blocks(text: str, size: int) -> Iterator[str]:
    """The text in stretches of at most `size` characters, cut at a line's end or a space where there is one.

    A space at a cut is left out: the trainer puts one before every stretch.
    """
    at = 0
    while len(text) - at > size:
        newline = text.rfind("\n", at + 1, at + size)
        space = -1 if newline > 0 else text.rfind(" ", at + 1, at + size)
        end = max(newline + 1, space) if max(newline, space) > 0 else at + size
        yield text[at:end]
        at = end + 1 if space > 0 else end
    if at < len(text):
        yield text[at:]


def _counted(texts: Iterable[str], bar: Tracker) -> Iterator[str]:
    for text in texts:
        yield text
        bar.advance(len(text.encode("utf-8", "replace")))


def _train(lines: Iterator[str], settings: TokenizerSettings) -> bytes:
    """The bytes of a model file.

    Raises:
        TokenizerError: as `train`.
    """
    output = io.BytesIO()
    valid = (line.encode("utf-8", "replace").decode() for line in lines)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=valid,
            model_writer=output,
            model_type="bpe",
            vocab_size=settings.vocab_size,
            character_coverage=settings.character_coverage,
            max_sentence_length=8 * STRETCH,  # bytes
            split_digits=True,
            required_chars=string.digits,  # a digit is one token, however rare it is in the text
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            allow_whitespace_only_pieces=True,
            split_by_unicode_script=settings.split_scripts,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,  # BPE training uses no more, and the number is stored in the file
            minloglevel=2,
        )
    except RuntimeError as error:
        raise TokenizerError(_explain(str(error), settings)) from None
    return output.getvalue()


def _explain(message: str, settings: TokenizerSettings) -> str:
    size = settings.vocab_size
    if limit := _LIMIT_IN_MESSAGE.search(message):
        return f"vocab_size {size} is larger than the text supports; lower it to {limit[1]} or give more text"
    if needed := _NEEDED_IN_MESSAGE.search(message):
        characters = int(needed[1]) - 256 - SPECIALS
        return (
            f"vocab_size {size} is too small: this text needs {needed[1]} (256 bytes, {SPECIALS} special"
            f" tokens, {characters} characters); raise it, or lower character_coverage"
        )
    if "sentences_.empty()" in message:
        return "there is no text to train a tokenizer on; give at least one file with text"
    return f"the tokenizer could not be trained: {message.splitlines()[0]}"
