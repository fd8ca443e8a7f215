"""Load for a server of OpenAI's API: clients or arrivals, streams read as they come, times of every token.

Client and server share a machine, and what one takes the other lacks. So a connection notes only what came,
and when; what it says is read after the load is over. Each request has a connection of its own.

Times are seconds of `time.perf_counter`.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from puna.recipes.bench.http_replies import EventReader, ResponseReader

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Target:
    """Where the server listens, and a key to show."""

    host: str
    port: int
    key: str | None = None


@dataclass(frozen=True)
class Query:
    """A request: its path, and its body, which is JSON."""

    path: str
    body: bytes

    def message(self, target: Target) -> bytes:
        """The whole request as it is sent."""
        lines = [
            f"POST {self.path} HTTP/1.1",
            f"Host: {target.host}:{target.port}",
            "Content-Type: application/json",
            f"Content-Length: {len(self.body)}",
            "Connection: close",
            *([f"Authorization: Bearer {target.key}"] if target.key else []),
        ]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + self.body


def completion(prompt: str | Sequence[int], new: int, **fields: Any) -> Query:
    """Ask for `new` tokens after a prompt of text or ids, as a stream whose end says how many there were."""
    return _query(
        TEXT, {"prompt": prompt if isinstance(prompt, str) else list(prompt), "max_tokens": new}, fields
    )


def conversation(text: str, new: int, **fields: Any) -> Query:
    """Ask for `new` tokens of an answer to one message, as a stream whose end says how many there were."""
    return _query(CHAT, {"messages": [{"role": "user", "content": text}], "max_tokens": new}, fields)


def _query(path: str, asked: dict[str, Any], fields: dict[str, Any]) -> Query:
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    return Query(path, json.dumps({**asked, **streamed, **fields}).encode())


@dataclass
class Exchange:
    """What went over one connection: what came with the time of each piece; `fault` is what broke it."""

    sent: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    ended: float = 0.0
    fault: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a request: when pieces of text came, how many tokens there were, what went wrong.

    `first` and `each` are seconds: to the first text, and from one token to the next on average; None where
    there are too few.
    """

    sent: float
    ended: float
    times: tuple[float, ...] = ()
    text: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    error: str | None = None

    @property
    def first(self) -> float | None:
        """From sending to the first piece of text."""
        return self.times[0] - self.sent if self.times else None

    @property
    def each(self) -> float | None:
        """Between tokens: one piece may hold several, so the time is divided by their number."""
        return (
            (self.times[-1] - self.times[0]) / (self.tokens - 1) if self.times and self.tokens > 1 else None
        )


def drive(load: Coroutine[Any, Any, list[Exchange]]) -> list[Outcome]:
    """Let a load run, `closed_loop` or `open_loop`, and read what came."""
    gc.collect()
    gc.disable()  # a collection takes tens of milliseconds, in which nothing would be noted
    try:
        exchanges = asyncio.run(load)
    finally:
        gc.enable()
    return [outcome(exchange) for exchange in exchanges]


async def closed_loop(
    target: Target, queries: Sequence[Query], clients: int, timeout: float
) -> list[Exchange]:
    """Clients that wait for an answer each, then ask the next query; what became of all, in their order."""
    exchanges: list[Exchange | None] = [None] * len(queries)
    waiting = iter(enumerate(queries))

    async def client() -> None:
        for index, query in waiting:
            exchanges[index] = await exchange(target, query, timeout)

    await asyncio.gather(*(client() for _ in range(clients)))
    return [done for done in exchanges if done is not None]


async def open_loop(
    target: Target, queries: Sequence[Query], arrivals: Sequence[float], timeout: float
) -> list[Exchange]:
    """Queries that come at their times, in seconds from now, whether or not earlier ones are answered.

    They count as sent when they were due: a client that is late makes no answer look fast.
    """
    began = time.perf_counter()

    async def arrive(query: Query, due: float) -> Exchange:
        await asyncio.sleep(due - time.perf_counter())
        done = await exchange(target, query, timeout)
        done.sent = due
        return done

    times = (began + arrival for arrival in arrivals)
    return await asyncio.gather(*map(arrive, queries, times))


def poisson_arrivals(rate: float, count: int, seed: int | str) -> list[float]:
    """Seconds at which requests come that know nothing of each other, `rate` in a second on average."""
    draw = random.Random(seed)
    return list(accumulate(draw.expovariate(rate) for _ in range(count)))


async def exchange(target: Target, query: Query, timeout: float) -> Exchange:
    """Ask over a connection of its own, and note what comes until the server ends it."""
    reply = _Reply(query.message(target), asyncio.get_running_loop().create_future())
    done = reply.exchange
    try:
        async with asyncio.timeout(timeout):
            await asyncio.get_running_loop().create_connection(lambda: reply, target.host, target.port)
            await reply.done
    except TimeoutError:
        done.fault = f"no end within {timeout:g} seconds"
        reply.abort()
    except OSError as error:
        done.fault = f"no connection to {target.host}:{target.port}: {error.strerror or error}"
    done.ended = done.pieces[-1][0] if done.pieces else time.perf_counter()
    return done


class _Reply(asyncio.Protocol):
    """The client's end of a connection."""

    def __init__(self, message: bytes, done: asyncio.Future[None]) -> None:
        self._message, self.done = message, done
        self._transport: asyncio.Transport | None = None
        self.exchange = Exchange(time.perf_counter())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._message)

    def data_received(self, data: bytes) -> None:
        self.exchange.pieces.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None:
            self.exchange.fault = f"the connection broke: {error}"
        if not self.done.done():
            self.done.set_result(None)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def outcome(exchange: Exchange) -> Outcome:
    """What an exchange says; `error` tells what is wrong with it, where something is."""
    response = ResponseReader()
    try:
        events = list(_events(exchange, response))
        read, finished = _read(exchange, events)
        refused = "" if response.status in (None, 200) else f"{response.status}: {_said(_body(exchange))}"
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # no HTTP, no JSON, other shapes
        return Outcome(exchange.sent, exchange.ended, error=f"an answer that cannot be read: {error}")
    if response.status is None:
        return _failed(read, exchange.fault or "the connection ended without an answer")
    if refused or read.error:
        return _failed(read, refused or read.error)
    if not response.ended:
        return _failed(read, exchange.fault or "the stream broke off")
    if not finished:
        return _failed(read, "the stream ended without a reason")
    return read if read.tokens else _failed(read, "the stream ended without the number of its tokens")


def _failed(read: Outcome, error: str | None) -> Outcome:
    return Outcome(read.sent, read.ended, read.times, read.text, error=error)


def _events(exchange: Exchange, response: ResponseReader) -> Iterator[tuple[float, bytes]]:
    """The data of each event, and when its last byte came."""
    reader = EventReader()
    for at, piece in exchange.pieces:
        for event in reader.feed(response.feed(piece)):
            yield at, event
    response.close()


def _body(exchange: Exchange) -> bytes:
    response = ResponseReader()
    return b"".join(response.feed(piece) for _, piece in exchange.pieces)


def _read(exchange: Exchange, events: Sequence[tuple[float, bytes]]) -> tuple[Outcome, bool]:
    """What the events say, and whether one says why the answer ended."""
    times: list[float] = []
    texts: list[str] = []
    usage: dict[str, int] = {}
    finished, error = False, None
    for at, data in events:
        if data == b"[DONE]":
            break
        chunk = json.loads(data)
        if "error" in chunk:
            error = _message(chunk)
            break
        usage = chunk.get("usage") or usage
        text = "".join(map(_text, chunk.get("choices", ())))
        if text:
            times.append(at)
            texts.append(text)
        finished = finished or any(choice.get("finish_reason") for choice in chunk.get("choices", ()))
    counts = (usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0))
    read = Outcome(exchange.sent, exchange.ended, tuple(times), "".join(texts), *counts, error)
    return read, finished


def _text(choice: dict[str, Any]) -> str:
    """What a chunk adds to a choice: a completion's text, or a conversation's content."""
    return choice.get("text") or (choice.get("delta") or {}).get("content") or ""


def _said(body: bytes) -> str:
    """What the body of a refusal says."""
    try:
        return _message(json.loads(body))
    except (ValueError, AttributeError):
        return body[:200].decode("utf-8", "replace") or "nothing"


def _message(value: dict[str, Any]) -> str:
    error = value.get("error", value)
    return str(error.get("message", error) if isinstance(error, dict) else error)
