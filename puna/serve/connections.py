"""Connections: time for headers, idling and reading; a cap on their number; none of them can harm another."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import socket
import ssl
import struct
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState as Connections

from puna.serve.faults import INVALID, error_body
from puna.serve.record import Record
from puna.serve.settings import ServeSettings

LONGEST_HEADERS = 64 << 10  # bytes of an unfinished request's headers
BACKLOG = 2048  # connections that the system keeps until they are taken
OTHER_FILES = 256  # that a process has open beside connections
TLS_SECONDS = 5.0  # for a client's word that it knows the connection ends
NO_FILES = 0.5  # seconds after which there may be room for another connection
AT_ONCE = 32  # connections taken on before others have their turn

logger = logging.getLogger(__name__)

Finished = Callable[[Record], None]


@dataclass(frozen=True)
class Patience:
    """Seconds that a connection is waited for."""

    headers: float
    """From connecting, or from a later request's first byte, to the end of the request's headers."""
    idle: float
    """Between two requests."""
    reading: float
    """In which a client takes nothing at all of what waits to be sent to it."""
    taking: float
    """From the end of an answer, or from when it was too much for the buffers, until a client has taken what
    waits, however it trickles."""


class Requests(h11.Connection):
    """HTTP/1, and no other version of it: what follows in another could not be understood."""

    other: str | None = None
    """The version that was asked for instead."""

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """What came.

        Raises:
            RemoteProtocolError: it is not HTTP/1.
        """
        event = super().next_event()
        if isinstance(event, h11.Request) and not event.http_version.startswith(b"1."):
            self.other = event.http_version.decode("ascii")
            raise h11.RemoteProtocolError(f"HTTP/{self.other} is not spoken here")
        return event


class Connection(H11Protocol):
    """A connection that cannot wait for ever."""

    conn: Requests

    def __init__(self, listener: Listener) -> None:
        super().__init__(listener.config, listener.connections, {})
        self.conn = Requests(h11.SERVER, LONGEST_HEADERS)
        self._listener, self._patience = listener, listener.patience
        self._deadline: asyncio.TimerHandle | None = None
        self._reader: asyncio.TimerHandle | None = None
        self._last: asyncio.TimerHandle | None = None  # ends it, whatever the client takes meanwhile
        self._begun = True  # a byte of the request that comes next is there

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The client is there, TLS agreed upon."""
        super().connection_made(transport)
        self._listener.coming.discard(self)
        self._wait(self._patience.headers)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._stop_waiting()
        self._stop_looking()  # a timer would keep all of it in memory
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a request, of one that comes too early, or of none."""
        before = self.cycle
        if not self._begun:
            self._begun = True
            self._wait(self._patience.headers)
        super().data_received(data)
        if self.cycle is not before:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """Wait for the next request, which may be there already."""
        before = self.cycle
        super().on_response_complete()
        self._unset_keepalive_if_required()  # its whole seconds are not ours
        if self.transport.is_closing():
            self._see_it_end()
        elif self.cycle is before:
            self._begun = False
            self._wait(self._patience.idle)

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP, or its headers do not end."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # an answer is on its way, and this would stand in the middle of it
            return
        record = Record(f"req-{os.urandom(12).hex()}", "?", "?", time.monotonic())
        record.status, record.error = self._fault()
        for event in _refusal(record.status, record.error, record.id):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._see_it_end()
        if self.cycle is not None:  # its body went wrong: nobody waits for its answer
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._listener.finished(record)

    def _fault(self) -> tuple[int, str]:
        """The status and the words for what came instead of a request."""
        if self.conn.other is not None:
            return 505, f"expected HTTP/1.1, got HTTP/{self.conn.other}; ask again in HTTP/1.1"
        if len(self.conn.trailing_data[0]) > LONGEST_HEADERS:
            return 431, f"headers may have {LONGEST_HEADERS:,} bytes"
        return 400, "this is not HTTP/1.1"

    def pause_writing(self) -> None:
        """The client reads more slowly than it is written to."""
        super().pause_writing()
        self._see_it_sent()

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_looking()

    def end(self) -> None:
        """Close it, unless a request is at work: then after its answer."""
        try:
            self.shutdown()
        except h11.LocalProtocolError:
            self.transport.abort()
        if self.transport.is_closing():
            self._see_it_end()

    def _wait(self, seconds: float) -> None:
        self._stop_waiting()
        self._deadline = self.loop.call_later(seconds, self._too_late)
        self._listener.idle[self] = None

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
            self._listener.idle.pop(self, None)

    def _too_late(self) -> None:
        """No request came in time."""
        self._stop_waiting()
        self.transport.close()
        self._see_it_end()

    def drop(self) -> None:
        """Close it at once."""
        self._stop_waiting()
        self.transport.abort()

    def _see_it_sent(self) -> None:
        """A client that takes nothing of what waits for it must not be waited for."""
        if self._reader is None:
            left = self._unsent()
            self._reader = self.loop.call_later(self._patience.reading, self._check_reader, left)

        if self._last is None:
            self._last = self.loop.call_later(self._patience.taking, self._cut)

    def _unsent(self) -> int:
        """Bytes that wait to be sent."""
        try:
            return self.transport.get_write_buffer_size()
        except AttributeError:  # asyncio's TLS transport forgets what it had once it is closed
            return 0

    def _cut(self) -> None:
        """Close it at once; the system, too, would go on sending for ever what it took."""
        with suppress(OSError):  # it is gone
            link = self.transport.get_extra_info("socket")
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _see_it_end(self) -> None:
        """It closes: from now on a client has its whole time for what is left."""
        self._stop_looking()
        self._see_it_sent()

    def _stop_looking(self) -> None:
        for timer in (self._reader, self._last):
            if timer is not None:
                timer.cancel()
        self._reader = self._last = None

    def _check_reader(self, before: int) -> None:
        self._reader = None
        if self._unsent() >= before:
            self.transport.abort()
        else:
            self._see_it_sent()


class Listener:
    """Takes connections on, as many as there may be, and hands them to uvicorn's protocol."""

    def __init__(
        self,
        app: Any,
        sockets: Sequence[socket.socket],
        settings: ServeSettings,
        finished: Finished,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`app` is ASGI; `sockets` are bound; `finished` is told of requests that no app ever saw."""
        self.config = uvicorn.Config(
            app,
            interface="asgi3",
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=LONGEST_HEADERS,
        )
        self.config.load()
        self.connections, self.finished = Connections(), finished
        self.coming: set[Connection] = set()
        """Those that agree on TLS, or begin."""
        self.idle: dict[Connection, None] = {}
        """Those without a request at work, the one that waits longest first."""
        self.patience = Patience(
            settings.header_seconds, settings.idle_seconds, settings.body_seconds, settings.request_seconds
        )
        self._sockets, self._tls, self._most = sockets, tls, settings.max_connections
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Listen.

        Raises:
            OSError: the port has been taken meanwhile.
        """
        allow_files(self._most + OTHER_FILES)
        for listening in self._sockets:
            listening.setblocking(False)
            listening.listen(BACKLOG)
            self._listen(listening)
        self._spawn(self._keep_the_date())

    def stop(self) -> None:
        """Take no more connections on; those that are there stay."""
        for task in tuple(self._tasks):
            task.cancel()
        for listening in self._sockets:
            asyncio.get_running_loop().remove_reader(listening)
            listening.close()

    def end_idle(self) -> None:
        """Close every connection that has no request at work, and the others after their answers."""
        for connection in self.all:
            connection.end()

    def abort(self) -> None:
        """Cut every connection off."""
        for connection in self.all:
            connection.drop()

    @property
    def all(self) -> set[Connection]:
        """Every connection."""
        return set(self.connections.connections)  # type: ignore[arg-type]

    @property
    def requests(self) -> set[asyncio.Task[None]]:
        """Those at work."""
        return self.connections.tasks

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _listen(self, listening: socket.socket) -> None:
        if listening.fileno() >= 0:  # not closed meanwhile
            asyncio.get_running_loop().add_reader(listening, self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        """Take on what waits; of a flood so many that answers are not held up."""
        loop = asyncio.get_running_loop()
        for _ in range(AT_ONCE):
            try:
                client, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no more files may be open
                logger.warning("no connection can be taken on: %s", error.strerror)
                loop.remove_reader(listening)
                loop.call_later(NO_FILES, self._listen, listening)
                return
            client.setblocking(False)
            if self._full and not self._make_room():
                client.close()
            else:
                self._take(client)

    @property
    def _full(self) -> bool:
        return len(self.connections.connections) + len(self.coming) >= self._most

    def _make_room(self) -> bool:
        """Whether a connection that only waits could be closed for a new one."""
        longest = next(iter(self.idle), None)
        if longest is not None:
            longest.drop()
        return longest is not None

    def _take(self, client: socket.socket) -> None:
        connection = Connection(self)
        self.coming.add(connection)

        def begun(task: asyncio.Task[None]) -> None:
            self.coming.discard(connection)
            if connection.transport is None:
                client.close()

        self._spawn(self._begin(connection, client)).add_done_callback(begun)

    async def _begin(self, connection: Connection, client: socket.socket) -> None:
        """TLS has as long as headers have."""
        times: dict[str, Any] = {}
        if self._tls is not None:
            times = {"ssl_handshake_timeout": self.patience.headers, "ssl_shutdown_timeout": TLS_SECONDS}
        loop = asyncio.get_running_loop()
        with suppress(OSError):  # an SSLError is one; the client is gone
            await loop.connect_accepted_socket(lambda: connection, client, ssl=self._tls, **times)

    async def _keep_the_date(self) -> None:
        while True:
            self.connections.default_headers = [(b"date", formatdate(usegmt=True).encode())]
            await asyncio.sleep(1)


def _refusal(status: int, message: str, id: str) -> tuple[h11.Event, ...]:
    """An answer after which the connection is closed."""
    body = json.dumps(error_body(message, INVALID)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
        (b"x-request-id", id.encode()),
    ]
    reason = HTTPStatus(status).phrase.encode()
    response = h11.Response(status_code=status, headers=headers, reason=reason)
    return response, h11.Data(data=body), h11.EndOfMessage()


def allow_files(count: int) -> None:
    """Raise what this process may have open, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
