"""What came over a connection, piece by piece → an HTTP/1.1 response and its server-sent events."""

from __future__ import annotations

from collections.abc import Iterator

NEWLINE = b"\r\n"


class ResponseReader:
    """A response as it comes, its borders anywhere: sized, in chunks (RFC 9112, 7.1), or up to the end.

    `status` is None until the headers are there, whose names are in lower case; `ended` says whether the
    whole of it has come.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.ended = False
        self._held = bytearray()
        self._left: int | None = 0  # bytes to come: of this chunk, or of all; None: until the connection ends
        self._last = False  # whether the chunk of size 0 was there, and only trailers follow

    def feed(self, data: bytes) -> bytes:
        """What of the body came with these bytes.

        Raises:
            ValueError: that is no HTTP.
        """
        self._held += data
        if self.status is None and not self._read_head():
            return b""
        return b"".join(self._chunks() if self._chunked else self._plain())

    def close(self) -> None:
        """The connection has ended: so has a body whose size was not told."""
        self.ended = self.ended or (self.status is not None and self._left is None)

    @property
    def _chunked(self) -> bool:
        return self.headers.get("transfer-encoding", "").lower() == "chunked"

    def _read_head(self) -> bool:
        end = self._held.find(NEWLINE * 2)
        if end < 0:
            return False
        first, *lines = bytes(self._held[:end]).decode("latin-1").split("\r\n")
        del self._held[: end + 4]
        version, status, *_ = first.split(" ")
        if not version.startswith("HTTP/1."):
            raise ValueError(f"expected an HTTP/1.1 response, got {first[:80]!r}")
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.lower()] = value.strip()
        self.status = int(status)
        length = self.headers.get("content-length")
        if not self._chunked:
            self._left = None if length is None else int(length)
        return True

    def _plain(self) -> Iterator[bytes]:
        data = bytes(self._held[: self._left])
        del self._held[: len(data)]
        if self._left is not None:
            self._left -= len(data)
            self.ended = self._left == 0
        yield data

    def _chunks(self) -> Iterator[bytes]:
        while not self.ended and self._held:
            if self._left:
                data = bytes(self._held[: self._left])
                del self._held[: len(data)]
                self._left -= len(data)
                yield data
                continue
            end = self._held.find(NEWLINE)
            if end < 0:
                return
            line = bytes(self._held[:end])
            del self._held[: end + 2]
            if self._last:
                self.ended = not line
            elif line:  # an empty one ends the chunk before
                self._left = int(line.partition(b";")[0], 16)
                self._last = self._left == 0


class EventReader:
    """Server-sent events as they come, of each only its data; lines end in a line feed, as servers write."""

    def __init__(self) -> None:
        self._held = b""
        self._data: list[bytes] = []

    def feed(self, body: bytes) -> Iterator[bytes]:
        """The events that are whole now."""
        *lines, self._held = (self._held + body).split(b"\n")
        for line in lines:
            field, _, value = line.removesuffix(b"\r").partition(b":")
            if field == b"data":
                self._data.append(value.removeprefix(b" "))
            elif not field and not value and self._data:
                yield b"\n".join(self._data)
                self._data = []
