"""Answers that a request gets before any route sees it: refusals, and what each answer carries."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from puna.serve.faults import error_body
from puna.serve.origins import Header
from puna.serve.record import Record
from puna.serve.state import ServerState

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LINGER_SECONDS = 2.0  # for which the body of a refused request is read, so that its client sees the answer
LINGER_BYTES = 128 << 20
KEEPS = 64 << 10  # a refused body that is not longer costs no connection
CLOSE = (b"connection", b"close")
JSON = (b"content-type", b"application/json")


class Refused(Exception):
    """A request that goes no further."""

    def __init__(
        self,
        status: int,
        message: str,
        *headers: Header,
        kind: str = "invalid_request_error",
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers, self.kind, self.code = status, headers, kind, code


class Gone(Exception):
    """The client left while it sent its request."""


class Reply:
    """`send` as the app sees it: the guard's headers go with the first message, the rest passes through."""

    def __init__(self, send: Send, record: Record, state: ServerState) -> None:
        self.record, self.complete = record, False
        self.headers: list[Header] = [(b"x-request-id", record.id.encode("ascii"))]
        self._send, self._state = send, state

    async def __call__(self, message: Message) -> None:
        """ASGI's `send`."""
        if message["type"] == "http.response.body":
            await self._send(message)
            self.complete = not message.get("more_body", False)
        else:
            self.record.status = message["status"]
            headers = [*message.get("headers", ()), *self.headers]
            if self._state.draining and CLOSE not in headers:
                headers.append(CLOSE)
            await self._send({**message, "headers": headers})

    async def whole(self, status: int, headers: list[Header], body: bytes, more_body: bool = False) -> None:
        """Send an answer of ours."""
        length = [] if status == 204 else [(b"content-length", b"%d" % len(body))]
        await self({"type": "http.response.start", "status": status, "headers": [*headers, *length]})
        await self({"type": "http.response.body", "body": body, "more_body": more_body})


async def refuse(reply: Reply, refusal: Refused, receive: Receive, headers: dict[bytes, bytes]) -> None:
    """Answer; then read on for a while: a connection closed on a client that still sends loses the answer."""
    body = json.dumps(error_body(str(refusal), refusal.kind, code=refusal.code)).encode()
    own: list[Header] = [JSON, *refusal.headers]
    unread = has_body(headers)
    if unread and not 0 < int(headers.get(b"content-length", b"0")) <= KEEPS and CLOSE not in own:
        own.append(CLOSE)
    await reply.whole(refusal.status, own, body, more_body=unread)
    if unread:
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                await _discard(receive)
        await reply({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(receive: Receive) -> None:
    left, more = LINGER_BYTES, True
    while more and left > 0:
        message = await receive()
        left -= len(message.get("body", b""))
        more = message.get("more_body", False)


def has_body(headers: dict[bytes, bytes]) -> bool:
    """Whether a request's headers announce a body."""
    return headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
