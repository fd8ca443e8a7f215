"""A server as a process of its own: started, waited for, asked what it counts, ended."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from puna.errors import PunaError
from puna.recipes.bench.load_generator import Target

STARTING = 600.0  # seconds that a server may take to open its model
ENDING = 60.0  # seconds that it may take to end


@dataclass(frozen=True)
class ServerProcess:
    """A server that answers: where, and its process."""

    target: Target
    process: subprocess.Popen[bytes]

    def counted(self) -> dict[str, float]:
        """What /metrics says, by name; samples with labels are left out."""
        lines = get(self.target, "/metrics").decode().splitlines()
        pairs = (line.split() for line in lines if not line.startswith("#") and "{" not in line)
        return {name: float(value) for name, value, *_ in pairs}

    def pause(self) -> None:
        """Take the processor from it; connections stay."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Give it the processor again."""
        self.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def running(
    command: Sequence[str], port: int, log: Path, environment: Mapping[str, str], ready: str = "/ready"
) -> Iterator[ServerProcess]:
    """A server on this machine's own address from the moment at which it is ready; SIGTERM ends it.

    Args:
        command: the program and its arguments.
        port: where it will listen.
        log: a file for what it prints.
        environment: all of its variables.
        ready: a path that is answered with 200 when it is ready.

    Raises:
        PunaError: it ended, or took too long; the end of its log says why.
    """
    target = Target("127.0.0.1", port)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=dict(environment)
        )
    try:
        _wait(target, process, ready, log)
        yield ServerProcess(target, process)
    finally:
        _end(process)


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def get(target: Target, path: str, timeout: float = 10.0) -> bytes:
    """What the server has at a path.

    Raises:
        OSError: it is not there, or answers with another status than 200.
    """
    connection = http.client.HTTPConnection(target.host, target.port, timeout=timeout)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
    except http.client.HTTPException as error:
        raise OSError(f"{path}: no HTTP: {error}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise OSError(f"{path}: status {response.status}")
    return body


def _wait(target: Target, process: subprocess.Popen[bytes], ready: str, log: Path) -> None:
    until = time.monotonic() + STARTING
    while time.monotonic() < until:
        if process.poll() is not None:
            raise PunaError(f"the server ended with status {process.returncode}: {_last_words(log)}")
        with contextlib.suppress(OSError):
            get(target, ready)
            return
        time.sleep(0.1)
    raise PunaError(f"the server was not ready within {STARTING:g} seconds: {_last_words(log)}")


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if not lines:
        return "it printed nothing"
    with contextlib.suppress(ValueError, KeyError, TypeError):  # a log as JSON
        return str(json.loads(lines[-1])["message"])
    return lines[-1]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGCONT)  # one that was paused would not hear
    process.terminate()
    try:
        process.wait(ENDING)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
