"""`puna serve` as a process of its own, as somebody runs it, perhaps with something wrong inside."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import httpx2
import torch

from puna.cli import main

SLOW_STEPS = """
import time
from puna.engine.engine import Engine
step = Engine.step
def slow(self):
    time.sleep(0.05)
    return step(self)
Engine.step = slow
"""
FAULTY_STEP = """
import time
from puna.engine.engine import Engine
step = Engine.step
steps = 0
def faulty(self):
    global steps
    steps += 1
    if steps > 40:
        raise RuntimeError("injected")
    time.sleep(0.05)
    return step(self)
Engine.step = faulty
"""
HUNG_STEP = """
import time
import puna.serve.server as server
from puna.engine.engine import Engine
server.STEP_SECONDS = 0.5
step = Engine.step
steps = 0
def hung(self):
    global steps
    steps += 1
    time.sleep(3600 if steps > 20 else 0.02)
    return step(self)
Engine.step = hung
"""
IMPATIENT = HUNG_STEP + "server.HUNG_SECONDS = 1.5\n"
STARTS = 60.0  # seconds
READY = re.compile(r"^Serving (\S+) at (https?://\S+)$")
FORKS = multiprocessing.get_context("forkserver")  # libraries are loaded once for all processes
FORKS.set_forkserver_preload(["torch._dynamo", "puna.serve.server", "puna.cli.app", "puna.recipes.models"])


def _serve(arguments: Sequence[str], inside: str, environment: dict[str, str], said: str) -> None:
    """In the new process: the command, as the shell would start it."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), sys.__stderr__.fileno())
    sys.argv = ["puna", "serve", *arguments]
    exec(inside, {})
    main()


class Process:
    """A server process, and what it says."""

    def __init__(self, model: Path | str, *arguments: str, inside: str = "", **environment: str) -> None:
        """`inside` is Python that runs before the command does; `arguments` are key=value or options."""
        handle, said = tempfile.mkstemp()
        os.close(handle)
        self._said = Path(said)
        command = [str(model), "port=0", "host=127.0.0.1", *arguments]
        self.process = FORKS.Process(target=_serve, args=(command, inside, environment, said), daemon=True)
        self.process.start()
        self.lines: deque[str] = deque(maxlen=100_000)
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""

    def wait(self) -> Process:
        """Until it listens."""
        assert self._ready.wait(STARTS) and self.url, self.lines
        return self

    def client(self, **more: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60, **more)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid or 0, number)

    def end(self, seconds: float = 20) -> int:
        """Its exit code, once it has ended by itself."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "it has not ended"
        self._reader.join(5)
        return self.process.exitcode

    def memory(self) -> int:
        """Bytes of main memory it holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) << 10

    @property
    def log(self) -> list[dict[str, Any]]:
        """The lines that are JSON."""
        return [json.loads(line) for line in tuple(self.lines) if line.startswith("{")]

    def _read(self) -> None:
        line = ""
        with self._said.open(encoding="utf-8") as stream:
            while True:
                over = bool(wait([self.process.sentinel], 0))  # asking it itself would take its exit code
                for piece in stream:
                    line += piece
                    if line.endswith("\n"):  # otherwise its end is still to come
                        self._take(line.rstrip("\n"))
                        line = ""
                if over:
                    break
                time.sleep(0.01)
        self._said.unlink()
        self._ready.set()

    def _take(self, line: str) -> None:
        self.lines.append(line)
        message = json.loads(line).get("message", "") if line.startswith("{") else line
        if found := READY.match(message):
            self.url = found[2]
            self._ready.set()


@contextmanager
def served(model: Path | str, *arguments: str, **more: Any) -> Iterator[Process]:
    """A process that listens; killed at the end if it still runs."""
    process = Process(model, *arguments, **more)
    try:
        yield process.wait()
    finally:
        process.process.kill()
        process.end()


class Stream(threading.Thread):
    """A streamed answer that is read on a thread."""

    def __init__(self, process: Process, **body: Any) -> None:
        super().__init__(daemon=True)
        self._process = process
        self._body = {"prompt": [5, 6, 7], "max_tokens": 100, "ignore_eos": True, "stream": True, **body}
        self.chunks: list[str] = []
        self.status: int | None = None
        self.error: Exception | None = None
        self.ended = 0.0
        self.start()

    def run(self) -> None:
        try:
            with (
                self._process.client() as client,
                client.stream("POST", "/v1/completions", json=self._body) as answer,
            ):
                self.status = answer.status_code
                self.chunks += (line for line in answer.iter_lines() if line)
        except Exception as error:
            self.error = error
        self.ended = time.monotonic()

    def begun(self) -> Stream:
        """Once it has its status."""
        end = time.monotonic() + 20
        while self.status is None and self.error is None:
            assert time.monotonic() < end
            time.sleep(0.01)
        return self

    @property
    def last(self) -> str:
        return self.chunks[-1].removeprefix("data: ")
