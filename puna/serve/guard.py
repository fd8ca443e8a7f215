"""What stands around the whole app: ids, origins, keys, limits, bodies, a record of each request."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.applications import Starlette
from starlette.routing import Route

from puna.progress import counted
from puna.serve.faults import error_body
from puna.serve.keys import Busy, Key, Keys, presented
from puna.serve.logs import Log
from puna.serve.origins import Header, Origins, preflight
from puna.serve.record import Record
from puna.serve.refusals import (
    CLOSE,
    JSON,
    Gone,
    Message,
    Receive,
    Refused,
    Reply,
    Scope,
    Send,
    has_body,
    refuse,
)
from puna.serve.state import ServerState

OPEN = frozenset({"/", "/health", "/ready"})  # answered without a key
PROBED = frozenset({"/health", "/ready"})  # by address, whatever the server is called
BASIC = frozenset({"/status"})  # a browser may ask its user for the key
WATCHED = frozenset({"/health", "/ready", "/metrics", "/status"})  # answered to the end
LOOKS = WATCHED | {"/"}  # not logged where they went well
BODIES = 32  # of the largest size may be held at once; beyond them requests are refused
HEADERS = 64 << 10  # bytes of a request's headers
AGAIN = 5  # seconds after which a server that stops may have another in its place
REQUEST_ID = re.compile(rb"[ -~]{1,128}")
JSON_TYPE = re.compile(rb"application/([a-z0-9.+-]+\+)?json", re.IGNORECASE)


class Guard:
    """ASGI around an app; streamed answers pass through it unchanged, chunk by chunk."""

    def __init__(self, app: Starlette, state: ServerState, keys: Keys, origins: Origins, log: Log) -> None:
        self._app, self._state, self._settings = app, state, state.settings
        self._keys, self._origins, self._log = keys, origins, log
        routes = [route for route in app.routes if isinstance(route, Route)]
        self._paths = {route.path for route in routes}
        self._computing = {route.path for route in routes if "POST" in (route.methods or ())}
        self._held = 0  # bytes of bodies, of all requests at work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry."""
        if scope["type"] != "http":
            raise RuntimeError(f"expected an HTTP request, got {scope['type']}")
        headers = dict(scope["headers"])
        record = Record(_request_id(headers), scope["method"], scope["path"], time.monotonic())
        scope.setdefault("state", {})["record"] = record
        reply = Reply(send, record, self._state)
        try:
            await self._answer(scope, headers, receive, reply)
        except Gone:
            record.gone = True
        except Refused as refusal:
            record.error = str(refusal)
            await refuse(reply, refusal, receive, headers)
        except Exception as error:
            await self._failed(error, reply)
        finally:
            self._ended(record, scope)

    def finished(self, record: Record, client: str | None = None) -> None:
        """Count a request that has ended, and log it where somebody may want to know."""
        self._state.metrics.finished(record)
        if not _is_routine(record):
            self._log.request(record, client)

    async def _answer(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, reply: Reply
    ) -> None:
        path, method = scope["path"], scope["method"]
        self._check_draining(path)
        _check_headers(scope["headers"], headers)
        origin = self._checked_origin(path, headers)
        if origin is not None:
            reply.headers += self._origins.headers(origin)
            if method == "OPTIONS" and b"access-control-request-method" in headers:
                await reply.whole(204, preflight(headers), b"")
                return
        key = self._checked_key(scope, path)
        reply.record.key = None if key is None else key.name
        computes = method == "POST" and path in self._computing
        with self._allowance(key) if computes else _nothing(), self._body_budget() as budget:
            if computes:
                _check_json(headers)
            body = await self._body(headers, receive, budget) if has_body(headers) else None
            await self._app(scope, receive if body is None else _replayed(body, receive), reply)

    def _check_draining(self, path: str) -> None:
        if self._state.draining and path not in WATCHED:
            raise Refused(
                503,
                "this server is stopping; ask again, and another may answer",
                (b"retry-after", b"%d" % AGAIN),
                kind="server_error",
            )

    def _checked_origin(self, path: str, headers: dict[bytes, bytes]) -> str | None:
        """The origin of a page from elsewhere that may ask; None where the server's own asks, or none."""
        host = _text(headers.get(b"host"))
        if path not in PROBED and not self._origins.knows_host(host):
            raise Refused(
                403,
                f"this server is not called {host!r}; name it in allowed_hosts if it is",
                kind="permission_error",
            )
        origin = _text(headers.get(b"origin"))
        if origin is None or self._origins.own(origin, host):
            return None
        if not self._origins.admits(origin):
            raise Refused(
                403,
                f"pages of {origin!r} may not ask this server; cors_origins can name them",
                kind="permission_error",
            )
        return origin

    def _checked_key(self, scope: Scope, path: str) -> Key | None:
        if not self._keys or path in OPEN:
            return None
        given = presented(scope["headers"], basic=path in BASIC)
        key = None if given is None else self._keys.find(given)
        if key is not None:
            return key
        message = (
            "this server asks for an API key, in the header Authorization: Bearer KEY"
            if given is None
            else "this is not one of the server's API keys"
        )
        asks: list[Header] = [(b"www-authenticate", b'Bearer realm="puna"')]
        if path in BASIC:
            asks.append((b"www-authenticate", b'Basic realm="puna, with a key as password", charset="UTF-8"'))
        raise Refused(401, message, *asks, code="invalid_api_key")

    @contextmanager
    def _allowance(self, key: Key | None) -> Iterator[None]:
        """Count a request among those of its key, while it lasts."""
        allowance = self._keys.allowance(key)
        try:
            allowance.take(time.monotonic())
        except Busy as busy:
            raise Refused(
                429,
                str(busy),
                (b"retry-after", b"%d" % busy.retry_after),
                kind="rate_limit_error",
                code="rate_limit_exceeded",
            ) from None
        try:
            yield
        finally:
            allowance.give_back()

    @contextmanager
    def _body_budget(self) -> Iterator[Callable[[int], None]]:
        """`take(bytes)` counts what one request's body takes, until the request has ended."""
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            if self._held + count > BODIES * self._state.most_body:
                raise Refused(
                    503,
                    "the server holds as much as it can; try again in a second",
                    (b"retry-after", b"1"),
                    kind="server_error",
                )
            taken += count
            self._held += count

        try:
            yield take
        finally:
            self._held -= taken

    async def _body(
        self, headers: dict[bytes, bytes], receive: Receive, take: Callable[[int], None]
    ) -> bytes:
        """The whole body, read before the app sees the request: JSON is of use only when complete."""
        most, seconds = self._state.most_body, self._settings.body_seconds
        too_large = Refused(413, f"the body is too large; this server takes {most:,} bytes")
        if int(headers.get(b"content-length", b"0")) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    piece, more = message.get("body", b""), message.get("more_body", False)
                    take(len(piece))
                    body += piece
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            raise Refused(
                408, f"the body did not arrive within {counted(seconds, 'second')}", CLOSE
            ) from None
        return bytes(body)

    async def _failed(self, error: Exception, reply: Reply) -> None:
        """A fault of ours. The app's own handler may have answered already."""
        self._log.fault(error, reply.record.id)
        reply.record.error = reply.record.error or f"{type(error).__name__}: {error}"
        if reply.complete:
            return
        if reply.record.status is not None:
            raise error  # the connection is closed: nothing else can tell that the answer is torn
        body = error_body("the server failed; its log has the request's id", "server_error")
        await reply.whole(500, [JSON], json.dumps(body).encode())

    def _ended(self, record: Record, scope: Scope) -> None:
        if record.route is None:
            declared = scope.get("route")
            known = record.path if record.path in self._paths else None
            record.route = declared.path if isinstance(declared, Route) else known
        client = scope.get("client")
        self.finished(record, client[0] if client else None)


def _is_routine(record: Record) -> bool:
    """Whether it is one of those looks at the server that went well: they come every few seconds."""
    looks = record.method == "GET" and record.path in LOOKS
    return looks and record.status is not None and record.status < 400 and record.error is None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body, and then what really comes: that the client has left."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _request_id(headers: dict[bytes, bytes]) -> str:
    """The client's own, if it can stand in a log and a header; a new one otherwise."""
    given = headers.get(b"x-request-id", b"").strip()
    return given.decode("ascii") if REQUEST_ID.fullmatch(given) else f"req-{os.urandom(12).hex()}"


def _check_headers(given: list[Header], headers: dict[bytes, bytes]) -> None:
    size = sum(len(name) + len(value) for name, value in given)
    if size > HEADERS:
        raise Refused(431, f"the headers have {size:,} bytes; this server takes {HEADERS:,}", CLOSE)
    if b"content-length" in headers and b"transfer-encoding" in headers:
        # Whoever stands before this server may have read another end of the body than it would.
        raise Refused(400, "a body has a Content-Length or a Transfer-Encoding, not both", CLOSE)


def _check_json(headers: dict[bytes, bytes]) -> None:
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip()
    if not JSON_TYPE.fullmatch(kind):
        came = repr(kind.decode("latin-1")) if kind else "none"
        raise Refused(415, f"expected the header Content-Type: application/json, got {came}")


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")


@contextmanager
def _nothing() -> Iterator[None]:
    yield
