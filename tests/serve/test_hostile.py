"""Clients that mean ill: memory stays bounded, and everybody else is answered meanwhile."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from puna.engine.llm import LLM
from puna.serve.connections import allow_files
from tests.serve.guarding import read_all, read_one, request_of
from tests.serve.processes import Process, served

MIB = 1 << 20
HEADER_SECONDS = 2
SLOWEST = 3.0  # seconds that an honest answer may take; alone it takes some milliseconds
JSON = "Content-Type: application/json"


pytestmark = pytest.mark.slow  # half a minute of floods


@pytest.fixture(scope="module")
def process(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    path = tmp_path_factory.mktemp("model") / "tiny"
    llm.save(path)
    allow_files(8192)
    limits = (f"header_seconds={HEADER_SECONDS}", "body_seconds=2", "max_body_bytes=8MiB")
    with served(path, *limits, "log_format=json") as it:
        with it.client() as client:  # what is made at first use is there
            assert (
                client.post("/v1/completions", json={"prompt": "def f(", "max_tokens": 8}).status_code == 200
            )
        yield it


def connect(process: Process) -> socket.socket:
    return socket.create_connection(("127.0.0.1", urlsplit(process.url).port or 0), 20)


@contextmanager
def others_unharmed(process: Process, megabytes: int) -> Iterator[None]:
    """An honest client asks all the while; the server's memory may grow by so much at any time."""
    took: list[float] = []
    faults: list[Any] = []
    held: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        with process.client() as client:
            while not stop.is_set() or not took:
                began = time.monotonic()
                body = {"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
                answer = client.post("/v1/completions", json=body)
                took.append(time.monotonic() - began)
                held.append(process.memory())
                if answer.status_code != 200 or answer.json()["usage"]["completion_tokens"] != 4:
                    faults.append(answer.text)
                time.sleep(0.02)

    before = process.memory()
    honest = threading.Thread(target=ask)
    honest.start()
    try:
        yield
    finally:
        stop.set()
        honest.join()
    assert not faults
    assert max(took) < SLOWEST
    assert (max(held) - before) / MIB < megabytes


def status_of(raw: bytes) -> int:
    return int(raw.split(b" ", 2)[1])


def test_two_thousand_idle_connections(process: Process) -> None:
    with others_unharmed(process, megabytes=60):
        links = [connect(process) for _ in range(2000)]
        time.sleep(HEADER_SECONDS + 1.5)
        closed = 0
        for link in links:
            link.settimeout(5)
            closed += read_all(link) == b""
            link.close()
    assert closed == 2000


def test_headers_that_come_a_byte_at_a_time(process: Process) -> None:
    began = time.monotonic()
    with others_unharmed(process, megabytes=30):
        links = {connect(process) for _ in range(400)}
        for link in links:
            link.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        while links and time.monotonic() < began + 20:
            for link in tuple(links):
                try:
                    link.send(b"y")
                except OSError:
                    links.discard(link)
                    link.close()
            time.sleep(0.1)
    assert not links
    assert time.monotonic() - began < HEADER_SECONDS + 6


def test_bodies_that_come_a_byte_at_a_time(process: Process) -> None:
    head = request_of("/v1/completions", JSON, "Content-Length: 4000", method="POST")
    with others_unharmed(process, megabytes=30):
        links = [connect(process) for _ in range(200)]
        for link in links:
            link.sendall(head)
        for _ in range(8):
            for link in links:
                link.sendall(b" ")
            time.sleep(0.1)
        for link in links:
            assert status_of(read_one(link)) == 408
            link.close()


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_of_a_hundred_megabytes(process: Process, chunked: bool) -> None:
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {100 * MIB}"
    head = request_of("/v1/completions", JSON, length, method="POST")
    block = b"[" * MIB
    framed = b"%x\r\n%s\r\n" % (len(block), block) if chunked else block
    answers: list[bytes] = []

    def send() -> None:
        with connect(process) as link:
            link.sendall(head)
            with suppress(OSError):
                for _ in range(100):
                    link.sendall(framed)
            answers.append(read_all(link))

    with others_unharmed(process, megabytes=150):
        senders = [threading.Thread(target=send) for _ in range(4)]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
    assert len(answers) == 4
    assert all(answer == b"" or status_of(answer) == 413 for answer in answers)
    assert any(answers)


def test_header_floods(process: Process) -> None:
    flood = request_of("/health", *(f"X-{n}: {'y' * 100}" for n in range(20_000)))
    with others_unharmed(process, megabytes=40):
        for _ in range(10):
            with connect(process) as link:
                with suppress(OSError):
                    link.sendall(flood)
                answer = read_all(link)
                assert answer == b"" or status_of(answer) == 431


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"messages":['])
def test_json_nested_too_deeply(process: Process, opening: bytes) -> None:
    body = opening * (4 * MIB // len(opening))
    with others_unharmed(process, megabytes=150), process.client() as client:
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/apply-template"):
            headers = {"content-type": "application/json"}
            closing = b"]" * body.count(b"[") if opening == b"[" else b""
            for content in (body, body[:500_000], body[:1_000_000] + closing[:1_000_000]):
                answer = client.post(path, content=content, headers=headers)
                assert answer.status_code == 400, answer.text[:200]


def exploding() -> Iterator[dict[str, Any]]:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(60):
        deep = {"type": "object", "properties": {"a": deep, "b": deep}, "required": ["a"]}
    definitions = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 50} for n in range(30)}
    yield {"type": "string", "pattern": "((a{1,1000}){1,1000}){1,1000}"}
    yield {"$ref": "#/$defs/d0", "$defs": definitions | {"d30": {"type": "integer"}}}
    yield {"enum": ["x" * 50 + str(n) for n in range(20_000)]}
    yield {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}
    yield json.loads(json.dumps({"$ref": "#"}))
    yield {"allOf": [{"pattern": f"(a|b)*a(a|b){{{n}}}"} for n in range(200)]}


def test_schemas_that_explode(process: Process) -> None:
    with others_unharmed(process, megabytes=600), process.client() as client:
        for schema in exploding():
            shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 8, "response_format": shape}
            began = time.monotonic()
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.status_code in (200, 400), answer.text
            assert time.monotonic() - began < 30


def test_a_thousand_requests_at_once_on_one_connection(process: Process) -> None:
    with others_unharmed(process, megabytes=40), connect(process) as link:
        sender = threading.Thread(target=link.sendall, args=(request_of("/health") * 1000,))
        sender.start()
        link.settimeout(30)
        raw = b""
        while raw.count(b"HTTP/1.1 200") < 1000:
            piece = link.recv(1 << 16)
            assert piece
            raw += piece
        sender.join()


def test_pipelined_answers_are_not_made_all_at_once(process: Process) -> None:
    body = json.dumps({"prompt": [5], "max_tokens": 300, "ignore_eos": True}).encode()
    one = request_of("/v1/completions", JSON, f"Content-Length: {len(body)}", method="POST") + body
    with process.client() as client:
        figures = client.get("/status", headers={"accept": "application/json"}).json
        with connect(process) as link:
            link.sendall(one * 50)
            assert status_of(read_one(link)) == 200
            assert figures()["running"] <= 1
        end = time.monotonic() + 5
        while client.get("/status", headers={"accept": "application/json"}).json()["running"]:
            assert time.monotonic() < end, "a client that left is still answered"
            time.sleep(0.02)


PATHS = (
    *("/../../../../etc/passwd", "/..%2f..%2f..%2fetc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd"),
    *("/v1/models/../../../../etc/passwd", "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/static/../app.py"),
    *("/page/../settings.py", "/chat.html/../../settings.py", "/\\..\\..\\etc\\passwd", "/%00/etc/passwd"),
    *("/v1/models/%00", "/v1/models/" + "a" * 5000, "/%ff%fe", "/v1/models/%0d%0aSet-Cookie:x", "*"),
    *("http://evil.example/health", "/health;/../status", "/health%0d%0aX: y", "/docs", "/redoc"),
)


def test_paths_that_lead_elsewhere(process: Process) -> None:
    for path in PATHS:
        with connect(process) as link:
            link.sendall(request_of(path, "Connection: close"))
            answer = read_all(link)
        assert status_of(answer) in (400, 404), (path, answer[:300])
        assert b"root:" not in answer and b"import " not in answer, path
        assert b"Set-Cookie" not in answer.partition(b"\r\n\r\n")[0], path


def test_what_it_logs_stays_lines_of_json(process: Process) -> None:
    with connect(process) as link:
        link.sendall(request_of("/x%0a%7b%22event%22:%22forged%22%7d%1b%5b2J", "Connection: close"))
        read_all(link)
    time.sleep(0.2)
    assert not any(line.get("event") == "forged" for line in process.log)
    assert len(process.log) == len(process.lines), process.lines
    assert not any(line["event"] == "fault" for line in process.log), process.log


def test_it_still_serves_and_holds_nothing(process: Process) -> None:
    with process.client() as client:
        status = client.get("/status", headers={"accept": "application/json"}).json()
    assert status["running"] == status["waiting"] == status["cache"]["used"] == 0
    descriptors = Path(f"/proc/{process.process.pid}/fd")
    assert len(list(descriptors.iterdir())) < 60
