"""A stand-in for the server, which says what a test wants; pages cannot tell the difference."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from puna.serve.faults import error_body
from puna.serve.pages import chat_page, status_page

MODEL = "llama-of-the-puna"
STATUS = {
    "model": MODEL,
    "model_facts": {
        "dtype": "bfloat16",
        "device": "cpu",
        "threads": 2,
        "context": 4096,
        "cache_positions": 32_768,
        "template": "model",
    },
    "version": "0.1.0",
    "since": 1_790_000_000.0,
    "uptime_seconds": 93_784.0,
    "draining": False,
    "failed": False,
    "running": 12,
    "waiting": 3,
    "max_running": 64,
    "max_waiting": 256,
    "tokens_per_second": {"10s": 412.3, "60s": 388.0},
    "cache": {"used": 812, "total": 2048, "share": 812 / 2048, "preemptions": 0},
    "latency_seconds": {
        "queue": {"p50": 0.0021, "p95": 0.034, "p99": 0.18},
        "first_token": {"p50": 0.087, "p95": 0.31, "p99": 1.24},
        "time_per_token": {"p50": 0.0231, "p95": 0.0297, "p99": 0.0412},
        "total": {"p50": 4.31, "p95": 12.8, "p99": 127.0},
    },
    "requests": {"200": 1843, "400": 7, "429": 21},
    "errors": [
        {
            "id": "5f0c1d9be2",
            "at": 1_790_000_300.0,
            "route": "/v1/chat/completions",
            "status": 400,
            "kind": "bad_request",
            "key": "anna",
            "message": "temperature: expected a number ≥ 0, got -1",
        }
    ],
}


@dataclass
class Stage:
    """What is said next, and what was asked."""

    url: str = ""
    pieces: list[str] = field(default_factory=lambda: ["All ", "is ", "well."])
    pause: float = 0.0
    """Seconds before each piece."""
    hold: int | None = None
    """The piece before which an answer waits until `go`; as many as there are: before its end."""
    go: threading.Event = field(default_factory=threading.Event)
    end: str = "done"
    """done; short: without the last event; cut: the connection breaks; error: an error event."""
    finish_reason: str = "stop"
    prompt_tokens: int | None = None
    """None: as many as the messages have characters, so that a longer conversation has more."""
    refusal: tuple[int, str] | None = None
    """A status and a message instead of an answer."""
    code: str | None = None
    """Of a refusal."""
    context: int = 4096
    key: str | None = None
    note: str | None = None
    status: dict[str, Any] = field(default_factory=lambda: dict(STATUS))
    requests: list[dict[str, Any]] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when a client leaves before the end of its answer."""

    def reset(self) -> None:
        """As new, at the same address."""
        for name, value in vars(Stage(url=self.url)).items():
            setattr(self, name, value)

    @property
    def messages(self) -> list[dict[str, str]]:
        """Of the last request."""
        messages: list[dict[str, str]] = self.requests[-1]["messages"]
        return messages


def chunk(choices: list[Any], **more: Any) -> bytes:
    """One server-sent event."""
    body = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": MODEL, "choices": choices}
    return b"data: " + json.dumps(body | {"usage": None} | more).encode() + b"\n\n"


def logprobs_of(piece: str, index: int) -> dict[str, Any]:
    """Falling from near certainty, with two others beside each."""
    chance = max(0.97 - 0.13 * (index % 8), 0.02)
    others = [("llama", 0.6 * (1 - chance)), (" alpaca", 0.3 * (1 - chance))]
    top = [{"token": piece, "logprob": math.log(chance), "bytes": list(piece.encode())}]
    top += [{"token": text, "logprob": math.log(p), "bytes": list(text.encode())} for text, p in others]
    return {"content": [top[0] | {"top_logprobs": top}], "refusal": None}


async def waited(stage: Stage, index: int) -> None:
    """Until the piece of this index may be sent."""
    await asyncio.sleep(stage.pause)
    while index == stage.hold and not stage.go.is_set():
        await asyncio.sleep(0.005)


async def answer(stage: Stage, asked: dict[str, Any]) -> AsyncIterator[bytes]:
    """The events of one answer."""
    finished = False
    try:
        yield b": waiting\n\n" + chunk([{"index": 0, "delta": {"role": "assistant", "content": ""}}])
        for index, piece in enumerate(stage.pieces):
            await waited(stage, index)
            logprobs = logprobs_of(piece, index) if asked.get("logprobs") else None
            yield chunk(
                [{"index": 0, "delta": {"content": piece}, "logprobs": logprobs, "finish_reason": None}]
            )
        await waited(stage, len(stage.pieces))
        finished = True
    finally:
        if not finished:
            stage.gone.set()
    if stage.end == "cut":
        raise ConnectionError("as the test wants it")
    if stage.end == "error":
        yield b"data: " + json.dumps(error_body("the engine has failed", "server_error")).encode() + b"\n\n"
    if stage.end == "done":
        yield chunk([{"index": 0, "delta": {}, "finish_reason": stage.finish_reason}])
        count = len(stage.pieces)
        prompt = stage.prompt_tokens or sum(len(message["content"]) for message in asked["messages"])
        usage = {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": count + prompt}
        yield chunk([], usage=usage)
        yield b"data: [DONE]\n\n"


def make_stage_app(stage: Stage) -> Starlette:
    """The routes that the pages use."""

    def refused(request: Request) -> Response | None:
        if stage.key is None or request.headers.get("authorization") == f"Bearer {stage.key}":
            return None
        body = error_body("this server has keys, and this is none of them", "invalid_request_error")
        return JSONResponse(body, 401, {"WWW-Authenticate": 'Basic realm="puna"'})

    async def models(request: Request) -> Response:
        model = {"id": MODEL, "object": "model", "context": stage.context}
        return refused(request) or JSONResponse({"object": "list", "data": [model]})

    async def complete(request: Request) -> Response:
        asked = await request.json()
        stage.requests.append(asked)
        if (answered := refused(request)) is not None:
            return answered
        if stage.refusal is not None:
            status, message = stage.refusal
            body = error_body(message, "server_error", code=stage.code)
            return JSONResponse(body, status, {"Retry-After": "7"} if status in (429, 503) else None)
        headers = {"X-Puna-Note": stage.note} if stage.note else None
        return StreamingResponse(answer(stage, asked), media_type="text/event-stream", headers=headers)

    async def chat(request: Request) -> Response:
        return chat_page(request.headers.get("if-none-match"))

    async def status(request: Request) -> Response:
        if "application/json" in request.headers.get("accept", ""):
            return JSONResponse(stage.status)
        return status_page(request.headers.get("if-none-match"))

    return Starlette(
        routes=[
            Route("/", chat),
            Route("/status", status),
            Route("/v1/models", models),
            Route("/v1/chat/completions", complete, methods=["POST"]),
        ]
    )


@contextmanager
def performing(port: int = 0) -> Iterator[Stage]:
    """A stage that answers on a thread of its own."""
    stage = Stage()
    log = logging.getLogger("uvicorn.error")
    level = log.level
    log.setLevel(logging.CRITICAL)  # connections break because tests want them to
    config = uvicorn.Config(
        make_stage_app(stage), log_config=None, lifespan="off", ws="none", access_log=False
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", port)) as listening:
        stage.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the stage did not start"
                time.sleep(0.005)
            yield stage
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)
            log.setLevel(level)
