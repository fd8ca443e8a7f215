"""A small app behind the guard, asked without a socket, or over one through our connections."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from puna.serve.connections import Listener
from puna.serve.guard import Guard
from puna.serve.keys import Key, Keys, read_keys
from puna.serve.logs import Log
from puna.serve.origins import Origins
from puna.serve.record import Record
from puna.serve.settings import ServeSettings
from puna.settings import parse

JSON_HEADERS = {"host": "localhost:8000", "content-type": "application/json"}


@dataclass
class Figures:
    """Metrics that keep the records."""

    records: list[Record] = field(default_factory=list)

    def finished(self, record: Record) -> None:
        self.records.append(record)


@dataclass
class State:
    """As much of a server's state as the guard looks at."""

    settings: ServeSettings
    metrics: Figures = field(default_factory=Figures)
    draining: bool = False

    @property
    def most_body(self) -> int:
        """Bytes that a request's body may have."""
        return self.settings.max_body_bytes or 8 << 20


@dataclass
class Answer:
    """What came back."""

    status: int | None
    headers: dict[str, str]
    body: bytes
    record: Record

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


async def echo(request: Request) -> Response:
    """What came, as it is."""
    return Response(await request.body(), media_type="application/json")


async def fine(request: Request) -> Response:
    return PlainTextResponse("fine")


async def numbers(request: Request) -> Response:
    """A stream of lines, one every 20 ms."""
    digits = "".join(filter(str.isdecimal, request.query_params.get("n", "")))
    count = min(int(digits or 5), 100)

    async def lines() -> AsyncIterator[bytes]:
        for number in range(count):
            yield b"%d\n" % number
            await asyncio.sleep(0.02)

    return StreamingResponse(lines())


async def bulk(request: Request) -> Response:
    """More than a connection's buffers hold."""

    async def blocks() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield bytes(1 << 20)

    return StreamingResponse(blocks())


async def slow(request: Request) -> Response:
    await asyncio.sleep(0.3 if "s" not in request.query_params else 0.8)
    return JSONResponse({"slept": True})


async def broken(request: Request) -> Response:
    raise ZeroDivisionError("a fault of ours")


async def torn(request: Request) -> Response:
    async def lines() -> AsyncIterator[bytes]:
        yield b"one\n"
        raise ZeroDivisionError("in the middle")

    return StreamingResponse(lines())


def app_of() -> Starlette:
    """Every sort of route."""
    posts = [
        Route(path, endpoint, methods=["POST"])
        for path, endpoint in (("/v1/completions", echo), ("/slow", slow))
    ]
    gets = [
        Route(path, endpoint)
        for path, endpoint in (
            *((path, fine) for path in ("/", "/health", "/ready", "/status", "/metrics", "/v1/models")),
            *(("/numbers", numbers), ("/broken", broken), ("/torn", torn), ("/bulk", bulk)),
        )
    ]
    return Starlette(routes=[*posts, *gets])


def guard_of(
    app: Starlette | None = None,
    keys: Sequence[str] = (),
    local: bool = True,
    log: Log | None = None,
    **settings: Any,
) -> Guard:
    """`keys` are lines of a file of keys; `settings` those of ServeSettings."""
    chosen = parse(ServeSettings, settings)
    known: list[Key] = read_keys(None, {"PUNA_API_KEYS": ",".join(keys)} if keys else {})[0]
    return Guard(
        app or app_of(),
        State(chosen),  # type: ignore[arg-type]
        Keys(known, chosen.requests_per_minute, chosen.concurrent_requests),
        Origins(chosen.allowed_hosts, chosen.cors_origins, local),
        log or Log("json", stream=io.StringIO()),
    )


Pieces = Sequence[tuple[float, bytes | None]]
"""Seconds to wait, then a piece of a body, or None: the client leaves."""


def ask(
    guard: Guard,
    method: str = "GET",
    path: str = "/",
    headers: dict[str, str] | None = None,
    body: bytes | Pieces = b"",
) -> Answer:
    """Ask once, in an event loop of its own."""
    return asyncio.run(asked(guard, method, path, headers, body))


async def asked(
    guard: Guard,
    method: str = "GET",
    path: str = "/",
    headers: dict[str, str] | None = None,
    body: bytes | Pieces = b"",
) -> Answer:
    """Ask; a body in one piece has a Content-Length, unless headers say otherwise."""
    given = {"host": "localhost"} | (headers or {})
    if isinstance(body, bytes):
        given = {"content-length": str(len(body))} | given if body else given
        body = [(0.0, body)]
    sent: list[dict[str, Any]] = []
    await guard(_scope(method, path, given), _receive(body), _collect(sent))
    start = next((m for m in sent if m["type"] == "http.response.start"), None)
    content = b"".join(m.get("body", b"") for m in sent if m["type"] == "http.response.body")
    record = guard._state.metrics.records[-1]  # type: ignore[attr-defined]
    if start is None:
        return Answer(None, {}, content, record)
    names = {name.decode().lower(): value.decode() for name, value in start["headers"]}
    return Answer(start["status"], names, content, record)


def _scope(method: str, path: str, headers: dict[str, str]) -> dict[str, Any]:
    return {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "http_version": "1.1",
        "client": ("192.0.2.7", 1234),
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers.items()],
    }


def _receive(pieces: Pieces) -> Callable[[], Awaitable[dict[str, Any]]]:
    coming = iter(enumerate(pieces, 1))

    async def receive() -> dict[str, Any]:
        found = next(coming, None)
        if found is None:
            await asyncio.sleep(3600)
        number, (wait, piece) = found  # type: ignore[misc]
        await asyncio.sleep(wait)
        if piece is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": piece, "more_body": number < len(pieces)}

    return receive


def _collect(sent: list[dict[str, Any]]) -> Callable[[Any], Awaitable[None]]:
    async def send(message: Any) -> None:
        sent.append(message)

    return send


@dataclass
class Standing:
    """A listener at work."""

    port: int
    listener: Listener
    guard: Guard
    loop: asyncio.AbstractEventLoop
    links: list[socket.socket] = field(default_factory=list)

    @property
    def records(self) -> list[Record]:
        return self.guard._state.metrics.records  # type: ignore[attr-defined]

    def connect(self, timeout: float = 10) -> socket.socket:
        """A connection; what a test leaves open is closed with the server."""
        link = socket.create_connection(("127.0.0.1", self.port), timeout)
        self.links.append(link)
        return link

    def say(self, raw: bytes, timeout: float = 10) -> bytes:
        """Send bytes; what comes back until the server closes."""
        with self.connect(timeout) as link:
            link.sendall(raw)
            return read_all(link)


def read_all(link: socket.socket) -> bytes:
    """Until the other side closes."""
    pieces = []
    try:
        while piece := link.recv(1 << 16):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


def read_one(link: socket.socket) -> bytes:
    """An answer with a Content-Length."""
    raw = b""
    while b"\r\n\r\n" not in raw:
        piece = link.recv(1 << 16)
        if not piece:
            return raw
        raw += piece
    head, _, body = raw.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while len(body) < length:
        body += link.recv(1 << 16)
    return head + b"\r\n\r\n" + body


def request_of(path: str = "/health", *more: str, method: str = "GET") -> bytes:
    """A request's head; `more` are headers."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *more, "", ""]).encode()


@contextmanager
def standing(app: Any = None, tls: Any = None, **settings: Any) -> Iterator[Standing]:
    """The small app behind the guard and our connections, its event loop on a thread of its own."""
    guard = guard_of(app, **settings)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        loop = asyncio.new_event_loop()
        listener = Listener(guard, [listening], guard._settings, guard.finished, tls)
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        asyncio.run_coroutine_threadsafe(_started(listener), loop).result(10)
        it = Standing(listening.getsockname()[1], listener, guard, loop)
        try:
            yield it
        finally:
            for link in it.links:
                link.close()
            asyncio.run_coroutine_threadsafe(_ended(listener), loop).result(10)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


async def _started(listener: Listener) -> None:
    listener.start()


async def _ended(listener: Listener) -> None:
    listener.stop()
    listener.abort()
    for task in tuple(listener.requests):
        task.cancel()
    await asyncio.sleep(0.05)
