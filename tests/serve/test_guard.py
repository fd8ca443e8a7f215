"""What stands around the app: nothing passes that must not, and what passes is not touched."""

from __future__ import annotations

import asyncio
import io
import json
import time
from typing import Any

import pytest

from puna.serve.guard import WATCHED, Guard
from puna.serve.logs import Log
from puna.serve.origins import Origins
from tests.serve.guarding import JSON_HEADERS, Answer, Pieces, ask, asked, guard_of

POST = ("POST", "/v1/completions", JSON_HEADERS)


def test_every_answer_has_a_request_id_the_clients_own_where_it_can_be_shown() -> None:
    guard = guard_of()
    assert ask(guard, headers={"x-request-id": "mine 42"}).headers["x-request-id"] == "mine 42"
    for bad in ("", "a\tb", "é", "x" * 129, "a\x1b[2J"):
        given = ask(guard, headers={"x-request-id": bad}).headers["x-request-id"]
        assert given.startswith("req-") and len(given) == 28, bad
    first, second = (ask(guard).record.id for _ in range(2))
    assert first != second


def test_refusals_are_errors_as_openai_writes_them_with_the_id() -> None:
    answer = ask(guard_of(), headers={"host": "evil.example", "x-request-id": "r1"})
    assert answer.status == 403
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"] == "r1"
    assert set(answer.error) == {"message", "type", "param", "code"}
    assert answer.record.error == answer.error["message"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((host, 200) for host in ("localhost", "localhost:8000", "127.0.0.1:1", "127.9.9.9", "[::1]:8000")),
        *((host, 403) for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example")),
        *((host, 403) for host in ("10.0.0.1", "0.0.0.0", "localhost@evil.example", "[::1", "a b", "")),
    ],
)
def test_on_loopback_only_loopbacks_names_are_served(host: str, status: int) -> None:
    assert ask(guard_of(), headers={"host": host}).status == status


@pytest.mark.parametrize(
    ("allowed", "host", "status"),
    [
        ([], "anything.example", 200),
        (["api.example.org"], "api.example.org:8443", 200),
        (["api.example.org"], "API.Example.org", 200),
        (["api.example.org"], "example.org", 403),
        (["*.example.org"], "a.b.example.org", 200),
        (["*.example.org"], "example.org", 403),
        (["*.example.org"], "evilexample.org", 403),
        (["api.example.org"], "localhost", 200),  # the machine itself, such as a health check
        (["*"], "anything.example", 200),
    ],
)
def test_on_other_addresses_the_allowed_names_are(allowed: list[str], host: str, status: int) -> None:
    guard = guard_of(local=False, allowed_hosts=allowed)
    assert ask(guard, headers={"host": host}).status == status


def test_probes_ask_by_address() -> None:
    guard = guard_of(local=False, allowed_hosts=["api.example.org"])
    statuses = {path: ask(guard, "GET", path, {"host": "10.1.2.3:8000"}).status for path in WATCHED}
    assert statuses == {"/health": 200, "/ready": 200, "/metrics": 403, "/status": 403}


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:8000", 200),
        ("https://localhost:8000", 200),  # TLS ended before us
        ("http://localhost:8001", 403),
        ("http://localhost", 403),
        ("https://evil.example", 403),
        ("null", 403),
        ("file://", 403),
        ("http://localhost:8000.evil.example", 403),
        ("http://localhost:x", 403),
        ("", 403),
    ],
)
def test_pages_from_elsewhere_may_not_ask(origin: str, status: int) -> None:
    guard = guard_of()
    answer = ask(guard, *POST[:2], {**JSON_HEADERS, "origin": origin}, b"{}")
    assert answer.status == status
    assert "access-control-allow-origin" not in answer.headers


def test_an_origin_without_port_is_the_schemes_own() -> None:
    origins = Origins([], [], local=False)
    assert origins.own("https://chat.example.org", "chat.example.org")
    assert origins.own("https://chat.example.org", "chat.example.org:443")
    assert not origins.own("https://chat.example.org", "chat.example.org:80")
    assert not origins.own("https://chat.example.org", None)


def test_pages_that_are_named_may_ask_and_read_even_refusals() -> None:
    guard = guard_of(keys=["k" * 20], cors_origins=["https://Chat.example.org/"])
    origin = {"origin": "https://chat.example.org"}
    asking = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-a"}
    before = ask(guard, "OPTIONS", "/v1/completions", {**origin, **asking})
    assert before.status == 204 and before.body == b""
    assert before.headers["access-control-allow-origin"] == "https://chat.example.org"
    assert "POST" in before.headers["access-control-allow-methods"]
    assert before.headers["access-control-allow-headers"] == "authorization,x-a"
    assert "access-control-allow-credentials" not in before.headers
    refused = ask(guard, *POST[:2], {**JSON_HEADERS, **origin}, b"{}")
    assert refused.status == 401
    assert refused.headers["access-control-allow-origin"] == "https://chat.example.org"
    assert refused.headers["vary"] == "Origin"
    elsewhere = ask(guard, "OPTIONS", "/v1/completions", {"origin": "https://evil.example", **asking})
    assert elsewhere.status == 403 and "access-control-allow-origin" not in elsewhere.headers


def test_any_page_may_ask_where_settings_say_so() -> None:
    answer = ask(guard_of(cors_origins=["*"]), headers={"origin": "null"})
    assert answer.status == 200 and answer.headers["access-control-allow-origin"] == "*"


def test_options_without_cors_is_the_apps() -> None:
    assert ask(guard_of(), "OPTIONS", "/v1/completions").status == 405
    assert ask(guard_of(keys=["k" * 20]), "OPTIONS", "/v1/completions").status == 401


def test_bodies_pass_whole() -> None:
    body = json.dumps({"text": "ü" * 500}).encode()
    pieces = [(0.0, body[:10]), (0.01, body[10:11]), (0.0, body[11:])]
    chunked = {**JSON_HEADERS, "transfer-encoding": "chunked"}
    assert ask(guard_of(), *POST, body).body == body
    assert ask(guard_of(), *POST[:2], chunked, pieces).body == body
    assert ask(guard_of(), *POST).body == b""


def test_a_body_that_says_it_is_too_large_is_not_read() -> None:
    headers = {**JSON_HEADERS, "content-length": "1025"}
    began = time.monotonic()
    answer = ask(guard_of(max_body_bytes=1024), *POST[:2], headers, [(0.0, b"x"), (0.0, None)])
    assert answer.status == 413 and "1,024 bytes" in answer.error["message"]
    assert time.monotonic() - began < 1
    assert ask(guard_of(max_body_bytes=1024), *POST, b"x" * 1024).status == 200


def test_chunked_bodies_are_counted() -> None:
    guard = guard_of(max_body_bytes=1024)
    headers = {**JSON_HEADERS, "transfer-encoding": "chunked"}
    pieces = [(0.0, b"x" * 100)] * 20
    answer = ask(guard, *POST[:2], headers, pieces)
    assert answer.status == 413 and answer.headers["connection"] == "close"
    assert guard._held == 0


def test_a_body_that_does_not_arrive_in_time_is_given_up() -> None:
    headers = {**JSON_HEADERS, "content-length": "10"}
    answer = ask(guard_of(body_seconds=0.1), *POST[:2], headers, [(0.0, b"12"), (0.3, b"3"), (5.0, b"4")])
    assert answer.status == 408 and answer.headers["connection"] == "close"


def test_bodies_of_all_requests_together_are_bounded() -> None:
    async def several() -> list[int | None]:
        headers = {**JSON_HEADERS, "transfer-encoding": "chunked"}
        waiting: Pieces = [(0.0, b"x" * 1000), (0.3, b"")]
        answers = await asyncio.gather(*(asked(guard, *POST[:2], headers, waiting) for _ in range(40)))
        return [answer.status for answer in answers]

    guard = guard_of(max_body_bytes=1024)
    statuses = asyncio.run(several())
    assert statuses.count(200) == 32 and statuses.count(503) == 8
    assert guard._held == 0


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("application/vnd.api+json", 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("application/jsonp", 415),
        ("", 415),
    ],
)
def test_posts_are_json(kind: str, status: int) -> None:
    answer = ask(guard_of(), "POST", "/v1/completions", {"content-type": kind}, b"{}")
    assert answer.status == status


def test_other_methods_and_paths_are_left_to_the_app() -> None:
    assert ask(guard_of(), "POST", "/health").status == 405
    assert ask(guard_of(), "POST", "/nowhere", {}, b"x").status == 404
    assert ask(guard_of(), "DELETE", "/v1/completions").status == 405


def test_a_client_that_leaves_in_the_middle_of_its_body_is_told_nothing() -> None:
    answer = ask(guard_of(), *POST[:2], {**JSON_HEADERS, "content-length": "9"}, [(0, b"1"), (0, None)])
    assert answer.status is None and answer.record.gone


def test_requests_each_minute_and_at_once_are_limited_where_something_is_computed() -> None:
    guard = guard_of(requests_per_minute=2)
    assert [ask(guard, *POST, b"{}").status for _ in range(3)] == [200, 200, 429]
    refused = ask(guard, *POST, b"{}")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.error["code"] == "rate_limit_exceeded"
    assert ask(guard, path="/v1/models").status == 200

    async def at_once(guard: Guard) -> list[int | None]:
        answers = await asyncio.gather(
            *(asked(guard, "POST", "/slow", JSON_HEADERS, b"{}") for _ in range(5))
        )
        return sorted(answer.status or 0 for answer in answers)

    busy = guard_of(concurrent_requests=3)
    assert asyncio.run(at_once(busy)) == [200, 200, 200, 429, 429]
    assert asyncio.run(at_once(busy)) == [200, 200, 200, 429, 429]  # those that ended count no more


def test_keys_have_limits_of_their_own() -> None:
    guard = guard_of(keys=["ann aaaaaaaaaaaaaaaaaaaa", "ben bbbbbbbbbbbbbbbbbbbb"], requests_per_minute=1)

    def status(key: str) -> int | None:
        return ask(guard, *POST[:2], {**JSON_HEADERS, "authorization": f"Bearer {key * 20}"}, b"{}").status

    assert [status(key) for key in "aabbc"] == [200, 429, 200, 429, 401]


def test_a_server_that_drains_takes_nothing_new_and_still_tells_how_it_is() -> None:
    guard = guard_of()
    guard._state.draining = True
    for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/")):
        refused = ask(guard, method, path, JSON_HEADERS)
        assert refused.status == 503
        assert refused.headers["retry-after"] == "5" and refused.headers["connection"] == "close"
    for path in ("/ready", "/health", "/metrics", "/status"):
        answer = ask(guard, path=path)
        assert answer.status == 200 and answer.headers["connection"] == "close"


def test_an_answer_that_begins_while_the_server_drains_closes_its_connection() -> None:
    async def begun_before() -> Answer:
        asking = asyncio.create_task(asked(guard, "POST", "/slow", JSON_HEADERS, b"{}"))
        await asyncio.sleep(0.05)
        guard._state.draining = True
        return await asking

    guard = guard_of()
    answer = asyncio.run(begun_before())
    assert answer.status == 200 and answer.headers["connection"] == "close"


def test_streams_pass_chunk_by_chunk_and_cheaply() -> None:
    class Bare:
        """An app that sends many chunks."""

        routes: list[Any] = []

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for number in range(count):
                await send({"type": "http.response.body", "body": b"%d" % number, "more_body": True})
                assert len(came) == number + 2, "it was held back"
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def send(message: Any) -> None:
        came.append(message)

    async def timed(app: Any) -> float:
        came.clear()
        scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
        began = time.perf_counter()
        await app(scope, None, send)
        return time.perf_counter() - began

    count, came = 20_000, []
    app: Any = Bare()
    guard = guard_of(app)
    bare = min(asyncio.run(timed(app)) for _ in range(3))
    guarded = min(asyncio.run(timed(guard)) for _ in range(3))
    assert (guarded - bare) / count < 10e-6


def test_a_fault_of_ours_is_500_without_details_and_in_the_log_with_them() -> None:
    stream = io.StringIO()
    log = Log("json", stream=stream)
    answer = ask(guard_of(log=log), path="/broken", headers={"x-request-id": "r9"})
    assert answer.status == 500
    log.close()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    fault = next(line for line in lines if line["event"] == "fault")
    assert fault["id"] == "r9" and "ZeroDivisionError: a fault of ours" in fault["message"]
    assert "in broken" in fault["traceback"]


def test_a_torn_stream_tears_the_connection() -> None:
    with pytest.raises(ZeroDivisionError):
        ask(guard_of(), path="/torn")


def test_headers_are_bounded() -> None:
    answer = ask(guard_of(), headers={"x-flood": "y" * (64 << 10)})
    assert answer.status == 431


def test_a_body_has_one_end_for_everybody() -> None:
    both = {**JSON_HEADERS, "content-length": "2", "transfer-encoding": "chunked"}
    answer = ask(guard_of(), *POST[:2], both, [(0.0, b"{}")])
    assert answer.status == 400 and answer.headers["connection"] == "close"


def test_routes_are_those_that_the_app_declares() -> None:
    guard = guard_of(keys=["k" * 20])
    assert ask(guard, path="/v1/models").record.route == "/v1/models"  # refused before any route saw it
    assert ask(guard, path="/secret/path").record.route is None


def test_looks_at_the_server_that_go_well_are_counted_and_not_logged() -> None:
    stream = io.StringIO()
    log = Log("json", stream=stream)
    guard = guard_of(log=log, keys=["sk-0123456789abcdef"])
    for path in ("/", "/health", "/health", "/metrics"):
        ask(guard, path=path)
    ask(guard, path="/", headers={"host": "evil.example"})
    ask(guard, "HEAD", "/health")
    log.close()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["path"], line["status"]) for line in lines] == [
        ("/metrics", 401),
        ("/", 403),
        ("/health", 200),
    ]
    assert len(guard._state.metrics.records) == 6  # type: ignore[attr-defined]
