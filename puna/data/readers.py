"""Files of many kinds → documents, one after another.

Readers stream: nothing is held whole, and compressed files are decompressed as they are read, so that a small
file that expands without end fills no memory.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import field as fresh
from pathlib import Path
from typing import IO, Any

import zstandard

from puna.data.inputs import InputFile, list_files
from puna.errors import DataError
from puna.progress import counted

SHOWN = 3  # faults of a kind that a report keeps in full
PIECE = 1024  # compressed bytes at a time: they hold 32 MiB at most, whatever they claim
CHUNK = 1 << 20  # bytes taken from a file at a time
LONGEST_LINE = 1 << 26  # bytes of one JSON record
# Bytes of text; what is longer is divided at a line end. Tokenizers hold some 100 bytes for each character.
PASSAGE = 1 << 24
BOM = b"\xef\xbb\xbf"
WINDOW = 1 << 31  # bytes that zstandard may look back: what `zstd --long=31` writes


@dataclass(frozen=True)
class Document:
    """A text and where it came from: the name of its file, with `:line` or `:row` where that holds many."""

    text: str
    source: str

    def encoded(self) -> bytes:
        """The text in UTF-8; lone surrogates, which JSON can smuggle in, take three bytes each."""
        return self.text.encode("utf-8", "surrogatepass")


@dataclass
class ReadReport:
    """What was read and what was passed over; `faults` shows the first few of each kind."""

    files: int = 0
    documents: int = 0
    empty: int = 0
    skipped_files: int = 0
    malformed: int = 0
    repeated: int = 0
    bytes_read: int = 0
    faults: list[str] = fresh(default_factory=list)

    def skip_file(self, name: str, why: str) -> None:
        """Count a file that could not be used, or not to its end."""
        self.skipped_files += 1
        if self.skipped_files <= SHOWN:
            self.faults.append(f"{name}: skipped: {why}")

    def skip_entry(self, source: str, why: str) -> None:
        """Count a line, row or document that could not be used."""
        self.malformed += 1
        if self.malformed <= SHOWN:
            self.faults.append(f"{source}: skipped: {why}")

    def lines(self) -> list[str]:
        """The report in sentences; what did not happen is not mentioned."""
        counts = (
            (self.empty, "empty document", "left out"),
            (self.repeated, "document", "left out of training: held out as well"),
            (self.malformed, "malformed record", "skipped"),
            (self.skipped_files, "unreadable or binary file", "skipped"),
        )
        summary = f"{counted(self.documents, 'document')} from {counted(self.files, 'file')}"
        passed = (f"{counted(count, noun)} {fate}" for count, noun, fate in counts if count)
        return [summary, *passed, *self.faults]


@dataclass(frozen=True)
class Origin:
    """What a reader needs to know of the file it reads."""

    name: str
    field: str
    separator: str | None


Reader = Callable[[IO[bytes], Origin, ReadReport], Iterator[Document]]


class Unreadable(Exception):
    """A file that is not what its name says: it is skipped and counted, the others are read."""


def read(
    inputs: Sequence[str | Path],
    field: str = "text",
    separator: str | None = None,
    report: ReadReport | None = None,
) -> Iterator[Document]:
    """Documents of files, directories and glob patterns.

    Args:
        field: what holds the text in JSON lines and parquet.
        separator: divides a text file into documents, such as "<|endoftext|>"; so do line ends around it.
        report: filled in while documents are taken.

    Raises:
        DataError: an input is missing, none holds a document, or `field` is not there.
    """
    files = list_files(inputs)
    return _read(files, field, separator, report if report is not None else ReadReport())


def _read(
    files: list[InputFile], field: str, separator: str | None, report: ReadReport
) -> Iterator[Document]:
    documents = report.documents
    for file in files:
        yield from _read_file(file, Origin(file.name, field, separator), report)
    if report.documents == documents:
        why = "; ".join(report.faults) or "all are empty"
        raise DataError(f"no documents in {counted(len(files), 'file')}, the first {files[0].path}: {why}")


def _read_file(file: InputFile, origin: Origin, report: ReadReport) -> Iterator[Document]:
    report.files += 1
    before = report.bytes_read
    try:
        with file.path.open("rb") as raw:
            stream, reader = _open(file.path, raw)
            for document in reader(stream, origin, report):
                report.bytes_read = before + raw.tell()
                if not document.text or document.text.isspace():
                    report.empty += 1
                    continue
                report.documents += 1
                yield document
    except (Unreadable, OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        report.skip_file(origin.name, str(error))
    report.bytes_read = before + file.size


def _open(path: Path, raw: IO[bytes]) -> tuple[IO[bytes], Reader]:
    """The file as it was before compression, and who reads it."""
    suffix = path.suffix.lower()
    if suffix not in DECOMPRESSORS:
        return raw, READERS.get(suffix, read_text)
    return DECOMPRESSORS[suffix](raw), READERS.get(Path(path.stem).suffix.lower(), read_text)


def read_text(stream: IO[bytes], origin: Origin, report: ReadReport) -> Iterator[Document]:
    """UTF-8 text: one document, or several with a separator between them; very long ones in passages.

    Raises:
        Unreadable: the file, or its first passage, is not text.
    """
    separator = (origin.separator or "").encode("utf-8")
    for number, (line, data) in enumerate(_stretches(stream, separator)):
        begins = line + _leading_lines(data) if separator else line
        source = f"{origin.name}:{begins}" if number or separator else origin.name
        try:
            text = _decode(data)
        except Unreadable as error:
            if number == 0:
                raise
            report.skip_entry(source, str(error))
            continue
        if separator:
            text = text.strip("\r\n")
        if text or not separator:  # nothing between two separators is no document at all
            yield Document(text, source)


def read_json_lines(stream: IO[bytes], origin: Origin, report: ReadReport) -> Iterator[Document]:
    """One JSON object in each line, with the text in a field.

    Raises:
        DataError: the first record lacks the field.
    """
    found = False
    for number, line in numbered_lines(stream):
        source = f"{origin.name}:{number}"
        try:
            record = parse_record(line)
        except Unreadable as error:
            report.skip_entry(source, str(error))
            continue
        text = record.get(origin.field)
        if isinstance(text, str):
            found = True
            yield Document(text, source)
        elif origin.field not in record and not found:
            raise _no_field(source, origin.field, list(record))
        else:
            report.skip_entry(source, f"no text in field {origin.field!r}")


def read_parquet(stream: IO[bytes], origin: Origin, report: ReadReport) -> Iterator[Document]:
    """A column of text, a row group at a time; missing values count as empty.

    Raises:
        Unreadable: it is not a parquet file.
        DataError: there is no such column, or it does not hold text.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(stream)
        _require_text_column(file.schema_arrow, origin)
        row = 0
        for batch in file.iter_batches(batch_size=256, columns=[origin.field]):
            for value in batch.column(0):
                row += 1
                source = f"{origin.name}:{row}"
                try:
                    yield Document(value.as_py() or "", source)
                except UnicodeDecodeError:
                    report.skip_entry(source, "not UTF-8")
    except pyarrow.ArrowException as error:
        raise Unreadable(f"not a whole parquet file: {str(error).splitlines()[0]}") from None


READERS: dict[str, Reader] = {
    ".txt": read_text,
    ".md": read_text,
    ".rst": read_text,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".parquet": read_parquet,
}  # any other suffix: read_text, so that source files of every language need no row

DECOMPRESSORS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".zst": lambda raw: io.BufferedReader(_Frames(raw), CHUNK),
}


class _Frames(io.RawIOBase):
    """zstandard's frames, decompressed: its own reader takes a file that was cut short for a whole one."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._ready = raw, memoryview(b"")
        self._frame: zstandard.ZstdDecompressionObj | None = None  # the one begun and not ended

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Raises EOFError where the file ends within a frame."""
        while not self._ready:
            piece = self._raw.read(PIECE)
            if not piece:
                if self._frame is not None:
                    raise EOFError("it ends within a compressed frame, as a file that was cut does")
                return 0
            self._ready = memoryview(b"".join(self._expanded(piece)))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _expanded(self, piece: bytes) -> Iterator[bytes]:
        while piece:
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj()
            yield self._frame.decompress(piece)
            if not self._frame.eof:
                return
            piece, self._frame = self._frame.unused_data, None


def _decode(data: bytes) -> str:
    if b"\0" in data:
        raise Unreadable("not text: it holds NUL bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8: byte {error.start:,}") from None


def _stretches(stream: IO[bytes], separator: bytes) -> Iterator[tuple[int, bytes]]:
    """What stands between separators, at most a passage at a time, and the line where it begins."""
    line, rest, searched = 1, bytearray(), 0
    while chunk := stream.read(CHUNK):
        rest += chunk
        while cut := _next_cut(rest, separator, searched):
            end, after = cut
            yield line, bytes(rest[:end])
            line += rest[:after].count(b"\n")
            del rest[:after]
            searched = 0
        searched = max(0, len(rest) - len(separator) + 1)  # a separator may straddle two chunks
    yield line, bytes(rest)


def _next_cut(data: bytearray, separator: bytes, searched: int) -> tuple[int, int] | None:
    """Where the next stretch ends and where the one after it begins; None while neither is certain."""
    found = data.find(separator, searched) if separator else -1
    if found >= 0:
        return found, found + len(separator)
    if len(data) < PASSAGE:
        return None
    end = data.rfind(b"\n") + 1
    if not end:  # a text without lines: cut where a character of UTF-8 begins
        end = next((i for i in range(len(data) - 1, len(data) - 4, -1) if data[i] & 0xC0 != 0x80), len(data))
    return end, end


def _leading_lines(data: bytes | bytearray) -> int:
    return data[: len(data) - len(data.lstrip(b"\r\n"))].count(b"\n")


def numbered_lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers; what exceeds the bound is cut off."""
    number = 0
    while line := stream.readline(LONGEST_LINE):
        number += 1
        if number == 1:
            line = line.removeprefix(BOM)
        if not line.isspace():
            yield number, line
        while len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            line = stream.readline(LONGEST_LINE)


def parse_record(line: bytes) -> dict[str, Any]:
    """The JSON object in a line.

    Raises:
        Unreadable: there is none.
    """
    try:
        # As UTF-8 whatever the first bytes look like; half a surrogate pair passes, as escaped ones do.
        record = json.loads(line.decode("utf-8", "surrogatepass"))
    except UnicodeDecodeError as error:
        raise Unreadable(f"the line is not UTF-8: byte {error.start:,}") from None
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise Unreadable(f"expected an object, got {type(record).__name__}")
    return record


def _require_text_column(schema: Any, origin: Origin) -> None:
    if origin.field not in schema.names:
        raise _no_field(origin.name, origin.field, schema.names)
    kind = str(schema.field(origin.field).type)
    if "string" not in kind:  # string, large_string, string_view, and dictionaries of them
        raise DataError(
            f"{origin.name}: field {origin.field!r} holds {kind}, expected text; choose another field"
        )


def _no_field(where: str, field: str, present: Sequence[str]) -> DataError:
    names = ", ".join(repr(name) for name in present) or "none"
    return DataError(
        f"{where}: no field {field!r}; its fields are {names}: choose one with the setting field"
    )
