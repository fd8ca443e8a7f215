"""One request for completions from its body to the last byte, watched for time and for clients that leave."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from puna.engine.completion import Completion
from puna.errors import InputError
from puna.serve.aside import LIGHT, ended, left
from puna.serve.chunks import DONE, WAITING, ChatChunks, Chunks, TextChunks, fault_event, usage_event
from puna.serve.faults import Fault, TooLate, fault_of
from puna.serve.jobs import Job
from puna.serve.logprobs import TokenTexts
from puna.serve.prompts import Task, chat_task, completion_task
from puna.serve.record import Record
from puna.serve.responses import Frame, chat_response, text_response, usage_of
from puna.serve.state import ServerState

KEEP_ALIVE = 15.0  # seconds without a byte after which a stream sends a comment
LAST_WORD = 2.0  # seconds for the last chunk to a reader who may have stopped reading
JSON = (b"content-type", b"application/json")
EVENTS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # a proxy in front must not collect the chunks
)
TOKEN_BYTES = 8  # of a response for each token, and for each likely one beside it ten times as many
COMPILED = (b'"tools"', b'"response_format"')  # together they are compiled before the engine's own turn
OURS = 500


@dataclass(frozen=True)
class Kind:
    """What differs between conversations and completions of prompts."""

    prefix: str
    task: Callable[[ServerState, bytes], Task]
    response: Callable[[Frame, Task, Sequence[Completion]], dict[str, Any]]
    chunk: str
    chunks: Callable[[Frame, Task], Chunks]


CHAT = Kind("chatcmpl-", chat_task, chat_response, ChatChunks.KIND, ChatChunks)
TEXT = Kind("cmpl-", completion_task, text_response, TextChunks.KIND, TextChunks)


class Exchange(Response):
    """Answers one request, streaming or not."""

    def __init__(self, state: ServerState, kind: Kind, body: bytes, record: Record) -> None:
        super().__init__()
        self._state, self._kind, self._body, self._record = state, kind, body, record
        self._task: Task | None = None
        self._jobs: list[Job] = []
        self._started, self._sending, self._sent = False, False, time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Work until it is done, the client has left, or the time is over."""
        self._send_raw = send
        work = asyncio.create_task(self._work())
        gone = asyncio.create_task(left(receive))
        try:
            error = await self._watched(work, gone)
        finally:
            await ended(work, gone)
            for job in self._jobs:
                self._state.worker.cancel(job)
            self._note()
        if error is not None and await self._fail(error) == OURS:
            raise error  # the client has its answer; whoever keeps the log gets the rest

    async def _watched(self, work: asyncio.Task[None], gone: asyncio.Task[None]) -> BaseException | None:
        """What went wrong, where something did; a client that has left is told nothing."""
        deadline = self._record.arrived + self._state.settings.request_seconds
        while True:
            now = time.monotonic()
            wait = min(deadline - now, self._sent + KEEP_ALIVE - now)
            await asyncio.wait({work, gone}, timeout=max(wait, 0), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.exception()
            if gone.done():
                self._record.gone = True
                return None
            if time.monotonic() >= deadline:
                return TooLate(self._state.settings.request_seconds)
            await self._keep_alive()

    async def _work(self) -> None:
        task = self._task = await self._prepared()
        self._jobs = await self._state.worker.submit(task.requests)
        state = self._state
        identity, texts = self._kind.prefix + uuid.uuid4().hex, TokenTexts(state.llm.tokenizer)
        frame = Frame(identity, int(time.time()), state.model_id, state.fingerprint, texts)
        if task.asked.stream:
            await self._stream(frame, task)
        else:
            completions = [await job.completion() for job in self._jobs]
            size = sum(_size(completion) for completion in completions)
            content = await state.aside.do(size, lambda: self._whole(frame, task, completions))
            await self._send_whole(200, (JSON, *task.headers), content)

    async def _prepared(self) -> Task:
        compiled = all(name in self._body for name in COMPILED)
        size = max(len(self._body), LIGHT if compiled else 0)
        return await self._state.aside.do(size, lambda: self._kind.task(self._state, self._body))

    def _whole(self, frame: Frame, task: Task, completions: list[Completion]) -> bytes:
        response = self._kind.response(frame, task, completions)
        choices = [json.dumps(choice) for choice in response["choices"]]  # others get a turn between two
        whole = json.dumps({**response, "choices": [], "usage": usage_of(task, self._jobs)})
        before, _, after = whole.partition('"choices": []')
        return f'{before}"choices": [{", ".join(choices)}]{after}'.encode()

    async def _stream(self, frame: Frame, task: Task) -> None:
        self._record.stream = True
        chunks = self._kind.chunks(frame, task)
        if len(self._jobs) == 1:
            await self._pump(chunks, 0, self._jobs[0])
        else:
            try:
                async with asyncio.TaskGroup() as group:
                    for prompt, job in enumerate(self._jobs):
                        group.create_task(self._pump(chunks, prompt, job))
            except BaseExceptionGroup as several:
                raise several.exceptions[0] from None
        last = DONE
        options = task.asked.stream_options
        if options is not None and options.include_usage:
            last = usage_event(frame, self._kind.chunk, usage_of(task, self._jobs)) + DONE
        await self._send(last, more=False)

    async def _pump(self, chunks: Chunks, prompt: int, job: Job) -> None:
        async for delta in job.deltas():
            if delta.finish_reason == "cancelled":
                continue  # what ended it comes next, as an error
            if piece := chunks.of(prompt, job, delta):
                await self._send(piece)

    async def _keep_alive(self) -> None:
        task = self._task
        if task is None or not task.asked.stream or self._sending:
            self._sent = time.monotonic()  # nothing to say, or a reader who does not read: look again later
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORD):
                await self._send(WAITING)

    async def _send(self, piece: bytes, more: bool = True) -> None:
        """A piece of a stream; the first one begins it."""
        self._sending = True
        if not self._started:
            self._started = True
            headers = [*EVENTS, *(self._task.headers if self._task is not None else ())]
            await self._send_raw({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send_raw({"type": "http.response.body", "body": piece, "more_body": more})
        self._sending, self._sent = False, time.monotonic()

    async def _send_whole(self, status: int, headers: Sequence[tuple[bytes, bytes]], content: bytes) -> None:
        self._started = True
        length = (b"content-length", str(len(content)).encode())
        await self._send_raw({"type": "http.response.start", "status": status, "headers": [*headers, length]})
        await self._send_raw({"type": "http.response.body", "body": content, "more_body": False})

    async def _fail(self, error: BaseException) -> int:
        """Tell the client; the status that stands for it, sent or not."""
        if isinstance(error, InputError) and self._task is not None:
            error = self._task.binding.blamed(error)
        fault = told(error, self._record)
        if not self._started:
            await self._send_whole(fault.status, (JSON, *_headers(fault)), fault.content)
        elif self._record.stream:
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORD):
                    await self._send(fault_event(fault), more=False)
        return fault.status

    def _note(self) -> None:
        """What became of it, for logs and metrics."""
        record, jobs = self._record, self._jobs
        if self._task is None or not jobs:
            return
        usage = usage_of(self._task, jobs)
        record.prompt_tokens, record.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        tracks = [track for job in jobs for track in job.answer.tracks]
        record.finish_reasons = [
            str(track.sequence.finish_reason) for track in tracks if track.sequence.finish_reason
        ]
        record.queued = _since(record, [job.started for job in jobs])
        record.first_token = _since(record, [job.first_token for job in jobs])
        if self._state.settings.log_prompts:
            record.prompt = self._task.said
            record.answer = ["".join(track.pieces) for track in tracks]


def told(error: BaseException, record: Record) -> Fault:
    """What a client is told of an error, which the record has too: whole where it is a fault of ours."""
    fault = fault_of(error)
    record.error = f"{type(error).__name__}: {error}" if fault.status == OURS else fault.message
    return fault


def _headers(fault: Fault) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode()) for name, value in fault.headers.items()]


def _size(completion: Completion) -> int:
    """About how many bytes it takes to write it."""
    likely = 0
    for listed in (completion.logprobs, completion.prompt_logprobs):
        likely += sum(10 * (1 + len(entry.top)) for entry in listed or () if entry is not None)
    own = TOKEN_BYTES * (len(completion.tokens) + likely)
    return own + sum(_size(other) for other in completion.alternatives)


def _since(record: Record, times: list[float | None]) -> float | None:
    known = [time for time in times if time is not None]
    return min(known) - record.arrived if known else None
