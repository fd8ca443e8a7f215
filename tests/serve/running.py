"""A server in this process: the app over uvicorn on a free port, its event loop on a thread of its own."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest
import uvicorn

from puna.engine.llm import LLM
from puna.serve.app import make_app
from puna.serve.jobs import Job
from puna.serve.settings import ServeSettings
from puna.serve.state import ServerState
from puna.serve.worker import EngineThread
from puna.settings import parse

STARTS = 30.0  # seconds within which a server listens
MODEL = "tiny"


@dataclass
class Seen:
    """Figures that keep what they are told."""

    steps: list[tuple[int, int, float]] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)

    def stepped(self, sequences: int, rows: int, seconds: float) -> None:
        """One more step."""
        self.steps.append((sequences, rows, seconds))

    def ended(self, job: Job) -> None:
        """One job less."""
        self.jobs.append(job)

    def exposition(self) -> bytes:
        """Something to be told apart."""
        return b"# TYPE puna_steps counter\npuna_steps %d\n" % len(self.steps)

    def status(self, state: ServerState) -> dict[str, Any]:
        """Something to be told apart."""
        return {"steps": len(self.steps), "model": state.model_id}


@dataclass
class Running:
    """A server at work."""

    url: str
    state: ServerState
    loop: asyncio.AbstractEventLoop
    client: httpx2.Client
    """Of this server's URL: `client.post("/v1/completions", json=…)`."""

    def post(self, path: str, body: Any, **more: Any) -> httpx2.Response:
        """Ask with a JSON body."""
        return self.client.post(path, json=body, **more)

    def get(self, path: str, **more: Any) -> httpx2.Response:
        """Ask without one."""
        return self.client.get(path, **more)

    def rests(self, seconds: float = 5.0) -> bool:
        """Whether soon nothing is computed any more, and every block is given back or only shared."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            load = self.state.worker.load
            if (load.running, load.waiting, self.state.worker.unfinished) == (0, 0, 0):
                return True
            time.sleep(0.005)
        return False


def chunks_of(response: httpx2.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end as streams do."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *parts, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(part.startswith("data: {") for part in parts)
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def slow_steps(server: Running, monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[float]:
    """From now on each step takes so long; when each of them began."""
    engine = server.state.llm.engine
    step, began = engine.step, list[float]()

    def slow() -> bool:
        at = time.monotonic()
        worked = step()
        if worked:
            began.append(at)
            time.sleep(seconds)
        return worked

    monkeypatch.setattr(engine, "step", slow)
    return began


def state_of(llm: LLM, settings: ServeSettings, figures: Any = None) -> ServerState:
    """A server's state, its worker not yet started."""
    seen = figures or Seen()
    worker = EngineThread(llm.engine, seen, settings.max_waiting)
    name = settings.model_name or MODEL
    return ServerState(llm, worker, settings, name, frozenset({name, "models/tiny"}), "fp_1", 1, seen)


@contextmanager
def running(
    llm: LLM,
    figures: Any = None,
    app_of: Callable[[ServerState], Any] = make_app,
    **settings: Any,
) -> Iterator[Running]:
    """A server of a model; `settings` are those of ServeSettings.

    `app_of` makes what answers: the app, with or without what stands around it.
    """
    state = state_of(llm, parse(ServeSettings, settings), figures)
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        server = uvicorn.Server(
            uvicorn.Config(app_of(state), log_config=None, lifespan="off", ws="none", access_log=False)
        )
        loop = asyncio.new_event_loop()
        thread = threading.Thread(
            target=lambda: loop.run_until_complete(_serve(server, state, listening)),
            name="server",
            daemon=True,
        )
        thread.start()
        try:
            _wait_for(server, thread)
            with httpx2.Client(base_url=url, timeout=60) as client:
                yield Running(url, state, loop, client)
        finally:
            server.should_exit = True
            thread.join(STARTS)
            assert not thread.is_alive(), f"the server did not end:\n{_doing(loop)}"
            loop.close()


def _doing(loop: asyncio.AbstractEventLoop) -> str:
    """What every thread is at, and what every task of the loop waits for."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [
        f"thread {names.get(number, number)}:\n{''.join(traceback.format_stack(frame))}"
        for number, frame in sys._current_frames().items()
    ]
    for task in asyncio.all_tasks(loop):
        lines = [line for frame in task.get_stack() for line in traceback.format_stack(frame, 1)]
        parts.append(f"{task!r}:\n{''.join(lines)}")
    return "\n".join(parts)


async def _serve(server: uvicorn.Server, state: ServerState, listening: socket.socket) -> None:
    state.worker.start()
    await server.serve(sockets=[listening])
    await state.worker.stop()


def _wait_for(server: uvicorn.Server, thread: threading.Thread) -> None:
    end = time.monotonic() + STARTS
    while not server.started:
        assert thread.is_alive() and time.monotonic() < end, "the server did not start"
        time.sleep(0.005)
