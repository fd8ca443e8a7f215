"""The engine's thread: the same answers, delivered whole; nothing hangs, nothing is left behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from puna.engine.answer import Request
from puna.engine.engine import Engine
from puna.engine.llm import LLM
from puna.engine.params import SamplingParams
from puna.engine.settings import EngineSettings
from puna.errors import InputError
from puna.serve.jobs import Job
from puna.serve.worker import EngineThread, QueueFull, Stopped
from puna.settings import parse

CONTEXT = 96


class Watcher:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, float]] = []
        self.jobs: list[Job] = []

    def stepped(self, sequences: int, rows: int, seconds: float) -> None:
        self.steps.append((sequences, rows, seconds))

    def ended(self, job: Job) -> None:
        self.jobs.append(job)


Make = Callable[..., Engine]


@pytest.fixture
def make(llm: LLM) -> Make:
    def engine(**settings: Any) -> Engine:
        return Engine(
            llm.model, llm.tokenizer, CONTEXT, parse(EngineSettings, {"deterministic": False, **settings})
        )

    return engine


@asynccontextmanager
async def at_work(
    engine: Engine, max_waiting: int = 64, on_fault: Callable[[BaseException], None] | None = None
) -> AsyncIterator[tuple[EngineThread, Watcher]]:
    watcher = Watcher()
    worker = EngineThread(engine, watcher, max_waiting, on_fault)
    worker.start()
    try:
        yield worker, watcher
    finally:
        await asyncio.wait_for(worker.stop(), 20)


def request(prompt: tuple[int, ...] = (5, 6, 7), **params: Any) -> Request:
    return Request(prompt, SamplingParams(**{"temperature": 0.0, "max_new_tokens": 12, **params}))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def run(work: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(work, 60)

    return asyncio.run(bounded())


def hold(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Steps wait until the event is set."""
    gate, step = threading.Event(), engine.step

    def held() -> bool:
        gate.wait()
        return step()

    monkeypatch.setattr(engine, "step", held)
    return gate


def test_answers_are_those_of_generate(make: Make, llm: LLM) -> None:
    prompts = [tuple(range(3 + i, 9 + 2 * i)) for i in range(12)]
    alone = [llm.generate(p, temperature=0.0, max_new_tokens=12, logprobs=2) for p in prompts]

    async def work() -> list[Any]:
        async with at_work(make(max_running=8, deterministic=True)) as (worker, watcher):
            jobs = await worker.submit([request(p, logprobs=2) for p in prompts])
            answers = await asyncio.gather(*(job.completion() for job in jobs))
            await until(lambda: len(watcher.jobs) == len(prompts))
            assert worker.unfinished == 0
            assert worker.load.blocks_used == 0
            assert sum(s for s, _, _ in watcher.steps) / len(watcher.steps) > 4
        return answers

    assert run(work()) == alone


@pytest.mark.parametrize("pause", [0.0, 0.05])
def test_the_deltas_together_are_the_answer(make: Make, pause: float) -> None:
    async def work() -> None:
        async with at_work(make()) as (worker, _):
            (job,) = await worker.submit([request(n=3, temperature=1.0, seed=4, logprobs=1)])
            text, tokens, logprobs, reasons = [""] * 3, [()] * 3, [()] * 3, [[], [], []]  # type: ignore[var-annotated]
            async for delta in job.deltas():
                text[delta.index] += delta.text
                tokens[delta.index] += delta.tokens
                logprobs[delta.index] += delta.logprobs
                reasons[delta.index] += [delta.finish_reason] if delta.finish_reason else []
                await asyncio.sleep(pause)
            whole = await job.completion()
            every = (whole, *whole.alternatives)
            assert text == [one.text for one in every]
            assert tokens == [one.tokens for one in every]
            assert logprobs == [one.logprobs for one in every]
            assert reasons == [[one.finish_reason] for one in every]
            assert len(set(tokens)) > 1
            assert job.arrived <= job.started <= job.first_token <= job.last_token <= job.ended  # type: ignore[operator]

    run(work())


def test_a_cancelled_job_ends_before_the_next_step(make: Make) -> None:
    async def work() -> None:
        async with at_work(make()) as (worker, watcher):
            job, other = await worker.submit([request(max_new_tokens=90), request((9, 8), max_new_tokens=90)])
            await until(lambda: job.first_token is not None)
            worker.cancel(job)
            seen = len(watcher.steps)
            completion = await job.completion()
            assert completion.finish_reason == "cancelled"
            assert 0 < len(completion.tokens) < 90
            assert [s for s, _, _ in watcher.steps[seen + 2 :]] == [1] * len(watcher.steps[seen + 2 :])
            assert (await other.completion()).finish_reason == "length"
            worker.cancel(job)  # harmless
            await until(lambda: worker.load.blocks_used == 0)

    run(work())


def test_a_request_given_up_before_its_first_step_is_never_computed(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    gate = hold(engine, monkeypatch)

    async def work() -> None:
        async with at_work(engine) as (worker, watcher):
            (job,) = await worker.submit([request()])
            worker.cancel(job)
            gate.set()
            assert (await job.completion()).tokens == ()
            assert job.started is None
            assert watcher.jobs == [job]

    run(work())


def test_a_full_queue_refuses_and_says_when_to_come_back(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(max_running=2)
    gate = hold(engine, monkeypatch)

    async def work() -> None:
        async with at_work(engine, max_waiting=3) as (worker, _):
            taken = await worker.submit([request(n=2), request(n=2)])
            with pytest.raises(QueueFull, match="4 answers to make already") as full:
                await worker.submit([request(), request()])
            assert 1 <= full.value.retry_after <= 60
            taken += await worker.submit([request()])
            with pytest.raises(InputError, match="6 answers are asked for at once, and this server makes 5"):
                await worker.submit([request(n=6)])
            gate.set()
            for job in taken:
                await job.completion()
            assert worker.unfinished == 0
            await (await worker.submit([request(n=5)]))[0].completion()

    run(work())


def test_all_or_none_are_taken(make: Make) -> None:
    async def work() -> None:
        async with at_work(make(cache_memory=200_000)) as (worker, _):
            impossible = request(regex="(?=a)b")
            with pytest.raises(InputError):
                await worker.submit([request(), impossible])
            assert worker.unfinished == 0
            assert worker.load.running + worker.load.waiting == 0

    run(work())


def test_what_never_fits_is_refused_at_once(make: Make) -> None:
    async def work() -> None:
        engine = make(max_running=1, cache_memory=30_000)  # one block
        async with at_work(engine) as (worker, _):
            with pytest.raises(InputError, match="positions, and this sequence may need"):
                await worker.submit([request(tuple(range(3, 93)), max_new_tokens=6)])
            assert worker.unfinished == 0

    run(work())


def test_an_error_in_a_step_ends_the_jobs_concerned_and_no_other(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()

    async def work() -> None:
        async with at_work(engine) as (worker, watcher):
            with monkeypatch.context() as patched:
                patched.setattr(engine, "_hidden", _raise)
                (job,) = await worker.submit([request()])
                with pytest.raises(ArithmeticError, match="a fault"):
                    await job.completion()
            assert worker.fault is None
            assert worker.failures == 1
            assert len((await (await worker.submit([request()]))[0].completion()).tokens) == 12
            assert worker.failures == 0
            await until(lambda: len(watcher.jobs) == 2)

    run(work())


def test_a_thread_that_dies_says_so_to_everyone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, told = make(), []

    async def work() -> None:
        async with at_work(engine, on_fault=told.append) as (worker, watcher):
            gate = hold(engine, monkeypatch)
            jobs = await worker.submit([request(max_new_tokens=90), request((9, 8))])
            monkeypatch.setattr(engine, "step", _raise)
            gate.set()
            for job in jobs:
                with pytest.raises(Stopped, match="the engine has failed: ArithmeticError: a fault"):
                    await job.completion()
            assert isinstance(worker.fault, ArithmeticError)
            assert told == [worker.fault]
            assert worker.unfinished == 0
            assert set(watcher.jobs) == set(jobs)
            with pytest.raises(Stopped, match="has failed"):
                await worker.submit([request()])

    run(work())


def test_stopping_ends_what_is_unfinished(make: Make) -> None:
    async def work() -> None:
        async with at_work(make()) as (worker, watcher):
            jobs = await worker.submit([request(max_new_tokens=90), request((9, 8), max_new_tokens=90)])
            await until(lambda: jobs[0].first_token is not None)
            await worker.stop()
            for job in jobs:
                with pytest.raises(Stopped, match="the server is stopping"):
                    async for _ in job.deltas():
                        pass
            assert len(watcher.jobs) == 2
            with pytest.raises(Stopped):
                await worker.submit([request()])

    run(work())


def test_a_step_that_hangs_leaves_nobody_waiting(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    gate = hold(engine, monkeypatch)

    async def work() -> None:
        async with at_work(engine) as (worker, _):
            (job,) = await worker.submit([request()])
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(worker.stop(), 0.05)
            with pytest.raises(Stopped, match="the server is stopping"):
                await job.completion()
            gate.set()

    run(work())


def test_a_fault_in_telling_what_a_step_did_ends_every_job(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[BaseException] = []

    async def work() -> None:
        async with at_work(make(), on_fault=told.append) as (worker, watcher):
            ended = watcher.ended

            def failing(job: Job) -> None:
                ended(job)
                raise ArithmeticError("a fault")

            monkeypatch.setattr(watcher, "ended", failing)
            jobs = await worker.submit([request(max_new_tokens=length) for length in (4, 80, 80)])
            assert len((await jobs[0].completion()).tokens) == 4
            for job in jobs[1:]:
                with pytest.raises(Stopped, match="a fault"):
                    await job.completion()
            assert told == [worker.fault]
            assert worker.unfinished == 0
            assert set(watcher.jobs) == set(jobs)

    run(work())


def test_a_large_schema_holds_up_nobody(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    gate, prepare = threading.Event(), engine.prepare

    def slow(asked: Request) -> Any:
        if asked.params.constrained:
            gate.wait()
        return prepare(asked)

    monkeypatch.setattr(engine, "prepare", slow)

    async def work() -> None:
        async with at_work(engine) as (worker, _):
            bound = asyncio.create_task(worker.submit([request(choice=["yes", "no"])]))
            await asyncio.sleep(0.02)
            assert len((await (await worker.submit([request()]))[0].completion()).tokens) == 12
            assert not bound.done()
            gate.set()
            assert (await (await bound)[0].completion()).text in ("yes", "no")

    run(work())


def test_the_event_loop_never_waits_for_a_step(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    begun, gate, step = threading.Event(), threading.Event(), engine.step

    def held() -> bool:
        begun.set()
        gate.wait(30)  # when the loop waits too, the time limit below ends it
        return step()

    monkeypatch.setattr(engine, "step", held)

    async def work() -> None:
        async with at_work(engine) as (worker, _):
            try:
                jobs = await worker.submit([request(max_new_tokens=4)])
                await until(begun.is_set)
                async with asyncio.timeout(20):
                    for _ in range(20):  # all of them during one step
                        jobs += await worker.submit([request(max_new_tokens=1)])
            finally:
                gate.set()
            lengths = [len((await job.completion()).tokens) for job in jobs]
            assert lengths == [4, *[1] * 20]

    run(work())


def _raise(*_: Any) -> Any:
    raise ArithmeticError("a fault")
