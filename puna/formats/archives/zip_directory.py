"""Where the members of an uncompressed zip archive lie, as torch writes them (APPNOTE 6.3, section 4).

Nothing is read but the directory, and that once: whoever takes the members' bytes from here sees exactly what
was checked. Archives of more than 4 GiB (zip64) included.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from puna.errors import ModelError

_ENTRIES = 1 << 17  # tensors, and then some
_DIRECTORY = 16 << 20  # bytes
_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_UNSAID, _UNSAID_COUNT = 0xFFFFFFFF, 0xFFFF  # the number stands in the zip64 record


class Member(NamedTuple):
    """Where a member's bytes lie, and their CRC-32."""

    begin: int
    size: int
    crc: int


def members(data: memoryview) -> dict[str, Member]:
    """Every member by name.

    Raises:
        ModelError: no zip archive or a damaged one, or members are compressed, encrypted or repeated.
    """
    try:
        count, size, begin = _end(data)
        if begin + size > len(data) or size > _DIRECTORY or count > _ENTRIES:
            raise ModelError("damaged: its directory is larger than the file, or than that of any model")
        found: dict[str, Member] = {}
        for name, member in _entries(data, begin, begin + size, count):
            if name in found:
                raise ModelError(f"damaged: it holds {name[:80]!r} twice")
            found[name] = member
    except (struct.error, UnicodeDecodeError):
        raise ModelError("damaged: its directory makes no sense") from None
    if sum(member.size for member in found.values()) > len(data):
        raise ModelError("damaged: its members overlap")
    return found


def _end(data: memoryview) -> tuple[int, int, int]:
    """How many entries the directory has, its size, and where it begins."""
    at = len(data) - _END.size
    if at < 0 or bytes(data[at : at + 4]) != b"PK\5\6":
        raise ModelError("cut short or damaged: no directory at its end")
    _, _, _, _, count, size, begin, _ = _END.unpack_from(data, at)
    if count != _UNSAID_COUNT and _UNSAID not in (size, begin):
        return count, size, begin
    mark, _, place, _ = _LOCATOR.unpack_from(data, max(at - _LOCATOR.size, 0))
    if mark != b"PK\6\7":
        return count, size, begin
    if place > len(data) - _END_64.size:
        raise ModelError("damaged: its directory lies outside the file")
    mark, *_, count, size, begin = _END_64.unpack_from(data, place)
    if mark != b"PK\6\6":
        raise ModelError("damaged: its directory makes no sense")
    return count, size, begin


def _entries(data: memoryview, at: int, end: int, count: int) -> Iterator[tuple[str, Member]]:
    first = at
    for _ in range(count):
        mark, *_, flags, method, _, _, crc, stored, size, name, extra, comment, _, _, _, place = (
            _ENTRY.unpack_from(data, at)
        )
        begin = at + _ENTRY.size
        at = begin + name + extra + comment
        if mark != b"PK\1\2" or at > end:
            raise ModelError("damaged: its directory makes no sense")
        label = bytes(data[begin : begin + name])
        size, stored, place = _widened(bytes(data[begin + name : begin + name + extra]), size, stored, place)
        if flags & 1 or method or size != stored:
            raise ModelError(
                "its members are compressed, which torch never does; save it again with torch.save"
            )
        yield label.decode("utf-8"), Member(_begin(data, label, size, place, first), size, crc)
    if at != end:
        raise ModelError("damaged: its directory makes no sense")


def _widened(extra: bytes, *numbers: int) -> list[int]:
    """The numbers, those too large for four bytes taken from the zip64 field."""
    wide: list[int] = []
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = list(struct.unpack_from(f"<{size // 8}Q", extra, at + 4))
        at += 4 + size
    return [wide.pop(0) if number == _UNSAID and wide else number for number in numbers]


def _begin(data: memoryview, label: bytes, size: int, place: int, limit: int) -> int:
    """Where a member's bytes begin, by the header before them."""
    if place + _LOCAL.size > limit:
        raise ModelError("damaged: a member lies outside the file")
    mark, *_, name, extra = _LOCAL.unpack_from(data, place)
    at = place + _LOCAL.size
    begin = at + name + extra
    if mark != b"PK\3\4" or bytes(data[at : at + name]) != label or begin + size > limit:
        raise ModelError("damaged: a member is not where its directory says")
    return begin
