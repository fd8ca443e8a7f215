"""One load on a server and what came of it; the same requests to the engine alone."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from puna.engine.answer import Answer, Request
from puna.engine.engine import Engine
from puna.engine.params import SamplingParams
from puna.errors import CheckFailed
from puna.recipes.bench.load_generator import (
    Outcome,
    Query,
    Target,
    closed_loop,
    completion,
    drive,
    open_loop,
    poisson_arrivals,
)
from puna.recipes.bench.server_process import ServerProcess

TIMEOUT = 3600.0  # seconds that an answer may take; only a server that hangs takes so long


@dataclass(frozen=True)
class Ask:
    """A prompt, and how many tokens to answer."""

    prompt: tuple[int, ...]
    new: int

    def query(self) -> Query:
        """As a request to a server."""
        return completion(self.prompt, self.new, temperature=0, ignore_eos=True)

    def request(self) -> Request:
        """As a request to an engine."""
        params = SamplingParams(temperature=0.0, max_new_tokens=self.new, ignore_eos=True)
        return Request(self.prompt, params)


@dataclass(frozen=True)
class Load:
    """Clients that wait for their answers, or a rate at which requests come."""

    clients: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        return f"{self.rate:g}/s" if self.clients is None else str(self.clients)


@dataclass(frozen=True)
class Served:
    """A repeat: what clients saw, what the server counted meanwhile, and seconds of the engine alone."""

    outcomes: list[Outcome]
    asks: Sequence[Ask]
    steps: int
    sequences: float
    step_seconds: float
    alone: float | None

    @property
    def seconds(self) -> float:
        """From the first request to the end of the last answer."""
        return max(one.ended for one in self.outcomes) - min(one.sent for one in self.outcomes)

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(one.tokens for one in self.outcomes)

    @property
    def batch(self) -> float:
        """Sequences in a step, on average."""
        return self.sequences / self.steps

    @property
    def busy(self) -> float:
        """Seconds in which a request was under way."""
        busy, until = 0.0, float("-inf")
        for sent, ended in sorted((one.sent, one.ended) for one in self.outcomes):
            busy += max(ended - max(sent, until), 0.0)
            until = max(until, ended)
        return busy


def put(server: ServerProcess, load: Load, asks: Sequence[Ask], seed: str, engine: Engine) -> Served:
    """Put a load on the server, then, where clients wait for their answers, on the engine alone.

    Raises:
        CheckFailed: a request failed, or its answer was not as long as asked.
    """
    before = server.counted()
    outcomes = answered(server.target, [ask.query() for ask in asks], load, seed)
    after = server.counted()
    check(asks, outcomes)

    def counted(name: str) -> float:
        return after[name] - before[name]

    return Served(
        outcomes,
        asks,
        steps=round(counted("puna_batch_sequences_count")),
        sequences=counted("puna_batch_sequences_sum"),
        step_seconds=counted("puna_step_seconds_sum"),
        alone=None if load.clients is None else _beside(engine, asks, load.clients),
    )


def answered(target: Target, queries: Sequence[Query], load: Load, seed: str) -> list[Outcome]:
    """What clients saw of requests that come as the load says; `seed`: of when they arrive."""
    if load.clients is not None:
        return drive(closed_loop(target, queries, load.clients, TIMEOUT))
    assert load.rate is not None
    return drive(open_loop(target, queries, poisson_arrivals(load.rate, len(queries), seed), TIMEOUT))


def check(asks: Sequence[Ask], outcomes: Sequence[Outcome]) -> None:
    """A figure of requests that failed would be one of something else.

    Raises:
        CheckFailed: a request failed, or its answer was not as long as asked.
    """
    for ask, one in zip(asks, outcomes, strict=True):
        if one.error is not None:
            failed = sum(other.error is not None for other in outcomes)
            raise CheckFailed(f"{failed} of {len(asks)} requests failed; the first: {one.error}")
        if one.tokens != ask.new or one.prompt_tokens != len(ask.prompt):
            raise CheckFailed(
                f"{len(ask.prompt)} tokens of a prompt and {ask.new} of its answer were asked for, and the "
                f"server counted {one.prompt_tokens} and {one.tokens}"
            )


def _beside(engine: Engine, asks: Sequence[Ask], clients: int) -> float:
    """On a thread of its own, as in a server: GNU's OpenMP lets threads spin while they wait, for a time that
    is much shorter where a process has more of them than cores; so it has beside those of the main thread.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(alone, engine, asks, clients).result()


def alone(engine: Engine, asks: Sequence[Ask], clients: int) -> float:
    """Seconds that the engine takes where each answer that ends is followed by the next request at once."""
    waiting, at_work = deque(asks), list[Answer]()
    began = time.perf_counter()
    while waiting or at_work:
        while waiting and len(at_work) < clients:
            at_work.append(engine.submit(waiting.popleft().request()))
        engine.step()
        for answer in at_work:
            if answer.error is not None:
                raise answer.error
        at_work = [answer for answer in at_work if not answer.finished]
    return time.perf_counter() - began
