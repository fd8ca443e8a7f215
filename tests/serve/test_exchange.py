"""What may happen between a request and its last byte: time runs out, steps fail, nothing comes for long."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from puna.engine.llm import LLM
from puna.serve import exchange
from puna.serve.app import make_app
from puna.serve.record import Record
from puna.serve.state import ServerState
from tests.serve.running import Running, running, slow_steps

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"
LONG = {"prompt": "a", "temperature": 0, "max_tokens": 400, "ignore_eos": True}


@contextmanager
def slowly(llm: LLM, monkeypatch: pytest.MonkeyPatch, seconds: float, **settings: Any) -> Iterator[Running]:
    """A server whose steps take so many seconds."""
    with running(LLM(llm.model, llm.tokenizer), **settings) as server:
        slow_steps(server, monkeypatch, seconds)
        yield server


def parts_of(text: str) -> list[str]:
    """The events of a stream and its comments."""
    *parts, rest = text.split("\n\n")
    assert rest == ""
    return parts


def test_what_takes_too_long_is_given_up(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with slowly(llm, monkeypatch, 0.05, request_seconds=0.7) as server:
        late = server.post(TEXT, LONG)
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "timeout"
        assert server.rests()
        *begun, error = parts_of(server.post(TEXT, {**LONG, "stream": True}).text)
        assert begun
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "timeout"  # and no [DONE]
        assert server.rests()


def test_a_stream_that_waits_says_so(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "KEEP_ALIVE", 0.1)
    with slowly(llm, monkeypatch, 0.35) as server:
        *parts, done = parts_of(server.post(TEXT, {**LONG, "max_tokens": 3, "stream": True}).text)
        assert done == "data: [DONE]"
        assert parts.count(": waiting") >= 3
        assert any(part.startswith("data: {") for part in parts)
        # While nothing has been sent, a refusal still has a status of its own.
        assert server.post(TEXT, {**LONG, "stream": True, "regex": "("}).status_code == 400


def test_a_step_that_fails_ends_its_requests_and_no_others(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running(LLM(llm.model, llm.tokenizer)) as server:
        engine = server.state.llm.engine
        chosen, steps = engine._chosen, []

        def failing(parts: Any) -> Any:
            steps.append(parts)
            if len(steps) == 4:
                raise ZeroDivisionError("in a step")
            return chosen(parts)

        short = {**LONG, "max_tokens": 30}
        for stream in (False, True):
            steps.clear()
            monkeypatch.setattr(engine, "_chosen", failing)
            # Without the guard around the app uvicorn closes a connection whose request met a fault.
            response = server.post(TEXT, {**short, "stream": stream}, headers={"connection": "close"})
            if stream:
                *begun, error = parts_of(response.text)
                assert all('"finish_reason":null' in part for part in begun)
                assert json.loads(error.removeprefix("data: "))["error"]["code"] == "internal_error"
            else:
                assert response.status_code == 500
                assert response.json()["error"]["type"] == "server_error"
            assert "ZeroDivision" not in response.text
            assert server.post(TEXT, short).status_code == 200
    told = [record.exc_info[0] for record in caplog.records if record.exc_info]
    assert told == [ZeroDivisionError, ZeroDivisionError]


def test_heavy_work_holds_nobody_up(server: Running) -> None:
    ended: list[float] = []

    def heavy() -> None:
        content = "word and another " * 100_000
        assert server.post("/tokenize", {"content": content}, timeout=120).status_code == 200
        ended.append(time.perf_counter())

    asking = threading.Thread(target=heavy)
    asking.start()
    answered = []
    while asking.is_alive():
        assert server.get("/health").status_code == 200
        answered.append(time.perf_counter())
    asking.join()
    assert sum(at < ended[0] for at in answered) >= 3  # it takes the time of hundreds


def test_what_is_known_of_a_request_afterwards(llm: LLM) -> None:
    records: list[Record] = []

    def recorded(state: ServerState) -> Any:
        app = make_app(state)

        async def asgi(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                record = Record("1", scope["method"], scope["path"], time.monotonic())
                scope.setdefault("state", {})["record"] = record
                records.append(record)
            await app(scope, receive, send)

        return asgi

    talk = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    with running(llm, app_of=recorded, log_prompts=True) as server:
        for body in (
            {"prompt": [[1, 7], [1, 5]], "n": 2, "seed": 1, "max_tokens": 3, "ignore_eos": True},
            {"prompt": "a", "temperature": 9},
        ):
            server.post(TEXT, body)
        server.post(CHAT, {"messages": talk, "seed": 1, "max_tokens": 3, "stream": True, "ignore_eos": True})
        server.get("/nope")
    two, refused, streamed, nowhere = records
    assert (two.stream, streamed.stream) == (False, True)
    assert (two.completion_tokens, streamed.completion_tokens) == (12, 3)
    assert two.prompt_tokens == 4
    assert two.finish_reasons == ["length"] * 4
    assert two.queued is not None
    assert two.first_token is not None
    assert 0 <= two.queued <= two.first_token < 60
    assert two.prompt == [[1, 7], [1, 5]]
    assert len(two.answer) == 4
    assert streamed.prompt == [{"role": "user", "content": "hello"}]
    assert refused.error == "'temperature': expected at most 2, got 9"
    assert refused.prompt is None
    assert nowhere.error is not None
    with running(llm, app_of=recorded) as server:
        server.post(TEXT, {"prompt": "a", "seed": 1})
    assert (records[-1].prompt, records[-1].answer) == (None, None)
