"""Figures of a server at work: for Prometheus since the start, for the live view of the last minutes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from puna import __version__
from puna.engine.engine import Engine
from puna.serve.facts import model_facts
from puna.serve.jobs import Job
from puna.serve.masks import without_values
from puna.serve.recent import Rate, Window
from puna.serve.record import Record
from puna.serve.state import ServerState

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SPANS = (10, 60)  # seconds over which the live view gives rates
ERRORS = 50  # recent ones that it shows
BROKEN = "broken_answer"  # an error after the first byte: the status was sent before
KINDS = {
    400: "bad_request",
    401: "key",
    403: "origin",
    404: "not_found",
    405: "method",
    408: "slow_request",
    413: "large_request",
    415: "content_type",
    429: "busy",
    431: "large_headers",
    503: "unavailable",
    504: "timeout",
}
LATENCIES = {  # as the live view calls them: buckets, and what they are
    "queue": (SECONDS, "From a request's arrival until its first rows were computed."),
    "first_token": (SECONDS, "From a request's arrival to its first token."),
    "time_per_token": (TOKEN_SECONDS, "Between two tokens of an answer, on average over it."),
    "total": (SECONDS, "From a request's arrival to the end of its answer."),
}


class Metrics:
    """An observer of the engine's thread and of the guard.

    Steps are told on the engine's thread, everything else in the event loop.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._began, self._began_at = time.monotonic(), time.time()
        self._tokens = engine.times.tokens
        self._rate = Rate(max(SPANS))
        self._windows = {name: Window() for name in LATENCIES}
        self._errors: deque[dict[str, Any]] = deque(maxlen=ERRORS)
        self._statuses: dict[str, int] = {}
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "puna_requests", "HTTP requests that have ended.", ["route", "status"], registry=registry
        )
        self._kinds = Counter("puna_errors", "Requests that ended in an error.", ["kind"], registry=registry)
        self._gone = Counter("puna_cancelled", "Answers given up before their end.", registry=registry)
        self._counted = Counter(
            "puna_tokens",
            "Tokens of prompts that were answered, and tokens made.",
            ["kind"],
            registry=registry,
        )
        self._rows = Counter("puna_rows", "Rows computed: tokens of prompts and answers.", registry=registry)
        self._batch = Histogram(
            "puna_batch_sequences", "Sequences in a step.", buckets=SEQUENCES, registry=registry
        )
        self._step = Histogram("puna_step_seconds", "Of a step.", buckets=TOKEN_SECONDS, registry=registry)
        self._seconds = {
            name: Histogram(f"puna_{name}_seconds", text, buckets=buckets, registry=registry)
            for name, (buckets, text) in LATENCIES.items()
        }
        for kind in ("prompt", "completion"):  # there from the start, so that rates begin at 0
            self._counted.labels(kind)
        registry.register(_EngineFigures(engine))
        ProcessCollector(registry=registry)

    def stepped(self, sequences: int, rows: int, seconds: float) -> None:
        """A step was computed."""
        made = self._engine.times.tokens - self._tokens
        self._tokens += made
        self._batch.observe(sequences)
        self._step.observe(seconds)
        self._rows.inc(rows)
        self._counted.labels("completion").inc(made)
        self._rate.add(made, time.monotonic())

    def ended(self, job: Job) -> None:
        """A job has ended, well or not."""
        tracks = job.answer.tracks
        if any(track.sequence.finish_reason == "cancelled" for track in tracks):
            self._gone.inc()
        if job.started is not None:
            self._counted.labels("prompt").inc(len(tracks[0].sequence.prompt))
            self._note("queue", job.started - job.arrived)
        if job.first_token is None or job.last_token is None:
            return
        self._note("first_token", job.first_token - job.arrived)
        if job.ended is not None:
            self._note("total", job.ended - job.arrived)
        steps = max(len(track.sequence.tokens) for track in tracks) - 1
        if steps > 0:
            self._note("time_per_token", (job.last_token - job.first_token) / steps)

    def finished(self, record: Record) -> None:
        """An HTTP request has ended."""
        status = "gone" if record.status is None else str(record.status)
        self._requests.labels(record.route or "other", status).inc()
        self._statuses[status] = self._statuses.get(status, 0) + 1
        kind = _kind(record)
        if kind is not None:
            self._kinds.labels(kind).inc()
            self._errors.append(
                {
                    "id": record.id,
                    "at": time.time(),
                    "route": record.route or "other",
                    "status": record.status,
                    "kind": kind,
                    "key": record.key,
                    "message": record.error or "",
                }
            )

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def status(self, state: ServerState) -> dict[str, Any]:
        """What the live view shows.

        Rates are tokens made in a second, by the seconds they are averaged over; latencies are seconds, over
        the last answers; `at` and `since` are seconds since 1970; errors come newest first.
        """
        load, now = state.worker.load, time.monotonic()
        return {
            "model": state.model_id,
            "model_facts": model_facts(state),
            "version": __version__,
            "since": self._began_at,
            "uptime_seconds": now - self._began,
            "draining": state.draining,
            "failed": state.worker.fault is not None,
            "running": load.running,
            "waiting": load.waiting,
            "max_running": state.settings.engine.max_running,
            "max_waiting": state.settings.max_waiting,
            "tokens_per_second": {f"{span}s": self._rate.over(span, now) for span in SPANS},
            "cache": {
                "used": load.blocks_used,
                "total": load.blocks,
                "share": load.blocks_used / load.blocks,
                "preemptions": load.preemptions,
            },
            "latency_seconds": {name: window.percentiles() for name, window in self._windows.items()},
            "requests": dict(sorted(self._statuses.items())),
            "errors": [
                {**error, "message": without_values(error["message"], state.names)}
                for error in reversed(self._errors)
            ],
        }

    def _note(self, name: str, seconds: float) -> None:
        self._seconds[name].observe(seconds)
        self._windows[name].add(seconds)


class _EngineFigures(Collector):
    """What an engine holds, read when somebody asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        load = self._engine.load
        yield GaugeMetricFamily("puna_running", "Sequences being computed.", load.running)
        yield GaugeMetricFamily("puna_waiting", "Sequences that wait.", load.waiting)
        yield GaugeMetricFamily("puna_cache_blocks_used", "Blocks of the cache in use.", load.blocks_used)
        yield GaugeMetricFamily("puna_cache_blocks", "Blocks of the cache.", load.blocks)
        yield CounterMetricFamily(
            "puna_preemptions", "Sequences put back because the cache was full.", load.preemptions
        )


def _kind(record: Record) -> str | None:
    """What sort of error a request ended in; None where it ended well, or its client left."""
    if record.status is None or record.status < 400:
        return BROKEN if record.error is not None else None
    return KINDS.get(record.status, "fault" if record.status >= 500 else "bad_request")
