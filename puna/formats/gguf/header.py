"""A GGUF file's header, scanned within bounds: metadata, and where each tensor lies.

Layout (versions 2 and 3, little-endian): "GGUF", version, number of tensors, number of metadata entries; the
entries (key, type, value); per tensor its name, dimensions from the fastest to the slowest, type and offset;
then, aligned, the tensors' bytes. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from puna.errors import ModelError
from puna.formats.packed import BLOCKS, block_sizes
from puna.formats.tensor_files import shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
PLAIN = {0: ("float32", 4), 1: ("float16", 2), 30: ("bfloat16", 2)}  # bytes of one number
KINDS = {number: name for number, (name, _) in PLAIN.items()} | {
    number: name for name, number in BLOCKS.items()
}

_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d"}
_STRUCTS = {code: struct.Struct("<" + code) for code in _NUMBERS.values()}
# Bounds on what a real file may ask for; the largest vocabularies have some 300,000 tokens and merges.
_MOST_ENTRIES, _MOST_TENSORS, _MOST_ELEMENTS = 1 << 16, 1 << 20, 1 << 23
_LONGEST_KEY, _LONGEST_STRING = 1 << 16, 64 << 20
_MOST_DIMENSIONS = 4
_ALIGNMENT = "general.alignment"


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `size` bytes from `at` in `file`; `shape` is outermost first."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    at: int
    size: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself; arrays of text are lists of bytes, those of numbers `array`s."""

    metadata: dict[str, Any]
    tensors: dict[str, Entry]


def recognises(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_header(path: Path) -> Header:
    """Scan a file's header; nothing is allocated for what it claims and does not hold.

    Raises:
        ModelError: it cannot be read, is damaged or cut short, or of a version or type not supported.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Scan(path, data).header()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:  # an empty file cannot be mapped
        raise ModelError(f"{path}: the file is empty") from None


class _Scan:
    """A position in a mapped file; every step is checked against the file's end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at, self._end = path, data, 0, len(data)

    def header(self) -> Header:
        self._check_version()
        tensors, entries = self._number("Q"), self._number("Q")
        if tensors > _MOST_TENSORS or entries > _MOST_ENTRIES:
            self._damaged(f"it claims {tensors} tensors and {entries} metadata entries")
        metadata = self._metadata(entries)
        infos = self._infos(tensors)
        return Header(metadata, self._placed(infos, self._data_start(metadata)))

    def _check_version(self) -> None:
        if self._data[: self._step(4)] != MAGIC:
            self._damaged("it does not begin with GGUF")
        version = self._number("I")
        if version in VERSIONS:
            return
        if version & 0xFFFF == 0 and version:
            raise ModelError(f"{self._path}: a big-endian GGUF file; convert it to little-endian first")
        raise ModelError(f"{self._path}: GGUF version {version} is not supported; expected 2 or 3")

    def _metadata(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self._text(_LONGEST_KEY, "a metadata key")
            if key in found:
                self._damaged(f"the metadata has {shown(key)} twice")
            found[key] = self._value(self._number("I"), key)
        return found

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._text(_LONGEST_STRING, shown(key))
        if kind == _ARRAY:
            return self._array(self._number("I"), self._number("Q"), key)
        if kind not in _NUMBERS:
            self._damaged(f"{shown(key)} has a value of unknown type {kind}")
        value = self._number(_NUMBERS[kind])
        if kind == _BOOL and value > 1:
            self._damaged(f"{shown(key)} is neither true nor false")
        return bool(value) if kind == _BOOL else value

    def _array(self, kind: int, count: int, key: str) -> Any:
        if count > _MOST_ELEMENTS:
            self._damaged(f"{shown(key)} claims {count} elements")
        if kind == _STRING:
            return [self._bytes(_LONGEST_STRING, shown(key)) for _ in range(count)]
        if kind not in _NUMBERS:
            self._damaged(f"{shown(key)} is an array of unknown type {kind}")
        begin, code = self._at, _NUMBERS[kind]
        return array(code, self._data[begin : self._step(count * _STRUCTS[code].size)])

    def _infos(self, count: int) -> dict[str, tuple[str, tuple[int, ...], int]]:
        """Per tensor its type, shape and offset."""
        found: dict[str, tuple[str, tuple[int, ...], int]] = {}
        for _ in range(count):
            name = self._text(_LONGEST_KEY, "a tensor's name")
            dimensions = self._number("I")
            if not 1 <= dimensions <= _MOST_DIMENSIONS:
                self._damaged(f"{shown(name)} has {dimensions} dimensions")
            shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
            kind, offset = self._number("I"), self._number("Q")
            if name in found:
                self._damaged(f"the tensor {shown(name)} occurs twice")
            found[name] = (self._kind(kind, name), shape, offset)
        return found

    def _kind(self, number: int, name: str) -> str:
        if number in KINDS:
            return KINDS[number]
        from gguf import GGMLQuantizationType  # takes long: for its names alone

        known = [kind.name for kind in GGMLQuantizationType if kind == number]
        raise ModelError(
            f"{self._path}: {shown(name)} is stored as {known[0] if known else f'unknown type {number}'}; "
            f"supported: {', '.join(GGMLQuantizationType(kind).name for kind in KINDS)}"
        )

    def _data_start(self, metadata: dict[str, Any]) -> tuple[int, int]:
        """Where the tensors' bytes begin, and to what their places are aligned."""
        alignment = metadata.get(_ALIGNMENT, 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            self._damaged(f"{_ALIGNMENT} is {brief(alignment)}; expected a power of two")
        return -(-self._at // alignment) * alignment, alignment

    def _placed(
        self, infos: dict[str, tuple[str, tuple[int, ...], int]], data: tuple[int, int]
    ) -> dict[str, Entry]:
        start, alignment = data
        found: dict[str, Entry] = {}
        for name, (kind, shape, offset) in infos.items():
            size = self._size(name, kind, shape)
            if offset % alignment or start + offset + size > self._end:
                self._damaged(
                    f"{shown(name)} takes {size} bytes from {start + offset}, of a file of {self._end} bytes"
                )
            found[name] = Entry(self._path, kind, shape, start + offset, size)
        self._check_overlap(found)
        return found

    def _size(self, name: str, kind: str, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor."""
        if min(shape) < 1:
            self._damaged(f"{shown(name)} has shape {list(shape)}")
        if kind not in BLOCKS:
            return math.prod(shape) * next(size for plain, size in PLAIN.values() if plain == kind)
        numbers, size = block_sizes(kind)
        if shape[-1] % numbers or len(shape) != 2:
            self._damaged(
                f"{shown(name)} {list(shape)} cannot be {kind.upper()}, in blocks of {numbers} columns"
            )
        return math.prod(shape) // numbers * size

    def _check_overlap(self, tensors: dict[str, Entry]) -> None:
        end, before = 0, ""
        for name, entry in sorted(tensors.items(), key=lambda item: item[1].at):
            if entry.at < end:
                self._damaged(f"{shown(before)} and {shown(name)} overlap")
            end, before = entry.at + entry.size, name

    def _number(self, code: str) -> Any:
        at, layout = self._at, _STRUCTS[code]
        self._step(layout.size)
        return layout.unpack_from(self._data, at)[0]

    def _bytes(self, longest: int, what: str) -> bytes:
        length = self._number("Q")
        if length > longest:
            self._damaged(f"{what} claims {length} bytes")
        at = self._at
        return self._data[at : self._step(length)]

    def _text(self, longest: int, what: str) -> str:
        try:
            return self._bytes(longest, what).decode()
        except UnicodeDecodeError:
            self._damaged(f"{what} is not UTF-8")

    def _step(self, size: int) -> int:
        """Go on by `size` bytes, if the file has them; where that leads."""
        if size > self._end - self._at:
            self._damaged("it ends within its header")
        self._at += size
        return self._at

    def _damaged(self, why: str) -> NoReturn:
        raise ModelError(
            f"{self._path}: damaged or cut short ({self._end} bytes): {why}; copy or download it again"
        )


def brief(value: Any) -> str:
    """A value of the metadata for a message: in one line, and not without end."""
    if isinstance(value, list | array):
        return f"a list of {len(value)}"
    return repr(value[:40] if isinstance(value, str) else value)
