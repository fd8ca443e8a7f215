"""The text that a quantization is fitted to and measured on, as sequences of tokens.

A sequence is BOS and the tokens that follow it in the text. What is measured on is not fitted to: the first
sequences are put aside for that, so that all schemes are measured on the same.

    T positions in the input
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from puna.data.inputs import list_files
from puna.data.readers import Document, read
from puna.data.shardfile import MAGIC, map_shard
from puna.data.stdlib import standard_library
from puna.errors import DataError
from puna.model.config import ModelConfig
from puna.model.counts import parameters
from puna.progress import counted
from puna.settings import Settings
from puna.tokenizer.tokenizer import Tokenizer

STDLIB = "the source of Python's standard library"
_LONGEST = 2048  # positions of a sequence, where nothing else is asked
_FITTED = 128  # sequences to fit to, as in arXiv 2210.17323
_OPERATIONS = 2e13  # of one pass of the measuring text: some minutes on two cores
_MEASURED = (2048, 32768)  # tokens, at least and at most, where their number follows from that
_FEWEST = 4  # sequences, which a short text is cut into
_ENOUGH = 64  # tokens without which no figure says anything
_STRETCH = 1 << 16  # characters encoded at once, so that of a long text no more is than is needed


class CalibrationSettings(Settings):
    """How much text, and in which pieces.

    Attributes:
        sequences: how many to fit to. None: 128, or as many as the text gives.
        measured: how many to measure on. None: by the model's size, 2,048 to 32,768 tokens.
        length: positions of a sequence. None: 2,048, or the model's context where that is shorter.
        field: what holds the text in JSON lines.
        separator: divides a text file into documents.
    """

    sequences: int | None = Field(default=None, ge=1, le=1 << 16)
    measured: int | None = Field(default=None, ge=1, le=1 << 12)
    length: int | None = Field(default=None, ge=8, le=1 << 17)
    field: str = "text"
    separator: str | None = None


@dataclass(frozen=True)
class Text:
    """Sequences to measure on (B, T), and to fit to (A, T) where any are; where they are from."""

    measured: Tensor
    fitted: Tensor
    origin: str
    fitted_origin: str

    @property
    def sha256(self) -> str:
        """Of every id, and of how they are divided."""
        digest = hashlib.sha256()
        for part in (self.measured, self.fitted):
            digest.update(f"{list(part.shape)}".encode())
            digest.update(part.numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def read_text(
    files: Sequence[Path],
    measure_on: Sequence[Path],
    tokenizer: Tokenizer | None,
    config: ModelConfig,
    settings: CalibrationSettings,
    fits: int,
) -> Text | None:
    """The sequences for a model; None where it has no tokenizer and no ids are given.

    Args:
        files: text, JSON lines, parquet; or ids as .npy or as a token shard. None of them: the standard
            library's source.
        measure_on: the same, to measure on; without it the first sequences of `files` are, and not fitted to.
        tokenizer: makes ids of text.
        config: the model's.
        settings: how much.
        fits: tokens to fit to at least; 0 where nothing is fitted.

    Raises:
        DataError: a file cannot be read, the text is too short, or ids are beyond the vocabulary.
    """
    if tokenizer is None and not files and not measure_on:
        return None
    cutter = _Cutter(tokenizer, config, settings)
    measured, fitted = settings.measured or cutter.measured, (settings.sequences or _FITTED) if fits else 0
    if measure_on or not fits:
        rows, origin = cutter.rows(measure_on or files, measured, settings.measured)
        others, fitted_origin = cutter.rows(files, fitted, settings.sequences) if fits else (rows[:0], origin)
    else:
        asked = (settings.measured or 1) + (settings.sequences or 1)
        both, origin = cutter.rows(files, measured + fitted, asked)
        if len(both) < measured + fitted:  # all there is, in the same proportion
            share = settings.measured or max(1, round(len(both) * measured / (measured + fitted)))
            measured = min(share, len(both) - (settings.sequences or 1))
        rows, others, fitted_origin = both[:measured], both[measured:], origin
    _check_amount(rows, _ENOUGH, f"{origin} gives", "to measure on")
    _check_amount(
        others, fits, f"{fitted_origin} gives", "to fit to, as many as the widest matrix has inputs"
    )
    return Text(rows, others, origin, fitted_origin)


def _check_amount(rows: Tensor, least: int, who: str, what: str) -> None:
    if rows.numel() < least:
        raise DataError(
            f"{who} {counted(len(rows), 'sequence')} of {rows.shape[1]:,} tokens, and {least:,} tokens are "
            f"needed {what}; give more text with --calibration"
        )


@dataclass(frozen=True)
class _Cutter:
    """Cuts texts into sequences for a model."""

    tokenizer: Tokenizer | None
    config: ModelConfig
    settings: CalibrationSettings

    @property
    def length(self) -> int:
        """Positions of a sequence.

        Raises:
            DataError: the model has fewer than are asked for.
        """
        asked, context = self.settings.length, self.config.max_position_embeddings
        if asked is not None and asked > context:
            raise DataError(f"calibration.length is {asked}, and the model's context {context}; lower it")
        return asked or min(_LONGEST, context)

    @property
    def measured(self) -> int:
        """Sequences that take about the same time with models of any size."""
        low, high = _MEASURED
        tokens = min(max(int(_OPERATIONS / (2 * parameters(self.config).total)), low), high)
        return max(1, tokens // self.length)

    @property
    def bos(self) -> int | None:
        """What each sequence begins with."""
        index = None if self.tokenizer is None else self.tokenizer.bos_id
        return index if index is not None and index < self.config.vocab_size else None

    def rows(self, files: Sequence[Path], count: int, asked: int | None) -> tuple[Tensor, str]:
        """At most `count` sequences (rows, T), and where they are from.

        Raises:
            DataError: there are not as many as were asked for, or ids are none of the model's.
        """
        origin = ", ".join(path.name for path in files) or STDLIB
        room = self.length - (self.bos is not None)
        ids = _taken(self._stream(files), count * room)
        self._check_ids(ids, origin)
        if (
            len(ids) < min(count, _FEWEST) * room and self.settings.length is None
        ):  # a short text is cut shorter
            room = max(1, len(ids) // _FEWEST)
        rows = torch.from_numpy(ids[: len(ids) // room * room].reshape(-1, room).copy())
        if len(rows) < (asked or 0):
            raise DataError(
                f"{origin} gives {counted(len(rows), 'sequence')} of {self.length:,} tokens, and {asked} "
                "are asked for; give more text with --calibration, or ask for fewer"
            )
        begin = rows.new_full((len(rows), 1), self.bos or 0)
        return (rows if self.bos is None else torch.cat([begin, rows], dim=1)), origin

    def _stream(self, files: Sequence[Path]) -> Iterator[NDArray]:
        return _ids(files, self.tokenizer, self.settings) if files else _library_ids(self.tokenizer)

    def _check_ids(self, ids: NDArray, origin: str) -> None:
        least, most = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
        if least < 0 or most >= self.config.vocab_size:
            raise DataError(
                f"{origin}: expected ids from 0 to {self.config.vocab_size - 1}, got {least} to {most}; the "
                "tokenizer or the ids are another model's"
            )


def _ids(
    files: Sequence[Path], tokenizer: Tokenizer | None, settings: CalibrationSettings
) -> Iterator[NDArray]:
    """An equal share of every file, where there are several: their streams take turns."""
    streams = [_file_ids(file.path, tokenizer, settings) for file in list_files(files)]
    while streams:
        for stream in list(streams):
            piece = next(stream, None)
            if piece is None:
                streams.remove(stream)
            else:
                yield piece


def _file_ids(path: Path, tokenizer: Tokenizer | None, settings: CalibrationSettings) -> Iterator[NDArray]:
    if _is_shard(path):
        _, shard = map_shard(path)
        yield from (shard.tokens[at : at + _STRETCH] for at in range(0, len(shard.tokens), _STRETCH))
    elif path.suffix == ".npy":
        yield _array(path)
    elif tokenizer is None:
        raise DataError(
            f"{path} is text, and the model has no tokenizer: name one with --tokenizer, or give ids (.npy, "
            "or a token shard)"
        )
    else:
        yield from _encoded(read([path], settings.field, settings.separator), tokenizer)


def _library_ids(tokenizer: Tokenizer | None) -> Iterator[NDArray]:
    """Of the modules that `puna demo` holds out, so that its model is measured on what it has not seen."""
    assert tokenizer is not None
    yield from _encoded(iter(standard_library(tests=False).held_out), tokenizer)


def _encoded(documents: Iterator[Document], tokenizer: Tokenizer) -> Iterator[NDArray]:
    """Documents in stretches that end with lines, BOS before each but the first, EOS after it."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    for number, document in enumerate(documents):
        if number:
            yield np.array(end + begin, np.int64)
        for stretch in _stretches(document.text):
            yield np.array(tokenizer.encode(stretch, bos=False), np.int64)


def _stretches(text: str) -> Iterator[str]:
    at = 0
    while at < len(text):
        end = text.rfind("\n", at, at + _STRETCH) + 1
        end = end if end > at and at + _STRETCH < len(text) else at + _STRETCH
        yield text[at:end]
        at = end


def _is_shard(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _array(path: Path) -> NDArray:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not an array of ids: {error}") from None
    if not np.issubdtype(found.dtype, np.integer):
        raise DataError(f"{path}: expected whole numbers, got an array of {found.dtype}; save ids")
    return found.reshape(-1)


def _taken(stream: Iterator[NDArray], count: int) -> NDArray:
    """The first so many ids of a stream, or all."""
    taken, have = [], 0
    for piece in stream:
        taken.append(piece.astype(np.int64)[: count - have])
        have += len(taken[-1])
        if have >= count:
            break
    return np.concatenate(taken) if taken else np.empty(0, np.int64)
