"""Images: the steps that make them, the command they run, its health check; outside a container."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from puna.cli.app import app as cli
from puna.engine.llm import LLM
from tests.deploy.files import (
    DOCKERFILES,
    PORT,
    ROOT,
    command_of,
    health_check,
    instructions,
    pod,
    value_of,
)

KEYWORDS = {
    "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "STOPSIGNAL", "USER",
    "VOLUME", "WORKDIR",
}  # fmt: skip


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_made_of_known_steps_and_runs_as_a_user_of_its_own(path: Path) -> None:
    steps = instructions(path)
    names = [name for name, _ in steps]
    assert set(names) <= KEYWORDS and names[0] == "FROM" and names.count("FROM") == 1
    image, _, tag = steps[0][1].partition(":")
    assert image and re.match(r"\d", tag)
    user = value_of(path, "USER")
    assert names.index("USER") > max(n for n, name in enumerate(names) if name in ("RUN", "COPY"))
    assert user == f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" != "0:0"
    assert value_of(path, "STOPSIGNAL") == "SIGTERM"
    assert not any(re.search(r"(?i)key|secret|token|passw", value) for name, value in steps if name == "ENV")
    assert [value for name, value in steps if name == "ARG" and not value.startswith("TORCH_INDEX=")] == []


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_built_from_what_the_build_may_read(path: Path) -> None:
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [rule for rule in rules if rule and not rule.startswith("#")]
    assert rules[0] == "*"
    sources = {x for name, value in instructions(path) if name == "COPY" for x in value.split()[:-1]}
    assert sources == {rule[1:] for rule in rules if rule.startswith("!")}
    assert [source for source in sources if not (ROOT / source).exists()] == []


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_installs_pinned_versions(path: Path) -> None:
    pips = [part for name, value in instructions(path) if name == "RUN" for part in value.split("&&")]
    pips = [part for part in pips if "pip install" in part]
    assert len(pips) == 2 and all("--constraint constraints.txt" in part for part in pips)
    assert pips[0].split()[-1] == "torch" and pips[1].split()[-1] == "'.[serve]'"
    assert re.search(r"^torch==[\d.]+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_a_command_that_exists(path: Path) -> None:
    program, verb, *arguments = command_of(path)
    command = get_command(cli).commands[verb]  # type: ignore[attr-defined]
    assert program == "puna"
    values = command.make_context("puna serve", arguments).params
    assert values["host"] == "0.0.0.0" and values["port"] == PORT and values["model"] == "/models"


class Answers(BaseHTTPRequestHandler):
    """A server whose /health has a status to be chosen."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def answering() -> Iterator[int]:
    """Its port."""
    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def healthy(path: Path, port: int, python: str = sys.executable) -> int:
    """The exit code of an image's health check, behind a proxy that does not exist."""
    _, *arguments = (part.replace(f":{PORT}/", f":{port}/") for part in health_check(path))
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1"}
    run = subprocess.run([python, *arguments], capture_output=True, check=False, env=environment)
    return run.returncode


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_health_check_tells_sick_from_well(
    path: Path, answering: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert health_check(path)[0] == "python"
    assert healthy(path, answering) == 0
    monkeypatch.setattr(Answers, "status", 503)
    assert healthy(path, answering) == 1
    assert healthy(path, 1) == 1


def built(directory: Path) -> Path:
    """The `bin` of an environment in which the Dockerfile's pip steps ran, after its COPY steps."""
    context, environment = directory / "context", directory / "venv"
    venv.create(environment, with_pip=True)
    variables = {**os.environ, "PATH": f"{environment / 'bin'}:{os.environ['PATH']}"}
    for name, value in instructions(DOCKERFILES[0]):
        if name == "ARG":
            key, _, default = value.partition("=")
            variables.setdefault(key, default)
        elif name == "COPY":
            *sources, destination = value.split()
            for source in sources:
                place = context / destination / (source if destination.endswith("/") else "")
                place.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if (ROOT / source).is_dir() else shutil.copyfile)(ROOT / source, place)
        elif name == "RUN" and value.startswith("pip "):
            # An index that cannot be reached is passed over; pip would try it for minutes first.
            ran = subprocess.run(
                value, shell=True, cwd=context, env={**variables, "PIP_RETRIES": "1", "PIP_TIMEOUT": "20"},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert ran.returncode == 0, ran.stdout + ran.stderr
    return environment / "bin"


def asked(port: int, path: str, body: object = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(
            "GET" if body is None else "POST",
            path,
            body and json.dumps(body),
            {"Content-Type": "application/json"},
        )
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"null")
    finally:
        connection.close()


@pytest.mark.slow
def test_the_images_steps_work_outside_a_container(llm: LLM, tmp_path: Path) -> None:
    binaries = built(tmp_path)
    llm.save(tmp_path / "models")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program, *arguments = command_of(DOCKERFILES[0])
    arguments = [{"/models": str(tmp_path / "models"), str(PORT): str(port)}.get(x, x) for x in arguments]
    server = subprocess.Popen(
        [binaries / program, *arguments, "model_name=puna", "drain_seconds=5"],
        cwd=tmp_path, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        python = str(binaries / "python")
        waited = time.monotonic() + 300
        while healthy(DOCKERFILES[0], port, python):
            assert server.poll() is None and time.monotonic() < waited
            time.sleep(0.5)
        assert asked(port, "/ready")[0] == 200
        body = {"model": "puna", "prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0}
        status, answer = asked(port, "/v1/completions", body)
        assert status == 200 and answer["usage"]["completion_tokens"] <= 4
        assert [path.name for path in (tmp_path / "cache").iterdir()] == ["puna"]
        server.send_signal(signal.Signals[value_of(DOCKERFILES[0], "STOPSIGNAL")])
        assert server.wait(30) == 128 + signal.SIGTERM
        assert healthy(DOCKERFILES[0], port, python) == 1
    finally:
        server.kill()
        _, log = server.communicate()
    assert all(json.loads(line) for line in log.decode().splitlines() if line.startswith("{"))
