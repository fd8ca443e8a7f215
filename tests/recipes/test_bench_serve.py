"""`puna bench serve`: a client against servers of the tests' own, arrivals, figures by hand, all of it."""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import puna
from puna import formats
from puna.engine.settings import EngineSettings
from puna.errors import CheckFailed, PunaError, SettingsError
from puna.model.weights import weights_of
from puna.plan import measure
from puna.progress import silent
from puna.recipes.bench import figures
from puna.recipes.bench.command import bench
from puna.recipes.bench.figures import percentile
from puna.recipes.bench.http_replies import EventReader, ResponseReader
from puna.recipes.bench.load import Ask, Load, Served, alone, check
from puna.recipes.bench.load_generator import (
    Exchange,
    Outcome,
    Query,
    Target,
    closed_loop,
    completion,
    conversation,
    drive,
    open_loop,
    outcome,
    poisson_arrivals,
)
from puna.recipes.bench.made_up_tokenizer import write_tokenizer
from puna.recipes.bench.server_process import free_port, get, running
from puna.recipes.bench.serving import HEADINGS, ServeBenchSettings, _details
from puna.settings import parse
from puna.tokenizer import load as load_tokenizer
from tests.model.shapes import CONFIGS, model_of

SHAPE = CONFIGS["explicit head width"].model_copy(update={"max_position_embeddings": 64})
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def text(piece: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": piece, "finish_reason": reason}]}


def said(piece: str | None, reason: str | None = None) -> dict[str, Any]:
    return {
        "choices": [
            {"index": 0, "delta": {} if piece is None else {"content": piece}, "finish_reason": reason}
        ]
    }


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%s\r\n%s\r\n" % (len(data), extension, data)


def stream(*values: Any, done: bool = True) -> list[bytes]:
    """A chunk for each event."""
    events = [b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n" for value in values]
    return [chunk(event) for event in [*events, *([b"data: [DONE]\n\n"] if done else [])]]


WHOLE = stream(text("Llamas "), text("wälk", "length"), {"choices": [], "usage": USAGE})


def read(*pieces: bytes, fault: str | None = None) -> Outcome:
    """What is made of pieces that come at 1, 2, 3, … seconds after a request sent at 0.5."""
    timed = [(float(at), piece) for at, piece in enumerate(pieces, 1)]
    return outcome(Exchange(0.5, timed, float(len(pieces)), fault))


def test_a_stream_gives_times_text_and_what_the_server_counted() -> None:
    found = read(HEAD, *WHOLE, b"0\r\n\r\n")
    assert found == Outcome(0.5, 6.0, (2.0, 3.0), "Llamas wälk", 3, 2)
    assert (found.first, found.each) == (1.5, 1.0)


def test_a_conversation_begins_with_its_first_text_not_with_its_role() -> None:
    role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    found = read(
        HEAD, *stream(role, said("a"), said("b"), said(None, "stop"), {"usage": USAGE}), b"0\r\n\r\n"
    )
    assert (found.times, found.text, found.error) == ((3.0, 4.0), "ab", None)


def test_borders_may_be_anywhere() -> None:
    """Every single cut, and every byte alone."""
    data = HEAD + b"".join(WHOLE) + b"0\r\nX-Trailer: 1\r\n\r\n"
    for cut in range(1, len(data)):
        found = read(data[:cut], data[cut:])
        assert (found.text, found.tokens, found.error) == ("Llamas wälk", 2, None), cut
        assert set(found.times) <= {1.0, 2.0}
    alone = read(*(bytes([byte]) for byte in data))
    first, second = (data.index(event) + len(event) - 2 for event in WHOLE[:2])
    assert alone.times == (float(first), float(second))  # the byte that ends the event's empty line


def test_chunks_need_not_be_events() -> None:
    """Comments, other fields, CRLF, several events in a chunk, an event in several, extensions of chunks."""
    body = (
        b": waiting\n\nevent: message\nid: 7\ndata: "
        + json.dumps(text("ab")).encode()
        + b"\r\n\r\ndata:"
        + json.dumps(text("c", "stop")).encode()
        + b"\n\ndata: "
        + json.dumps({"choices": [], "usage": USAGE}).encode()
        + b"\n\n"
    )
    pieces = [chunk(body[at : at + 7], b";name=value") for at in range(0, len(body), 7)]
    assert read(HEAD, *pieces, b"0\r\n\r\n").text == "abc"
    assert list(EventReader().feed(b"data: one\ndata: two\n\ndata: half")) == [b"one\ntwo"]


@pytest.mark.parametrize(
    ("head", "ended"),
    [(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", True), (b"HTTP/1.0 200 OK\r\n\r\n", False)],
)
def test_a_body_is_sized_or_goes_on_to_the_end(head: bytes, ended: bool) -> None:
    reader = ResponseReader()
    assert reader.feed(head + b"he") + reader.feed(b"llo") == b"hello"
    assert (reader.status, reader.ended) == (200, ended)
    reader.close()
    assert reader.ended


def refusal(status: str, body: bytes) -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


@pytest.mark.parametrize(
    ("pieces", "fault", "message"),
    [
        ([], "the connection broke: reset", "the connection broke: reset"),
        ([], None, "the connection ended without an answer"),
        ([HEAD[:20]], None, "the connection ended without an answer"),
        ([HEAD, *WHOLE], None, "the stream broke off"),
        ([HEAD, *WHOLE, b"0\r\n"], None, "the stream broke off"),
        ([HEAD, *WHOLE], "no end within 3 seconds", "no end within 3 seconds"),
        ([HEAD, *stream(text("a"), done=False), b"0\r\n\r\n"], None, "the stream ended without a reason"),
        ([HEAD, *stream(text("a", "stop")), b"0\r\n\r\n"], None, "without the number of its tokens"),
        ([HEAD, *stream(text("a"), {"error": {"message": "it fell"}}), b"0\r\n\r\n"], None, "it fell"),
        ([HEAD, chunk(b"data: {no\n\n"), b"0\r\n\r\n"], None, "an answer that cannot be read: "),
        ([HEAD, b"zz\r\n\r\n"], None, "an answer that cannot be read: "),
        ([b"SSH-2.0-OpenSSH_9.2 x\r\n\r\n"], None, "expected an HTTP/1.1 response, got 'SSH-2.0"),
        ([refusal("429 Too Many", b'{"error": {"message": "later"}}')], None, "429: later"),
        ([refusal("500 Oh", b"<h1>")], None, "500: <h1>"),
        ([refusal("503 Oh", b"")], None, "503: nothing"),
    ],
)
def test_what_went_wrong_is_told(pieces: list[bytes], fault: str | None, message: str) -> None:
    found = read(*pieces, fault=fault)
    assert message in (found.error or "")
    assert found.tokens == 0


def test_requests_are_those_of_the_api() -> None:
    query = completion([1, 2], 5, temperature=0, ignore_eos=True)
    asked = {"prompt": [1, 2], "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    assert (query.path, json.loads(query.body)) == ("/v1/completions", {**asked, **streamed})
    talk = conversation("hi", 2)
    assert talk.path == "/v1/chat/completions"
    assert json.loads(talk.body)["messages"] == [{"role": "user", "content": "hi"}]
    head, _, body = Query("/x", b"{}").message(Target("h", 1, "secret")).partition(b"\r\n\r\n")
    assert body == b"{}"
    assert head.split(b"\r\n")[0] == b"POST /x HTTP/1.1"
    assert {b"Host: h:1", b"Content-Length: 2", b"Connection: close", b"Authorization: Bearer secret"} <= set(
        head.split(b"\r\n")
    )


class Counting:
    """A server that answers each prompt after a time, and counts how many it had at once."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now, self.most, self.prompts = seconds, 0, 0, list[Any]()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:"))
        asked = json.loads(await reader.readexactly(length))
        self.prompts.append(asked["prompt"])
        self.now += 1
        self.most = max(self.most, self.now)
        writer.write(HEAD + WHOLE[0])
        try:
            await asyncio.sleep(self.seconds)
            writer.write(b"".join(WHOLE[1:]) + b"0\r\n\r\n")
            await writer.drain()
        finally:
            self.now -= 1
            writer.close()


def against(handler: Handler, load: Callable[[Target], Awaitable[list[Exchange]]]) -> list[Outcome]:
    async def both() -> list[Exchange]:
        server = await asyncio.start_server(handler, "127.0.0.1", 0)
        async with server:
            return await load(Target("127.0.0.1", server.sockets[0].getsockname()[1]))

    return drive(both())


QUERIES = [completion(f"{number}", 2) for number in range(12)]


@pytest.mark.parametrize("clients", [1, 4, 12])
def test_clients_wait_for_their_answers(clients: int) -> None:
    server = Counting(0.02)
    found = against(server, lambda target: closed_loop(target, QUERIES, clients, 5.0))
    assert [one.error for one in found] == [None] * 12
    assert server.most == clients
    assert server.prompts[0] == "0"
    assert sorted(map(int, server.prompts)) == list(range(12))
    for one in found:
        assert one.first is not None and one.each is not None
        assert one.first > 0
        assert 0.018 < one.each < one.ended - one.sent  # it sleeps between the first text and the second
    assert min(one.first for one in found if one.first is not None) < 0.018  # and not before the first
    least = 0.018 * 12 / clients
    assert max(one.ended for one in found) - min(one.sent for one in found) > least


def test_arrivals_come_at_their_times_whether_or_not_others_are_answered() -> None:
    server = Counting(0.15)
    arrivals = [0.0, 0.02, 0.04, 0.12]
    found = against(server, lambda target: open_loop(target, QUERIES[:4], arrivals, 5.0))
    assert server.most == 4
    began = found[0].sent
    assert [one.sent - began for one in found] == pytest.approx(arrivals)
    assert server.prompts == ["0", "1", "2", "3"]
    assert all(one.first is not None and one.first > 0 for one in found)


def test_one_broken_connection_is_one_error() -> None:
    counting = Counting(0.0)

    async def moody(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(counting.prompts) == 1:
            counting.prompts.append(None)
            writer.write(HEAD + WHOLE[0])
            await writer.drain()
            writer.transport.abort()
            await asyncio.sleep(0)
        else:
            await counting(reader, writer)

    found = against(moody, lambda target: closed_loop(target, QUERIES[:4], 1, 5.0))
    assert [one.error is None for one in found] == [True, False, True, True]
    assert "broke" in (found[1].error or "")


def test_a_server_that_hangs_is_given_up() -> None:
    async def load(target: Target) -> list[Exchange]:
        exchanges = await closed_loop(target, QUERIES[:2], 2, 0.1)
        await asyncio.sleep(0.2)  # the server would have gone on
        return exchanges

    found = against(Counting(0.2), load)
    assert [one.error for one in found] == ["no end within 0.1 seconds"] * 2
    assert [one.text for one in found] == ["Llamas "] * 2


def test_nobody_there() -> None:
    (found,) = drive(closed_loop(Target("127.0.0.1", free_port()), QUERIES[:1], 1, 5.0))
    assert "no connection to 127.0.0.1" in (found.error or "")


def test_poisson_arrivals_have_the_rate_and_no_memory() -> None:
    """Gaps are exponential: mean and deviation are equal, 1/e exceed the mean, neighbours unrelated."""
    rate, count = 5.0, 20_000
    times = poisson_arrivals(rate, count, seed=1)
    assert times == sorted(times)
    gaps = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
    error = 4 / math.sqrt(count)
    assert statistics.mean(gaps) * rate == pytest.approx(1, abs=error)
    assert statistics.stdev(gaps) * rate == pytest.approx(1, abs=2 * error)
    assert sum(gap * rate > 1 for gap in gaps) / count == pytest.approx(math.exp(-1), abs=error)
    assert statistics.correlation(gaps[1:], gaps[:-1]) == pytest.approx(0, abs=error)
    in_seconds = [sum(second <= at < second + 1 for at in times[:2000]) for second in range(300)]
    assert statistics.variance(in_seconds) / statistics.mean(in_seconds) == pytest.approx(1, abs=0.35)
    assert times == poisson_arrivals(rate, count, seed=1) != poisson_arrivals(rate, count, seed=2)


def test_percentiles_by_hand() -> None:
    assert percentile([3.0], 0.99) == 3.0
    assert [percentile([4.0, 1.0, 3.0, 2.0, 5.0], share) for share in (0, 0.5, 0.75, 1)] == [1, 3, 4, 5]
    assert percentile([0.0, 10.0], 0.95) == pytest.approx(9.5)
    assert percentile([float(value) for value in range(101)], 0.99) == pytest.approx(99)


def served(*spans: tuple[float, float], alone: float | None = None) -> Served:
    outcomes = [Outcome(sent, ended, (sent + 1, ended), "ab", 3, 2) for sent, ended in spans]
    return Served(outcomes, [], steps=4, sequences=10.0, step_seconds=3.0, alone=alone)


def test_time_under_way_counts_once_and_pauses_do_not() -> None:
    one = served((0.0, 4.0), (1.0, 2.0), (3.0, 5.0), (10.0, 12.0), alone=10.0)
    assert (one.seconds, one.busy, one.tokens, one.batch) == (12.0, 7.0, 8, 2.5)
    details = _details([one, one])
    assert details["outside_the_engine"] == pytest.approx(4 / 7)
    assert details["added_to_the_engine_alone"] == pytest.approx(0.2)
    assert details["seconds_to_first_text"] == {"50": 1.0, "95": 1.0, "99": 1.0}
    assert details["seconds_per_next_token"]["50"] == pytest.approx(1.0)  # of 0, 1, 1, 3
    assert details["seconds_to_end"]["99"] == pytest.approx(4.0 - 0.07 * 0.0, abs=0.2)
    assert (details["requests"], details["mean_batch"]) == (8, 2.5)
    assert _details([served((0.0, 4.0))])["added_to_the_engine_alone"] is None


def test_answers_that_failed_or_are_shorter_are_no_figure() -> None:
    asks = [Ask((1, 2, 3), 2), Ask((4, 5, 6), 2)]
    good = Outcome(0.0, 1.0, (0.5, 1.0), "ab", 3, 2)
    check(asks, [good, good])
    with pytest.raises(CheckFailed, match="1 of 2 requests failed; the first: 429: later"):
        check(asks, [good, Outcome(0.0, 1.0, error="429: later")])
    with pytest.raises(CheckFailed, match=r"3 tokens of a prompt and 2 of its answer .* counted 3 and 1"):
        check(asks, [good, Outcome(0.0, 1.0, (0.5,), "a", 3, 1)])


def test_the_engine_alone_keeps_as_many_at_work_as_there_are_clients(directory: Path) -> None:
    engine = puna.load(directory, dtype="float32", device="cpu").engine
    asks = [Ask((number, 7), 4) for number in range(6)]
    assert alone(engine, asks, 3) > 0
    assert engine.times.tokens == 24
    assert engine.times.sequences / engine.times.steps == pytest.approx(3, abs=0.5)


@pytest.mark.parametrize("size", [40, 256, 32_000])
def test_every_id_of_the_made_up_vocabulary_is_a_text_of_its_own(tmp_path: Path, size: int) -> None:
    write_tokenizer(tmp_path, size)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == size
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)
    if size > 256:
        texts = [tokenizer.decode([index], continuation=True) for index in range(256, size)]
        assert all(text.startswith(" ") for text in texts)
        assert len(set(texts)) == size - 256
        assert tokenizer.decode(tokenizer.encode("llamas wälk")) == "llamas wälk"


def test_loads_have_names() -> None:
    assert [str(load) for load in (Load(clients=4), Load(rate=2.5), Load(rate=3.0))] == ["4", "2.5/s", "3/s"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prompt=[9, 3]"], r"prompt must be \[shortest, longest\], both at least 1, got \[9, 3\]"),
        (["new=[0, 3]"], r"new must be \[shortest, longest\]"),
        (["prompt=[3]"], "'prompt'"),
        (["clients=[]"], "clients or rates must name a load"),
        (["clients=[0]"], "clients and rates must be above 0"),
        (["rates=[-1.0]"], "clients and rates must be above 0"),
        (["puna-1m", "context=99"], "384 positions are needed, and the context has 99; .*, or raise context"),
        (["MODEL"], "384 positions are needed, and the context has 64; lower prompt or new"),
        (["MODEL", "context=99"], "context is for presets"),
    ],
)
def test_mistakes_are_told_before_a_server_starts(
    arguments: list[str], message: str, directory: Path
) -> None:
    named = [str(directory) if argument == "MODEL" else argument for argument in arguments]
    with pytest.raises(SettingsError, match=message):
        bench("serve", named, None, lambda line: None, silent)


@pytest.mark.parametrize("words", ["no such port", '{"event": "server", "message": "no such port"}'])
def test_a_server_that_ends_says_why(tmp_path: Path, words: str) -> None:
    command = [sys.executable, "-c", f"import sys; sys.exit({words!r})"]
    with (
        pytest.raises(PunaError, match="the server ended with status 1: no such port"),
        running(command, free_port(), tmp_path / "log", {}),
    ):
        pass


PROGRAM = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'# HELP x y\\nsteps_sum 2.5\\nsteps_bucket{le="1"} 3\\nsteps_count 7 123\\n'
        self.send_response(200 if self.path in ("/ready", "/metrics") else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_is_waited_for_asked_paused_and_ended(tmp_path: Path) -> None:
    port = free_port()
    with running([sys.executable, "-c", PROGRAM, str(port)], port, tmp_path / "log", {}) as server:
        assert server.counted() == {"steps_sum": 2.5, "steps_count": 7.0}
        with pytest.raises(OSError, match="status 404"):
            get(server.target, "/nowhere")
        server.pause()
        with pytest.raises(OSError, match="timed out"):
            get(server.target, "/ready", timeout=0.2)
        server.go_on()
        assert get(server.target, "/ready")
        server.pause()
        began = time.monotonic()
    assert server.process.returncode is not None
    assert time.monotonic() - began < 5


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "model"
    formats.save(path, weights_of(model_of(SHAPE)))
    return path


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Limits that are measured in no time, and are accordingly wrong."""
    monkeypatch.setattr(figures, "SECONDS", 0.002)
    monkeypatch.setattr(measure, "BUFFER", {"cpu": 1 << 22})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("_short")
def test_a_server_under_load_and_a_row_for_every_load(directory: Path) -> None:
    pytest.importorskip("fastapi")
    said: list[str] = []
    arguments = ["clients=[1, 4]", "rates=[50.0]", "requests=8", "repeats=2", "prompt=[2, 40]", "new=[2, 9]",
                 "dtype=float32", "threads=1", "engine.max_running=16"]  # fmt: skip
    results = bench("serve", [str(directory), *arguments], None, said.append, silent)["results"]
    assert [line.split()[0] for line in said[-4:]] == ["load", "1", "4", "50/s"]
    assert said[-4].split()[1:] == list(HEADINGS)
    assert [(r["settings"]["clients"], r["settings"]["rates"]) for r in results] == [
        ([1], []),
        ([4], []),
        ([], [50.0]),
    ]
    for result in results:
        details = result["details"]
        assert (result["what"], result["unit"]) == ("serve", "tokens/s")
        assert result["ratio"] == pytest.approx(result["value"] / result["limit"])
        assert details["requests"] == 16
        assert 0 < details["outside_the_engine"] < 1
        first, following = details["seconds_to_first_text"], details["seconds_per_next_token"]
        assert 0 < first["50"] <= first["95"] <= first["99"]
        # So small a model writes an answer in the time that a client takes to look.
        assert 0 <= following["50"] <= following["95"] <= following["99"]
        parse(ServeBenchSettings, json.loads(json.dumps(result["settings"])))
        assert parse(EngineSettings, result["settings"]["engine"]).max_running == 16
    one, four, arriving = (result["details"] for result in results)
    assert one["mean_batch"] == pytest.approx(1)
    assert 2 < four["mean_batch"] <= 4
    assert one["added_to_the_engine_alone"] > -0.5  # so small a model is as fast as chance has it
    assert arriving["added_to_the_engine_alone"] is None


@pytest.mark.slow
@pytest.mark.usefixtures("_short")
def test_a_quantized_server_and_the_engine_alone_have_the_same_model(directory: Path) -> None:
    pytest.importorskip("fastapi")
    said: list[str] = []
    arguments = ["clients=[2]", "requests=4", "repeats=1", "prompt=[2, 9]", "new=[2, 5]", "dtype=bfloat16",
                 "threads=1", "quantize=int8"]  # fmt: skip
    (result,) = bench("serve", [str(directory), *arguments], None, said.append, silent)["results"]
    assert "bits per weight read, computing in bfloat16" in said[0]
    assert result["details"]["bits_per_weight"] < 16
    assert result["details"]["requests"] == 4
    again = parse(ServeBenchSettings, json.loads(json.dumps(result["settings"])))
    assert again.quantize is not None and again.quantize.scheme == "int8"
