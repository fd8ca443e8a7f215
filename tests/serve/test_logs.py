"""The log: one line for each request, whole, harmless, and never in the way."""

from __future__ import annotations

import io
import json
import logging
import os
import threading
import time
from typing import Any

import pytest

from puna.serve.logs import WAITING, Log, LogHandler
from puna.serve.masks import without_values
from puna.serve.record import Record


def record_of(**more: Any) -> Record:
    facts: dict[str, Any] = {"id": "r1", "method": "POST", "path": "/v1/completions"}
    return Record(**{**facts, "arrived": time.monotonic(), "status": 200, **more})


def lines_of(kind: Any, *records: Record, prompts: bool = False) -> list[str]:
    stream = io.StringIO()
    log = Log(kind, prompts, stream)
    for record in records:
        log.request(record, "192.0.2.7")
    log.close()
    return stream.getvalue().splitlines()


def test_a_line_of_json_has_what_is_known() -> None:
    record = record_of(
        key="ann", route="/v1/completions", stream=True, prompt_tokens=3, completion_tokens=9,
        finish_reasons=["stop", "length"], queued=0.25, first_token=0.5, gone=True,
    )  # fmt: skip
    (line,) = lines_of("json", record)
    facts = json.loads(line)
    assert facts.pop("time")[-6:] == "+00:00" and 0 <= facts.pop("seconds") < 5
    assert facts == {
        "level": "info", "event": "request", "id": "r1", "key": "ann", "client": "192.0.2.7",
        "method": "POST", "path": "/v1/completions", "route": "/v1/completions", "status": 200,
        "stream": True, "prompt_tokens": 3, "completion_tokens": 9,
        "finish_reasons": {"stop": 1, "length": 1},
        "queue_seconds": 0.25, "first_token_seconds": 0.5, "gone": True,
    }  # fmt: skip


def test_a_line_for_a_person() -> None:
    (line,) = lines_of("text", record_of(key="ann", completion_tokens=9, error="slow down", status=429))
    assert " POST /v1/completions 429 0.00" in line
    assert line.endswith('id=r1 key=ann client=192.0.2.7 completion_tokens=9 error="slow down"')


def test_what_a_client_writes_forges_no_line() -> None:
    nasty = "/a\r\n2026-01-01 POST /forged 200\x1b[2J\u2028\u202e\x85\x00 b"
    for kind in ("json", "text"):
        record = record_of(path=nasty, error=nasty, method="GET")
        lines = lines_of(kind, record, record_of())
        assert len(lines) == 2
        assert all(char.isprintable() for line in lines for char in line), kind
    text = lines_of("text", record_of(path="/a b status=200", id="an id"))[0]
    assert '"/a b status=200"' in text and 'id="an id"' in text


def test_long_paths_are_cut() -> None:
    (line,) = lines_of("json", record_of(path="/" + "x" * 100_000))
    assert len(line) < 2000


def test_prompts_are_written_only_where_settings_say_so() -> None:
    record = record_of(prompt="my secret", answer=["and mine"], error="expected a number, got 'my secret'")
    for kind in ("json", "text"):
        (line,) = lines_of(kind, record)
        assert "secret" not in line and "and mine" not in line and "expected a number" in line
        (line,) = lines_of(kind, record, prompts=True)
        assert "my secret" in line and "and mine" in line


def test_messages_without_values() -> None:
    assert without_values("unknown field 'x\\'y' of \"z\"") == "unknown field '…' of '…'"
    assert without_values("expected text, got [1, 2]; send text") == "expected text"
    assert without_values("the server is stopping") == "the server is stopping"


def test_a_reader_who_stops_reading_stops_nobody() -> None:
    reading, writing = os.pipe()
    came: list[bytes] = []

    def read_on() -> None:
        while piece := os.read(reading, 1 << 16):
            came.append(piece)

    with os.fdopen(writing, "w") as stream:
        log = Log("text", stream=stream)
        began = time.monotonic()
        for number in range(WAITING + 5000):
            log.say(f"line {number} {'x' * 100}")
        assert time.monotonic() - began < 5
        assert log._left_out > 0
        reader = threading.Thread(target=read_on)
        reader.start()
        log.close()
    reader.join()
    os.close(reading)
    lines = b"".join(came).decode().splitlines()
    assert WAITING <= len(lines) < WAITING + 5000
    assert any("lines were left out" in line for line in lines)


def test_a_stream_that_is_closed_is_no_fault() -> None:
    stream = io.StringIO()
    log = Log("json", stream=stream)
    stream.close()
    log.say("nobody hears it")
    log.close()
    assert not log._thread.is_alive()


def test_libraries_speak_in_our_lines() -> None:
    stream = io.StringIO()
    log = Log("json", stream=stream)
    handler, logger = LogHandler(log), logging.getLogger("some.library")
    logger.addHandler(handler)
    try:
        logger.warning("watch\nout")
        logger.info("not this")
        try:
            raise ValueError("torn, got 'my secret'")
        except ValueError:
            logger.exception("request r1 failed")
    finally:
        logger.removeHandler(handler)
    log.close()
    warning, fault = (json.loads(line) for line in stream.getvalue().splitlines())
    assert warning["level"] == "warning" and warning["message"] == "watch\\nout"
    assert fault["message"] == "request r1 failed: ValueError: torn"
    assert "test_libraries_speak_in_our_lines" in fault["traceback"]


def test_tracebacks_stand_indented_under_a_line_for_a_person() -> None:
    stream = io.StringIO()
    log = Log("text", stream=stream)
    try:
        raise ZeroDivisionError("x\ny")
    except ZeroDivisionError as error:
        log.fault(error, "r1")
    log.close()
    first, *frames = stream.getvalue().splitlines()
    assert "error ZeroDivisionError: x\\ny id=r1" in first
    assert frames and all(frame.startswith("    ") for frame in frames)


@pytest.mark.parametrize(
    ("message", "seen"),
    [
        ("unknown field 'max_token'. Did you mean 'max_tokens'?", None),
        ("unknown field 'a secret'. Leave it out.", "unknown field '…'. Leave it out."),
        ("unknown field 'x" + 50 * "y" + "'.", "unknown field '…'."),
        ("'messages.0.role': expected 'user', got \"secret\"", "'messages.0.role': expected 'user'"),
        ("'messages.0.secret' is required", "'…' is required"),
        (
            "the model 'my secret' is not served here; the one that is: 'demo'",
            "the model '…' is not served here; the one that is: 'demo'",
        ),
        ("the model 'demo' is here, and 'secret'", "the model 'demo' is here, and '…'"),
        ("set 'allowed_hosts', not 'unknown field '", "set 'allowed_hosts', not '…'"),
        ("this server is not called 'puna.example.org'; name it", None),
        ("pages of 'https://example.org' may not ask", None),
        ("pages of 'my secret' may not ask", "pages of '…' may not ask"),
        (
            "the request's body is not valid JSON: Expecting ',' delimiter",
            "the request's body is not valid JSON: Expecting '…' delimiter",
        ),
        ("bytes b'secret' and 'cut off secr", "bytes b'…' and '…'"),
        ("\"it's unknown field 'secret'\"", "'…'"),
    ],
)
def test_names_of_ours_are_seen_and_values_are_not(message: str, seen: str | None) -> None:
    assert without_values(message, {"demo"}) == (message if seen is None else seen)


def test_reasons_are_counted() -> None:
    (line,) = lines_of("json", record_of(finish_reasons=["length"] * 31 + ["stop"]))
    assert json.loads(line)["finish_reasons"] == {"length": 31, "stop": 1}
    (line,) = lines_of("text", record_of(finish_reasons=["length"] * 32))
    assert "finish_reasons=length:32" in line
