"""Figures: counted once, in the right place, and equal to what was served."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from puna.engine.llm import LLM
from puna.serve.metrics import Metrics
from puna.serve.recent import KEPT, Rate, Window, percentile
from puna.serve.record import Record
from tests.serve.running import running


def samples(metrics: Metrics) -> dict[str, float]:
    """Every value by its name and labels."""
    return {
        sample.name
        + "".join(f" {name}={value}" for name, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
    }


def job_of(
    arrived: float = 10.0,
    started: float | None = 10.5,
    tokens: tuple[int, ...] = (5,),
    reason: str = "stop",
    **times: Any,
) -> Any:
    tracks = [
        SimpleNamespace(sequence=SimpleNamespace(prompt=(1, 2, 3), tokens=[0] * n, finish_reason=reason))
        for n in tokens
    ]
    known = {"first_token": 11.0, "last_token": 13.0, "ended": 14.0, "error": None}
    return SimpleNamespace(
        answer=SimpleNamespace(tracks=tracks), arrived=arrived, started=started, **{**known, **times}
    )


@pytest.fixture
def metrics(llm: LLM) -> Metrics:
    return Metrics(llm.engine)


def test_a_job_is_measured_from_its_arrival(metrics: Metrics) -> None:
    metrics.ended(job_of(tokens=(5, 3)))
    found = samples(metrics)
    assert found["puna_queue_seconds_sum"] == 0.5
    assert found["puna_first_token_seconds_sum"] == 1.0
    assert found["puna_total_seconds_sum"] == 4.0
    assert found["puna_time_per_token_seconds_sum"] == 0.5  # four steps in two seconds
    assert found["puna_tokens_total kind=prompt"] == 3
    assert found["puna_cancelled_total"] == 0


def test_jobs_without_tokens_have_fewer_times(metrics: Metrics) -> None:
    metrics.ended(job_of(started=None, first_token=None, last_token=None, tokens=(0,), reason="cancelled"))
    metrics.ended(job_of(tokens=(1,), last_token=11.0))
    found = samples(metrics)
    assert found["puna_queue_seconds_count"] == found["puna_first_token_seconds_count"] == 1
    assert found["puna_time_per_token_seconds_count"] == 0
    assert found["puna_cancelled_total"] == 1
    assert found["puna_tokens_total kind=prompt"] == 3


def test_the_mean_running_batch_is_sum_over_count(metrics: Metrics) -> None:
    for sequences in (1, 16, 31):
        metrics.stepped(sequences, 2 * sequences, 0.01)
    found = samples(metrics)
    assert found["puna_batch_sequences_sum"] / found["puna_batch_sequences_count"] == 16
    assert found["puna_batch_sequences_bucket le=16.0"] == 2
    assert found["puna_rows_total"] == 96
    assert found["puna_step_seconds_sum"] == pytest.approx(0.03)


def test_requests_and_errors_are_counted_by_few_labels(metrics: Metrics) -> None:
    for status, route, error in (
        (200, "/v1/completions", None),
        (200, "/v1/completions", "broke off"),
        (404, None, "no such path"),
        (404, None, "no such path"),
        (418, None, "a teapot"),
        (500, "/v1/completions", "KeyError: 'x'"),
        (429, "/v1/completions", "busy"),
        (None, "/v1/completions", None),
    ):
        metrics.finished(Record("r", "GET", f"/{id(error)}", 0.0, route=route, status=status, error=error))
    found = samples(metrics)
    assert found["puna_requests_total route=/v1/completions status=200"] == 2
    assert found["puna_requests_total route=other status=404"] == 2
    assert found["puna_requests_total route=/v1/completions status=gone"] == 1
    kinds = {name.partition("kind=")[2]: n for name, n in found.items() if "errors_total" in name}
    assert kinds == {"broken_answer": 1, "not_found": 2, "bad_request": 1, "fault": 1, "busy": 1}


def test_figures_of_what_was_served(llm: LLM) -> None:
    metrics = Metrics(llm.engine)
    before = llm.engine.times.tokens
    with running(llm, metrics) as server:
        bodies = [{"prompt": [5, 6, n], "max_tokens": 10 + n, "ignore_eos": True} for n in range(4)]
        usages = [server.post("/v1/completions", body).json()["usage"] for body in bodies]
        live = server.get("/status", headers={"accept": "application/json"}).json()
        exposed = server.get("/metrics")
    found = samples(metrics)
    assert exposed.status_code == 200 and "puna_batch_sequences_sum" in exposed.text
    made = sum(usage["completion_tokens"] for usage in usages)
    assert made == 46 == llm.engine.times.tokens - before
    assert found["puna_tokens_total kind=completion"] == made
    assert found["puna_tokens_total kind=prompt"] == 12
    assert found["puna_queue_seconds_count"] == found["puna_total_seconds_count"] == 4
    assert found["puna_running"] == found["puna_waiting"] == found["puna_cache_blocks_used"] == 0
    assert found["puna_cache_blocks"] == llm.engine.load.blocks
    assert live["running"] == 0 and live["cache"]["total"] == llm.engine.load.blocks
    total = live["latency_seconds"]["total"]
    assert 0 < total["p50"] <= total["p95"] <= total["p99"] < 60


def test_the_live_view_has_errors_newest_first_without_what_was_asked(llm: LLM, metrics: Metrics) -> None:
    for number in range(60):
        error = f"expected a number, got 'secret {number}'"
        metrics.finished(Record(f"r{number}", "POST", "/x", 0.0, status=400, error=error, key="ann"))
    state = SimpleNamespace(
        model_id="m",
        names=frozenset({"m"}),
        llm=llm,
        draining=False,
        worker=SimpleNamespace(load=metrics._engine.load, fault=None),
        settings=SimpleNamespace(template=None, max_waiting=1, engine=SimpleNamespace(max_running=2)),
    )
    status = metrics.status(state)  # type: ignore[arg-type]
    errors = status["errors"]
    assert [error["id"] for error in errors[:2]] == ["r59", "r58"] and len(errors) == 50
    assert errors[0]["message"] == "expected a number" and errors[0]["key"] == "ann"
    assert abs(errors[0]["at"] - time.time()) < 60
    assert status["requests"] == {"400": 60}
    assert status["latency_seconds"]["queue"] == {"p50": None, "p95": None, "p99": None}


def test_rates_are_over_whole_seconds() -> None:
    rate = Rate(60)
    rate._began = 0.0
    for second in range(100):
        rate.add(3, second + 0.1)
        rate.add(4, second + 0.9)
    assert rate.over(10, 99.95) == 7.0 == rate.over(60, 99.95)  # the second at hand is not over
    assert rate.over(10, 104.5) == 4.2
    assert rate.over(10, 200.0) == 0.0
    young = Rate(60)
    young._began = 1000.0
    young.add(8, 1000.5)
    assert young.over(60, 1004.0) == 2.0  # since the start, not over a minute that has not been


def test_percentiles_are_values_that_were_there() -> None:
    ordered = [float(n) for n in range(1, 101)]
    assert [percentile(ordered, share) for share in (50, 95, 99, 100)] == [50.0, 95.0, 99.0, 100.0]
    assert percentile([], 50) is None and percentile([7.0], 99) == 7.0
    window = Window()
    for value in range(3 * KEPT):
        window.add(value)
    assert window.percentiles()["p50"] == 2.5 * KEPT - 1


def test_steps_cost_microseconds(metrics: Metrics) -> None:
    began = time.perf_counter()
    for _ in range(2000):
        metrics.stepped(16, 16, 0.01)
    assert (time.perf_counter() - began) / 2000 < 100e-6
