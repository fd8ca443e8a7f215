"""A server's life: what is told before a model is loaded, how it drains, how it ends; never deaf."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from puna.engine.llm import LLM
from puna.errors import InputError, SettingsError
from puna.serve.server import serve
from puna.serve.settings import ServeSettings
from puna.settings import parse
from tests.serve.guarding import read_all, read_one, request_of
from tests.serve.processes import FAULTY_STEP, HUNG_STEP, IMPATIENT, SLOW_STEPS, Process, Stream


@pytest.fixture(scope="module")
def model(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    llm.save(path)
    return path


@pytest.fixture(scope="module")
def processes(model: Path, certificate: tuple[Path, Path]) -> Iterator[dict[str, Process]]:
    """All that the tests need, started together."""
    cert, key = certificate
    started = {
        "drained": Process(model, f"tls_certificate={cert}", f"tls_key={key}", inside=SLOW_STEPS),
        "cut": Process(model, "drain_seconds=0.5", inside=SLOW_STEPS),
        "twice": Process(model, "drain_seconds=60", inside=SLOW_STEPS),
        "faulty": Process(model, inside=FAULTY_STEP),
        "hung": Process(model, "drain_seconds=0.2", inside=HUNG_STEP),
        "deaf": Process(model, inside=IMPATIENT),
    }
    try:
        yield started
    finally:
        for process in started.values():
            process.process.kill()
            process.end()


def never(say: object) -> LLM:
    raise AssertionError("the model was loaded")


def refused(error: type[InputError], **settings: object) -> str:
    with pytest.raises(error) as caught:
        serve(never, "tiny", parse(ServeSettings, {"port": 0, **settings}), print)
    return str(caught.value)


def test_what_is_wrong_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert "is taken; give another port" in refused(InputError, port=other.getsockname()[1])
    assert "is not known here" in refused(InputError, host="no.such.host.invalid")
    (tmp_path / "empty").touch()
    assert "holds no key" in refused(SettingsError, api_keys=str(tmp_path / "empty"))
    files = {"tls_certificate": str(tmp_path / "none"), "tls_key": str(tmp_path / "none")}
    assert "No such file" in refused(SettingsError, **files)


def test_a_socket_is_let_go_where_the_model_cannot_be_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for _ in range(2):
        with pytest.raises(AssertionError, match="the model was loaded"):
            serve(never, "tiny", parse(ServeSettings, {"port": port}), print)


def test_draining_lets_what_runs_end_and_takes_nothing_new(
    processes: dict[str, Process], certificate: tuple[Path, Path]
) -> None:
    process = processes["drained"].wait()
    assert process.url.startswith("https://127.0.0.1:")
    trust = ssl.create_default_context(cafile=str(certificate[0]))
    process.client = lambda **more: Process.client(process, verify=trust, **more)  # type: ignore[method-assign]
    host, port = process.url.removeprefix("https://").split(":")
    with (
        process.client() as client,
        trust.wrap_socket(socket.create_connection((host, int(port))), server_hostname="localhost") as idle,
    ):
        assert client.get("/ready").status_code == 200
        idle.sendall(request_of())
        read_one(idle)
        running = Stream(process, max_tokens=40).begun()
        process.signal(signal.SIGTERM)
        assert read_all(idle) == b""  # an idle connection is closed
    with process.client() as client:
        ready = client.get("/ready")
        assert ready.status_code == 503 and ready.headers["connection"] == "close"
        late = client.post("/v1/completions", json={"prompt": [5]})
        assert late.status_code == 503 and late.headers["connection"] == "close"
        assert int(late.headers["retry-after"]) > 0
        assert client.get("/health").status_code == 200
        running.join(20)
    assert running.last == "[DONE]" and len(running.chunks) > 30
    assert process.end() == 143
    assert len(process.log) == len(process.lines)  # all of it is JSON
    events = [line["message"] for line in process.log if line["event"] == "server"]
    assert events[-2:] == ["SIGTERM: what is at work (1) may go on for 30 seconds", "stopped by SIGTERM"]
    assert not [
        line for line in process.log if line.get("path") in ("/ready", "/health") and line["status"] == 200
    ]
    assert [line["status"] for line in process.log if line.get("path") == "/ready"] == [503]
    done = next(line for line in process.log if line.get("stream"))
    assert done["completion_tokens"] == 40 and done["status"] == 200


def test_after_the_time_to_drain_what_runs_is_cut_off_with_an_error(processes: dict[str, Process]) -> None:
    process = processes["cut"].wait()
    running = [Stream(process, max_tokens=400).begun() for _ in range(3)]
    process.signal(signal.SIGTERM)
    began = time.monotonic()
    for stream in running:
        stream.join(20)
        error = json.loads(stream.last)["error"]
        assert error["type"] == "server_error" and "[DONE]" not in stream.chunks
        assert stream.error is None
    assert 0.3 < time.monotonic() - began < 5
    assert process.end() == 143


def test_a_second_signal_cuts_at_once(processes: dict[str, Process]) -> None:
    process = processes["twice"].wait()
    running = Stream(process, max_tokens=400).begun()
    process.signal(signal.SIGINT)
    time.sleep(0.3)
    assert running.is_alive()
    process.signal(signal.SIGINT)
    running.join(5)
    assert "error" in json.loads(running.last)
    assert process.end() == 130
    assert process.log[-1]["message"] == "stopped by SIGINT"


def test_an_engine_that_dies_ends_every_request_and_the_process(processes: dict[str, Process]) -> None:
    process = processes["faulty"].wait()
    streams = [Stream(process, max_tokens=400, n=2).begun() for _ in range(3)]
    whole = [Stream(process, max_tokens=400, stream=False) for _ in range(2)]
    for stream in streams:
        stream.join(20)
        assert "error" in json.loads(stream.last), stream.chunks
    for answer in whole:
        answer.join(20)
        assert answer.status == 503 and "error" in json.loads(answer.chunks[0])
    assert process.end() == 1
    assert process.log[-1]["message"] == "the engine failed: RuntimeError: injected"
    faults = [line for line in process.log if line["event"] == "fault"]
    assert len(faults) == 1 and "in faulty" in faults[0]["traceback"]


def test_a_step_that_never_ends_does_not_keep_the_process(processes: dict[str, Process]) -> None:
    process = processes["hung"].wait()
    stream = Stream(process, max_tokens=400).begun()
    time.sleep(1)
    process.signal(signal.SIGTERM)
    assert process.end(15) == 143
    stream.join(5)
    assert not stream.is_alive() and "data: [DONE]" not in stream.chunks
    assert any("leaving in the middle of it" in line for line in process.lines)


def test_a_step_that_hangs_ends_the_process(processes: dict[str, Process]) -> None:
    process = processes["deaf"].wait()
    stream = Stream(process, max_tokens=400).begun()
    assert process.end(15) == 1
    stream.join(5)
    assert not stream.is_alive() and "data: [DONE]" not in stream.chunks
    assert any("a step takes more than 1.5 seconds" in line for line in process.lines)


def test_a_second_server_on_the_port_is_one_line_and_2(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        command = [sys.executable, "-m", "puna", "serve", str(model), "--port", str(other.getsockname()[1])]
        command.append("log_format=text")
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("puna: port ") and ended.stderr.count("\n") == 1
