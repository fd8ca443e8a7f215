"""A client that goes away frees its place within one step; who does not read holds nobody up."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from puna.engine.llm import LLM
from puna.engine.settings import EngineSettings
from puna.settings import parse
from tests.serve.running import Running, Seen, running, slow_steps

STEP = 0.25  # seconds: long beside all that happens between two steps
LONG = {"prompt": "def ", "temperature": 0, "max_tokens": 300, "ignore_eos": True}
TALK = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 300, "ignore_eos": True, "seed": 1}


@contextmanager
def slowly(llm: LLM, monkeypatch: pytest.MonkeyPatch, **engine: Any) -> Iterator[tuple[Running, list[float]]]:
    """A server whose steps take their time, and when each of them began."""
    with running(LLM(llm.model, llm.tokenizer, engine=parse(EngineSettings, engine))) as server:
        yield server, slow_steps(server, monkeypatch, STEP)


def sent(server: Running, path: str, body: dict[str, Any]) -> socket.socket:
    """A connection on which a request has been sent."""
    content = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def until(condition: Callable[[], bool]) -> None:
    """Wait, but not for ever."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.002)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "awaited"])
@pytest.mark.parametrize(("path", "body"), [("/v1/completions", LONG), ("/v1/chat/completions", TALK)])
def test_who_leaves_is_computed_no_further(
    path: str, body: dict[str, Any], stream: bool, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with slowly(llm, monkeypatch) as (server, began):
        connection = sent(server, path, {**body, "stream": stream, "n": 2})
        until(lambda: len(began) >= 2)
        connection.close()
        left = time.monotonic()
        assert server.rests()
        assert sum(at > left for at in began) <= 1
        seen = server.state.metrics
        assert isinstance(seen, Seen)
        (job,) = seen.jobs
        assert {track.sequence.finish_reason for track in job.answer.tracks} == {"cancelled"}


def test_who_leaves_while_waiting_is_never_computed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with slowly(llm, monkeypatch, max_running=1) as (server, began):
        first = sent(server, "/v1/completions", {**LONG, "max_tokens": 4})
        until(lambda: len(began) >= 1)
        second = sent(server, "/v1/completions", LONG)
        until(lambda: server.state.worker.unfinished == 2)
        second.close()
        assert b"200 OK" in first.recv(1000)
        first.close()
        assert server.rests()
        assert len(began) <= 5
        seen = server.state.metrics
        assert isinstance(seen, Seen)
        assert sum(job.started is not None for job in seen.jobs) == 1


def test_many_who_leave_at_any_moment(server: Running) -> None:
    for wait in (0.0, 0.001, 0.005, 0.02):
        connections = [
            sent(server, "/v1/completions", {**LONG, "stream": number % 2 == 0, "n": 1 + number % 3})
            for number in range(20)
        ]
        time.sleep(wait)
        for connection in connections:
            connection.close()
    assert server.rests(20)
    assert server.post("/v1/completions", {"prompt": "a", "temperature": 0}).status_code == 200


def test_a_reader_who_does_not_read_holds_nobody_up(server: Running, llm: LLM) -> None:
    body = {**LONG, "stream": True, "n": 16, "logprobs": 20}
    connection = sent(server, "/v1/completions", body)
    expected = llm.generate("x", temperature=0.0, max_new_tokens=50, ignore_eos=True)
    asked = {"prompt": "x", "temperature": 0, "max_tokens": 50, "ignore_eos": True}
    for _ in range(3):
        response = server.post("/v1/completions", asked)
        assert response.json()["choices"][0]["text"] == expected.text
    assert server.rests(20)  # it was computed all the same, and waits to be read
    content = b""
    while b"[DONE]" not in content[-100:]:
        content += connection.recv(1 << 20)
    connection.close()
    assert content.count(b'"finish_reason":"length"') == 16
