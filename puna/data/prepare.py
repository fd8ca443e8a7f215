"""Documents → token shards: in parallel, resumable, the same bytes for any number of workers.

A prepared directory holds:

    preparation.json   what it was made from and how; written first
    train/             a TokenSet
    validation/        another, where text was held out

A killed preparation goes on after its last whole shard. Its documents are read again, which costs little
beside tokenizing them. Changed inputs or settings start it anew, and another tokenizer is refused, since
tokens are expensive to make again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.data.encoding import encode_all
from puna.data.holdout import Side, content_hash, keep_apart, split
from puna.data.inputs import InputFile, list_files
from puna.data.readers import Document, ReadReport, read
from puna.data.shardfile import Header, verify_shard, writing
from puna.data.shards import MANIFEST, SHARD_TOKENS, ShardWriter, TokenSet, shard_name
from puna.errors import DataError
from puna.files import sweep, write_atomically
from puna.progress import Track, Tracker, counted, silent
from puna.tokenizer.tokenizer import Tokenizer

RECORD = "preparation.json"
VERSION = 1
SIDES: tuple[Side, ...] = ("validation", "train")  # in the order in which they are completed


@dataclass(frozen=True)
class Prepared:
    """The tokens, and in sentences what was read and what was left out."""

    train: TokenSet
    validation: TokenSet | None
    report: list[str]


@dataclass(frozen=True)
class Work:
    """Documents with their sides, how many bytes they are read from, and the report that reading fills in.

    `made_from` says where the documents come from and how they were chosen: equal values, equal documents.
    """

    entries: Iterable[tuple[Side, Document]]
    sides: Sequence[Side]
    total_bytes: int
    report: ReadReport
    made_from: Mapping[str, Any]


@dataclass(frozen=True)
class Options:
    """How to do the work; neither of them changes which tokens come of it."""

    workers: int | None
    shard_tokens: int
    track: Track


def prepare(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer,
    directory: Path,
    *,
    validation: Sequence[str | Path] = (),
    holdout: float = 0.05,
    field: str = "text",
    separator: str | None = None,
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    track: Track = silent,
) -> Prepared:
    """Tokenize files into `directory`, or open what an earlier call with the same arguments made.

    Args:
        inputs: files, directories and glob patterns.
        validation: the same, of text to hold out; without it, `holdout` is the share taken from `inputs`.
        field, separator: as in `readers.read`.
        workers: threads that tokenize; all cores unless said. They do not change the result.
        shard_tokens: tokens at which a shard is closed.

    Raises:
        DataError: inputs are missing, empty or lack the field; nothing is left to train on or to hold out;
            the directory holds something else. Nothing is left behind.
        ResourceError: the disk is full; whole shards are kept for the next attempt.
    """
    work = _from_files(inputs, validation, holdout, field, separator)
    return _prepare(work, tokenizer, directory, Options(workers, shard_tokens, track))


def prepare_documents(
    train: Sequence[Document],
    validation: Sequence[Document],
    tokenizer: Tokenizer,
    directory: Path,
    *,
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    track: Track = silent,
) -> Prepared:
    """As `prepare`, of documents in memory that are divided already."""
    work = _from_memory(train, validation)
    return _prepare(work, tokenizer, directory, Options(workers, shard_tokens, track))


def open_prepared(directory: Path, fingerprint: str | None = None) -> Prepared:
    """What `prepare` made.

    Raises:
        DataError: it is not there, not finished, damaged, or made with another tokenizer.
    """
    train = TokenSet(directory / "train", fingerprint)
    held_out = directory / "validation"
    validation = TokenSet(held_out, fingerprint) if held_out.is_dir() else None
    return Prepared(train, validation, train.manifest["notes"]["report"])


def _from_files(
    inputs: Sequence[str | Path],
    validation: Sequence[str | Path],
    holdout: float,
    field: str,
    separator: str | None,
) -> Work:
    files, held_out = list_files(inputs), list_files(validation) if validation else []
    total = sum(file.size for file in files)
    report = ReadReport()
    documents = read(inputs, field, separator, report)
    if validation:
        entries = keep_apart(documents, read(validation, field, separator, report), report)
    else:
        entries = split(documents, holdout, total)
    return Work(
        entries=entries,
        sides=SIDES if validation or holdout else ("train",),
        total_bytes=total + sum(file.size for file in held_out),
        report=report,
        made_from={
            "inputs": _digest(_file_identity(file) for file in files),
            "validation": _digest(_file_identity(file) for file in held_out),
            "holdout": 0.0 if validation else holdout,
            "field": field,
            "separator": separator,
        },
    )


def _from_memory(train: Sequence[Document], validation: Sequence[Document]) -> Work:
    report = ReadReport(files=len(train) + len(validation), documents=len(train) + len(validation))

    def counted(documents: Sequence[Document]) -> Iterator[Document]:
        for document in documents:
            report.bytes_read += len(document.encoded())
            yield document

    return Work(
        entries=keep_apart(counted(train), counted(validation), report),
        sides=SIDES if validation else ("train",),
        total_bytes=sum(len(document.encoded()) for document in itertools.chain(train, validation)),
        report=report,
        made_from={
            "inputs": _digest(_document_identity(document) for document in train),
            "validation": _digest(_document_identity(document) for document in validation),
        },
    )


def _prepare(work: Work, tokenizer: Tokenizer, directory: Path, options: Options) -> Prepared:
    record = {
        "version": VERSION,
        "tokenizer": tokenizer.fingerprint,
        **work.made_from,
        "shard_tokens": options.shard_tokens,
    }
    finished = all((directory / side / MANIFEST).is_file() for side in work.sides)
    if finished and _read_record(directory) == record:
        return open_prepared(directory, tokenizer.fingerprint)
    with options.track("Tokenizing", work.total_bytes, "B") as bar:
        _begin(directory, record, bar)
        try:
            writers = {
                side: ShardWriter(
                    directory / side,
                    tokenizer.vocab_size,
                    options.shard_tokens,
                    _whole_shards(directory / side),
                )
                for side in work.sides
            }
            _tokenize(work, tokenizer, writers, options.workers or os.cpu_count() or 1, bar)
        except DataError:
            _clear(directory)
            raise
    return open_prepared(directory, tokenizer.fingerprint)


def _tokenize(
    work: Work, tokenizer: Tokenizer, writers: Mapping[Side, ShardWriter], workers: int, bar: Tracker
) -> None:
    done = {side: writer.documents_total for side, writer in writers.items()}
    if any(done.values()):
        bar.say(f"going on after {counted(sum(done.values()), 'document')} already done")
    shown = 0
    for side, document in encode_all(_without_first(work.entries, done), tokenizer, workers):
        writers[side].add(document)
        bar.advance(work.report.bytes_read - shown)
        shown = work.report.bytes_read
    bar.advance(work.report.bytes_read - shown)
    report = work.report.lines()
    for side, writer in writers.items():
        if not writer.documents_total:
            raise _nothing_for(side, work)
        writer.close(tokenizer.fingerprint, {"report": report})


def _without_first(
    entries: Iterable[tuple[Side, Document]], done: Mapping[Side, int]
) -> Iterator[tuple[Side, Document]]:
    """All but the first so many documents of each side."""
    left = dict(done)
    for side, document in entries:
        if left[side]:
            left[side] -= 1
        else:
            yield side, document


def _begin(directory: Path, record: Mapping[str, Any], bar: Tracker) -> None:
    """Make the directory ready: keep what was made of the same things, clear what was made of others."""
    path = directory / RECORD
    earlier = _read_record(directory)
    if earlier is None and directory.exists() and any(path.name[0] != "." for path in directory.iterdir()):
        raise DataError(f"{directory}: not empty, and not made by preparing data; choose another directory")
    if earlier is not None and earlier.get("tokenizer") != record["tokenizer"]:
        raise DataError(
            f"{directory}: holds the tokens of tokenizer {str(earlier.get('tokenizer'))[:12]}, not of "
            f"{record['tokenizer'][:12]}; choose another directory, or delete this one"
        )
    if earlier not in (None, record):
        changed = [key for key in record if earlier.get(key) != record[key]]
        bar.say(f"{directory}: {', '.join(changed)} changed since it was prepared; preparing it anew")
        _clear(directory)
    directory.mkdir(parents=True, exist_ok=True)
    sweep(directory)
    with writing(path):
        write_atomically(path, json.dumps(record, indent=1) + "\n")


def _read_record(directory: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{directory / RECORD}: cannot be read: {error}; delete the directory") from None
    return record if isinstance(record, dict) else None


def _clear(directory: Path) -> None:
    """Take away what preparing makes, the record last: a kill in between leaves a directory known as ours."""
    for side in SIDES:
        shutil.rmtree(directory / side, ignore_errors=True)
    (directory / RECORD).unlink(missing_ok=True)
    if not any(directory.iterdir()):
        directory.rmdir()


def _whole_shards(directory: Path) -> list[Header]:
    """The headers of the shards, from the first on, that are there and whole."""
    sweep(directory)
    headers: list[Header] = []
    for number in itertools.count():
        try:
            headers.append(verify_shard(directory / shard_name(number)))
        except DataError:  # missing or damaged: it and what follows is written again
            return headers
    raise AssertionError("unreachable")


def _nothing_for(side: Side, work: Work) -> DataError:
    found = f"{counted(work.report.documents, 'document')}, {work.report.bytes_read:,} bytes"
    if side == "train":
        return DataError(f"nothing is left to train on of {found}; add text, or hold out less")
    return DataError(
        f"nothing was held out of {found}: raise holdout, name validation files, or divide the text into "
        "more documents with a separator"
    )


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def _file_identity(file: InputFile) -> bytes:
    return f"{file.name}\0{file.size}\0{file.modified}".encode("utf-8", "surrogateescape")


def _document_identity(document: Document) -> bytes:
    return document.source.encode("utf-8", "replace") + b"\0" + content_hash(document)
