"""Mixed load on a server process for minutes or hours: nothing leaks, nothing gets stuck, figures add up.

By hand, on any model:  python -m tests.serve.soak MODEL --minutes 60
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.processes import Process, served

CLIENTS = 16
PATIENCE = 90.0  # seconds after which a request is stuck
SAMPLE_SECONDS = 2.0
GROWTH = 1.05, 24 << 20  # that memory may have after the warm-up: a factor, or bytes
QUIET_SECONDS = 20.0
STATUSES = frozenset({200, 429})
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
BAD: tuple[tuple[str, bytes, int], ...] = (
    ("/v1/completions", b"{", 400),
    ("/v1/completions", b'{"prompt": "a", "temperature": "hot"}', 400),
    ("/v1/completions", b'{"prompt": "a", "nonsense": 1}', 400),
    ("/v1/completions", b'{"prompt": [99999999]}', 400),
    ("/v1/chat/completions", b'{"messages": []}', 400),
    ("/v1/chat/completions", b'{"messages": [{"role": "pirate", "content": "a"}]}', 400),
    ("/v1/chat/completions", b"[" * 100_000, 400),
    ("/v1/completions", b'{"prompt": "a", "model": "another"}', 404),
    ("/v1/nothing", b"{}", 404),
    ("/health", b"{}", 405),
    ("/v1/completions", b" " * (9 << 20), 413),
)


@dataclass
class Load:
    """What is asked for, and what is seen of the server."""

    process: Process
    client: httpx2.AsyncClient
    random: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)

    def body(self, **more: Any) -> dict[str, Any]:
        """A request for a completion, unlike the one before."""
        prompt: Any = "def " + "".join(
            self.random.choices("abcdefgh (),.\n", k=self.random.randrange(1, 120))
        )
        if self.random.random() < 0.3:
            prompt = [self.random.randrange(3, 200) for _ in range(self.random.randrange(1, 200))]
        chosen = {
            "prompt": prompt,
            "max_tokens": self.random.choice((1, 8, 32, 100)),
            "temperature": self.random.choice((0, 0.7, 1.3)),
            "n": self.random.choice((1, 1, 1, 3)),
            "logprobs": self.random.choice((None, None, 3)),
            "stop": self.random.choice((None, ["\n\n"])),
        }
        return chosen | more

    def expect(self, what: str, answer: httpx2.Response, statuses: frozenset[int] = STATUSES) -> None:
        """Count an answer, and note one that must not be."""
        self.counts[f"{what} {answer.status_code}"] += 1
        if answer.status_code not in statuses:
            self.faults.append(f"{what}: {answer.status_code} {answer.text[:200]}")


async def whole(load: Load) -> None:
    """An answer in one piece."""
    load.expect("whole", await load.client.post("/v1/completions", json=load.body()))


async def conversation(load: Load) -> None:
    """A chat."""
    messages = [{"role": "user", "content": "What is " + "x" * load.random.randrange(80)}]
    answer = await load.client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 20})
    load.expect("chat", answer)


async def constrained(load: Load) -> None:
    """Valid JSON, whenever it says that it is whole."""
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 60, "response_format": shape}
    answer = await load.client.post("/v1/chat/completions", json=body)
    load.expect("constrained", answer)
    if answer.status_code == 200:
        choice = answer.json()["choices"][0]
        if choice["finish_reason"] == "stop":
            json.loads(choice["message"]["content"])


async def streamed(load: Load, stop_after: int | None = None, pause: float = 0.0) -> None:
    """A stream, perhaps left in the middle, or read slowly."""
    body = load.body(stream=True, max_tokens=100, ignore_eos=True)
    async with load.client.stream("POST", "/v1/completions", json=body) as answer:
        load.counts[f"stream {answer.status_code}"] += 1
        lines = 0
        last = ""
        async for line in answer.aiter_lines():
            lines += bool(line)
            last = line or last
            if stop_after is not None and lines >= stop_after:
                load.counts["left"] += 1
                return
            await asyncio.sleep(pause)
    if answer.status_code == 200 and last != "data: [DONE]":
        load.faults.append(f"a stream ended with {last[:200]!r}")


async def left(load: Load) -> None:
    """A client that goes away."""
    await streamed(load, stop_after=load.random.randrange(1, 20))


async def slow(load: Load) -> None:
    """A client that takes its time."""
    await streamed(load, pause=0.02)


async def impatient(load: Load) -> None:
    """A client that goes away while it waits for an answer in one piece."""
    with suppress(httpx2.TimeoutException):
        body = load.body(max_tokens=200, ignore_eos=True, n=3)
        await load.client.post("/v1/completions", json=body, timeout=load.random.uniform(0.01, 0.3))
    load.counts["impatient"] += 1


async def bad(load: Load) -> None:
    """A request at fault."""
    path, content, status = load.random.choice(BAD)
    answer = await load.client.post(path, content=content, headers={"content-type": "application/json"})
    load.expect("bad", answer, frozenset({status}))


async def torn(load: Load) -> None:
    """A connection that breaks in the middle of a request, or says nothing, or nothing sensible."""
    url = urlsplit(load.process.url)
    heads = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b'Content-Length: 100\r\n\r\n{"prompt"',
        b"\x16\x03\x01",
        b"",
    )
    _, writer = await asyncio.open_connection(url.hostname, url.port)
    writer.write(load.random.choice(heads))
    await asyncio.sleep(load.random.uniform(0, 0.2))
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    load.counts["torn"] += 1


async def looked(load: Load) -> None:
    """What else there is."""
    path = load.random.choice(("/", "/health", "/ready", "/status", "/v1/models", "/openapi.json"))
    load.expect("looked", await load.client.get(path), frozenset({200}))


async def burst(load: Load) -> None:
    """Many at once."""
    await asyncio.gather(*(whole(load) for _ in range(load.random.choice((10, 40)))))


WORK: tuple[tuple[Callable[[Load], Awaitable[None]], int], ...] = (
    (whole, 20),
    (conversation, 10),
    (constrained, 5),
    (streamed, 20),
    (left, 15),
    (slow, 5),
    (impatient, 8),
    (bad, 10),
    (torn, 5),
    (looked, 5),
    (burst, 1),
)


async def client(load: Load, until: float) -> None:
    """One client that asks again and again."""
    works, weights = zip(*WORK, strict=True)
    while time.monotonic() < until:
        (work,) = load.random.choices(works, weights)
        try:
            async with asyncio.timeout(PATIENCE):
                await work(load)
        except TimeoutError:
            load.faults.append(f"{work.__name__}: stuck for {PATIENCE:g} seconds")
        except Exception as error:
            load.faults.append(f"{work.__name__}: {type(error).__name__}: {error}")


async def watch(load: Load, until: float) -> None:
    """Memory, and counters that never fall."""
    while time.monotonic() < until:
        load.memory.append((time.monotonic(), load.process.memory()))
        await figures(load)
        await asyncio.sleep(SAMPLE_SECONDS)


async def figures(load: Load) -> dict[str, float]:
    """Every sample of /metrics; counters and histograms are checked."""
    text = (await load.client.get("/metrics")).text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name + json.dumps(sample.labels, sort_keys=True)
            found[name] = sample.value
            falls = family.type in ("counter", "histogram") and sample.value < load.counters.get(name, 0)
            if falls and not sample.name.endswith("_created"):
                load.faults.append(f"{name} fell from {load.counters[name]} to {sample.value}")
    load.counters = found
    return found


async def quiet(load: Load) -> dict[str, float]:
    """The figures when nothing is at work any more."""
    end = time.monotonic() + QUIET_SECONDS
    while True:
        found = await figures(load)
        busy = found["puna_running{}"] + found["puna_waiting{}"] + found["puna_cache_blocks_used{}"]
        if not busy or time.monotonic() > end:
            break
        await asyncio.sleep(0.2)
    if busy:
        load.faults.append(f"after {QUIET_SECONDS:g} quiet seconds something runs or holds blocks: {found}")
    return found


def growth(memory: list[tuple[float, int]]) -> tuple[int, int]:
    """Bytes after the warm-up, which is a third of the time, and at the end: medians over a tenth."""
    values = [held for _, held in memory]
    tenth = max(1, len(values) // 10)
    third = len(values) // 3
    return int(statistics.median(values[third : third + tenth])), int(statistics.median(values[-tenth:]))


async def soak(process: Process, minutes: float, seed: int) -> dict[str, Any]:
    """Load a server for so long; what was seen, `faults` among it."""
    until = time.monotonic() + 60 * minutes
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=CLIENTS)
    async with httpx2.AsyncClient(base_url=process.url, timeout=PATIENCE, limits=limits) as asking:
        load = Load(process, asking, random.Random(seed))
        await asyncio.gather(watch(load, until), *(client(load, until) for _ in range(CLIENTS)))
        found = await quiet(load)
    warm, last = growth(load.memory)
    factor, extra = GROWTH
    if last > max(warm * factor, warm + extra):
        load.faults.append(f"memory grew from {warm:,} to {last:,} bytes")
    steps = found["puna_batch_sequences_count{}"]
    return {
        "seed": seed,
        "minutes": minutes,
        "requests": sum(v for name, v in found.items() if name.startswith("puna_requests_total")),
        "tokens": found['puna_tokens_total{"kind": "completion"}'],
        "mean_batch": found["puna_batch_sequences_sum{}"] / max(steps, 1),
        "cancelled": found["puna_cancelled_total{}"],
        "preemptions": found["puna_preemptions_total{}"],
        "open_files": found["process_open_fds{}"],
        "memory": {"warm": warm, "last": last, "most": max(held for _, held in load.memory)},
        "answers": dict(sorted(load.counts.items())),
        "faults": load.faults,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    chosen = parser.parse_args()
    with served(chosen.model, "max_waiting=64", "log_format=json", "header_seconds=3") as process:
        result = asyncio.run(soak(process, chosen.minutes, chosen.seed))
        fatal = [line for line in process.log if line["event"] == "fault"]
    result["faults"] += [line["message"] for line in fatal]
    print(json.dumps(result, indent=1))
    sys.exit(1 if result["faults"] else 0)


if __name__ == "__main__":
    main()
