"""The binary file of one shard: tokens, and for each document where it starts, its bytes and its source.

Everything is little-endian. D documents, N tokens, W bytes per token (2 or 4):

    header   80 bytes   magic, version, W, N, D, length of sources, SHA-256 of what follows, CRC-32 of these
    tokens   N · W      zero bytes after them up to a multiple of 8
    starts   (D+1) · 8  the offset of each document's first token, then N
    sizes    D · 8      the length of each document's text in UTF-8 bytes
    ends     (D+1) · 8  0, then where each source ends in what follows
    sources  UTF-8

Files are written atomically: a name that exists is a whole file.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from puna.errors import DataError
from puna.files import disk_errors, write_atomically

MAGIC = b"PUNATOK\n"
VERSION = 1
HEADER = struct.Struct("<8sIIQQQ32sI4x")
I64 = np.dtype("<i8")


@dataclass(frozen=True)
class TokenDocument:
    """A document as tokens: BOS, its text, EOS. `size` is the length of the text in UTF-8 bytes."""

    ids: NDArray  # (N,) integers
    size: int
    source: str


@dataclass(frozen=True)
class Shard:
    """Documents end to end: views of a mapped file, or arrays in memory."""

    tokens: NDArray  # (N,)
    starts: NDArray[np.int64]  # (D + 1,)
    sizes: NDArray[np.int64]  # (D,)
    source_ends: NDArray[np.int64]  # (D + 1,)
    source_bytes: NDArray[np.uint8]

    @property
    def documents_total(self) -> int:
        """D."""
        return len(self.sizes)

    def document(self, index: int) -> TokenDocument:
        """One document, its ids as int64."""
        ids = self.tokens[self.starts[index] : self.starts[index + 1]].astype(np.int64)
        return TokenDocument(ids, int(self.sizes[index]), self.source(index))

    def source(self, index: int) -> str:
        """Where a document came from."""
        return bytes(self.source_bytes[self.source_ends[index] : self.source_ends[index + 1]]).decode("utf-8")


@dataclass(frozen=True)
class Header:
    """What the first 80 bytes say."""

    token_bytes: int
    tokens: int
    documents: int
    source_bytes: int
    sha256: bytes

    @property
    def layout(self) -> list[tuple[np.dtype, int]]:
        """Type and number of the elements of each section, padding included, in the order of the file."""
        padding = -self.tokens * self.token_bytes % 8
        return [
            (np.dtype(f"<u{self.token_bytes}"), self.tokens),
            (np.dtype("u1"), padding),
            (I64, self.documents + 1),
            (I64, self.documents),
            (I64, self.documents + 1),
            (np.dtype("u1"), self.source_bytes),
        ]

    @property
    def file_bytes(self) -> int:
        """The size of the whole file."""
        return HEADER.size + sum(dtype.itemsize * count for dtype, count in self.layout)

    def pack(self) -> bytes:
        """The 80 bytes; the checksum is taken with its own field at zero."""
        fields = (VERSION, self.token_bytes, self.tokens, self.documents, self.source_bytes, self.sha256)
        return HEADER.pack(MAGIC, *fields, zlib.crc32(HEADER.pack(MAGIC, *fields, 0)))


def join(documents: Sequence[TokenDocument], vocab_size: int) -> Shard:
    """Documents as one shard in memory; two bytes per token where the vocabulary fits into them."""
    sources = [document.source.encode("utf-8", "replace") for document in documents]
    ids = np.concatenate([document.ids for document in documents])
    return Shard(
        tokens=ids.astype("<u2" if vocab_size <= 1 << 16 else "<u4"),
        starts=_offsets([len(document.ids) for document in documents]),
        sizes=np.array([document.size for document in documents], dtype=I64),
        source_ends=_offsets([len(source) for source in sources]),
        source_bytes=np.frombuffer(b"".join(sources), dtype=np.uint8),
    )


def write_shard(path: Path, shard: Shard) -> Header:
    """Write a shard atomically.

    Raises:
        ResourceError: the disk is full.
        DataError: it cannot be written for another reason.
    """
    padding = np.zeros(-shard.tokens.nbytes % 8, dtype=np.uint8)
    sections = (shard.tokens, padding, shard.starts, shard.sizes, shard.source_ends, shard.source_bytes)
    payload = b"".join(section.tobytes() for section in sections)
    header = Header(
        token_bytes=shard.tokens.itemsize,
        tokens=len(shard.tokens),
        documents=shard.documents_total,
        source_bytes=len(shard.source_bytes),
        sha256=hashlib.sha256(payload).digest(),
    )
    with writing(path):
        write_atomically(path, header.pack() + payload)
    return header


def writing(path: Path) -> AbstractContextManager[None]:
    """Turns what can go wrong while `path` is written into one line."""
    advice = "free some space or choose another directory, then run again"
    return disk_errors(f"writing {path}", path, DataError, advice)


def read_header(path: Path) -> Header:
    """The header, after checking it against itself and against the size of the file.

    Raises:
        DataError: the file is missing, not a shard, damaged or cut short, or of another version.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(HEADER.size)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; prepare the data again") from None
    if raw[: len(MAGIC)] != MAGIC or len(raw) < HEADER.size:
        raise DataError(f"{path}: not a token shard, or cut short; prepare the data again")
    _, version, *fields, checksum = HEADER.unpack(raw)
    if version != VERSION:
        raise DataError(f"{path}: shard version {version}, this Puna reads {VERSION}; prepare the data again")
    header = Header(*fields)
    if zlib.crc32(HEADER.pack(MAGIC, version, *fields, 0)) != checksum or header.token_bytes not in (2, 4):
        raise _damaged(path, "its header is not what was written")
    if size != header.file_bytes:
        raise _damaged(path, f"it should hold {header.file_bytes:,} bytes and holds {size:,}")
    return header


def map_shard(path: Path) -> tuple[Header, Shard]:
    """The shard in a file, memory-mapped read-only; what is in it is checked by `verify_shard`.

    Raises:
        DataError: as `read_header`, or the index does not match the tokens.
    """
    header = read_header(path)
    mapped = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    offset, sections = HEADER.size, []
    for dtype, count in header.layout:
        end = offset + dtype.itemsize * count
        sections.append(mapped[offset:end].view(dtype))
        offset = end
    tokens, _, *index = sections
    shard = Shard(tokens, *index)
    if shard.starts[0] != 0 or shard.starts[-1] != header.tokens:
        raise _damaged(path, "its index does not match its tokens")
    return header, shard


def verify_shard(path: Path) -> Header:
    """Read the whole file and compare its checksum.

    Raises:
        DataError: as `read_header`, or the checksum differs.
    """
    header = read_header(path)
    with path.open("rb") as file:
        file.seek(HEADER.size)
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.digest() != header.sha256:
        raise _damaged(path, "its checksum differs")
    return header


def _offsets(lengths: Sequence[int]) -> NDArray[np.int64]:
    """0 and the running sums of `lengths`."""
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))).astype(I64)


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path}: damaged: {why}; delete it and prepare the data again")
