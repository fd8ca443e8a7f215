"""The engine at work on a thread of its own: requests come from the event loop, pieces of answers go back."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol

from puna.engine.answer import Answer, Request
from puna.engine.engine import Engine
from puna.engine.figures import Load
from puna.errors import InputError, PunaError, ResourceError
from puna.progress import counted
from puna.serve.jobs import Job, News, Watched

PATIENCE = (1, 60)  # seconds that a client is told to wait where the queue is full, at least and at most
LOOK = 0.005  # seconds between two looks at whether the last step is over
NEWEST = 0.1  # weight of the newest answer in the average of how long answers take


class QueueFull(PunaError):
    """Too many answers wait already."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        """`retry_after`: seconds after which there may be room."""
        super().__init__(
            f"the server has {counted(waiting, 'answer')} to make already; "
            f"try again in {counted(retry_after, 'second')}"
        )
        self.retry_after = retry_after


class Stopped(PunaError):
    """The server is stopping, or its engine has failed: nothing more is answered."""


class Observer(Protocol):
    """Who wants to know how the work goes."""

    def stepped(self, sequences: int, rows: int, seconds: float) -> None:
        """A step of so many sequences and rows has been computed. Called on the engine's thread."""

    def ended(self, job: Job) -> None:
        """A job has ended, well or not. Called in the event loop, once for each job."""


class EngineThread:
    """Steps an engine while there is something to do; between steps it takes requests on and gives them up.

    A step never waits for the event loop, and the event loop never for a step.
    """

    def __init__(
        self,
        engine: Engine,
        observer: Observer,
        max_waiting: int,
        on_fault: Callable[[BaseException], None] | None = None,
    ) -> None:
        """`max_waiting` answers may wait beside those that run.

        `on_fault` is called in the event loop where the thread itself fails; then nothing is answered any
        more. (What goes wrong in a step ends the answers concerned, and the thread goes on.)
        """
        self.fault: BaseException | None = None
        """What the thread died of."""
        self.unfinished = 0
        """Answers that run, wait, or are being prepared."""
        self.failures = 0
        """Answers that ended in a fault of ours since the last one that did not."""
        self._engine, self._observer, self._on_fault = engine, observer, on_fault
        self._most = engine.settings.max_running + max_waiting
        self._seconds = float(PATIENCE[0])  # that an answer takes, on average
        self._jobs: dict[Answer, Job] = {}
        # Constraints may take a second to compile; those who ask for none do not wait for them.
        self._preparing = {bound: ThreadPoolExecutor(1, "puna-prepare") for bound in (False, True)}
        self._orders: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._closing = False
        self._watched: dict[Answer, Watched] = {}
        self._began = 0.0
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._run, name="puna-engine", daemon=True)

    def start(self) -> None:
        """Begin to work; call it in the event loop that the jobs are used in."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Give up what is unfinished, with `Stopped` as its error, and end the thread."""
        self._closing = True
        self._order(lambda: None)
        try:
            while self._thread.is_alive():
                await asyncio.sleep(LOOK)
        finally:  # a step may hang: whoever gives up waiting for it leaves nobody else to wait
            self._end_all(Stopped("the server is stopping"))
            for pool in self._preparing.values():
                pool.shutdown(wait=False, cancel_futures=True)

    async def submit(self, requests: Sequence[Request]) -> list[Job]:
        """Take requests on, all or none.

        Raises:
            InputError: a constraint cannot be satisfied, an answer as long as it may get does not fit into
                the cache, or more answers are asked for than may wait.
            QueueFull: too many answers wait already.
            Stopped: the server is stopping, or its engine has failed.
        """
        arrived = time.monotonic()
        self._check_open()
        count = sum(request.params.answers for request in requests)
        self._check_room(count)
        self.unfinished += count
        try:
            answers = [await self._prepared(request) for request in requests]
            self._check_open()
        except BaseException:
            self.unfinished -= count
            raise
        jobs = tuple(Job(answer, arrived) for answer in answers)
        self._jobs |= {job.answer: job for job in jobs}
        self._order(lambda: self._admit(jobs))
        return list(jobs)

    def cancel(self, job: Job) -> None:
        """Give a job up before the next step; one that has ended stays as it is."""
        if job.ended is None:
            self._order(lambda: self._engine.cancel(job.answer))

    @property
    def load(self) -> Load:
        """What runs and waits, and how full the cache is."""
        return self._engine.load

    @property
    def stepping_for(self) -> float:
        """Seconds that the step at hand has taken so far; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    # In the event loop.

    def _check_open(self) -> None:
        if self.fault is not None:
            raise Stopped(f"the engine has failed: {self.fault}")
        if self._closing:
            raise Stopped("the server is stopping")

    def _check_room(self, count: int) -> None:
        if count > self._most:
            raise InputError(
                f"{count:,} answers are asked for at once, and this server makes {self._most:,} at most; "
                "ask for fewer prompts, or a smaller n or best_of"
            )
        if self.unfinished + count > self._most:
            rounds = self.unfinished / self._engine.settings.max_running
            least, most = PATIENCE
            raise QueueFull(self.unfinished, min(max(math.ceil(rounds * self._seconds), least), most))

    async def _prepared(self, request: Request) -> Answer:
        pool = self._preparing[request.params.constrained]
        try:
            return await self._loop.run_in_executor(pool, self._engine.prepare, request)
        except ResourceError as error:  # it would not fit alone either
            raise InputError(str(error)) from None

    def _take(self, news: Iterable[News]) -> None:
        """What a step did, to those who wait for it.

        A fault here would leave jobs that nobody reports of any more; so it ends them all.
        """
        try:
            for item in news:
                if item.job.ended is None:
                    item.job.note(item)
                    if item.ended:
                        self._ended(item.job)
        except Exception as error:
            self._failed(error)

    def _ended(self, job: Job) -> None:
        del self._jobs[job.answer]
        self.unfinished -= job.answer.request.params.answers
        if job.error is None and job.started is not None and job.ended is not None:
            self._seconds += NEWEST * (job.ended - job.started - self._seconds)
        if job.error is None:
            self.failures = 0
        elif not isinstance(job.error, PunaError):
            self.failures += 1
        self._observer.ended(job)

    def _end_all(self, error: PunaError) -> None:
        now = time.monotonic()
        jobs, self._jobs = list(self._jobs.values()), {}
        self.unfinished -= sum(job.answer.request.params.answers for job in jobs)
        for job in jobs:
            with suppress(Exception):  # what is wrong with one must not keep the others from being told
                job.note(News(job, now, [], None, True, error))
                self._observer.ended(job)

    def _failed(self, error: BaseException) -> None:
        self.fault, self._closing = error, True
        self._order(lambda: None)  # the thread ends, where it has not
        self._end_all(Stopped(f"the engine has failed: {type(error).__name__}: {error}"))
        if self._on_fault is not None:
            self._on_fault(error)

    def _order(self, order: Callable[[], None]) -> None:
        with self._wake:
            self._orders.append(order)
            self._wake.notify()

    # On the engine's thread.

    def _run(self) -> None:
        try:
            while not self._closing:
                self._carry_out()
                worked = self._step()
                self._report()
                if not worked:
                    self._rest()
        except BaseException as error:
            self._loop.call_soon_threadsafe(self._failed, error)

    def _carry_out(self) -> None:
        with self._wake:
            orders, self._orders = self._orders, []
        for order in orders:
            order()

    def _step(self) -> bool:
        times = self._engine.times
        sequences, rows = times.sequences, times.rows
        began = self._step_began = time.monotonic()
        worked = self._engine.step()
        self._step_began, self._began = None, began
        if worked:
            seconds = time.monotonic() - began
            self._observer.stepped(times.sequences - sequences, times.rows - rows, seconds)
        return worked

    def _report(self) -> None:
        now = time.monotonic()
        news = [n for watched in self._watched.values() if (n := watched.news(self._began, now)) is not None]
        if not news:
            return
        for item in news:
            if item.ended:
                del self._watched[item.job.answer]
        self._loop.call_soon_threadsafe(self._take, news)

    def _rest(self) -> None:
        with self._wake:
            while not self._orders:
                self._wake.wait()

    def _admit(self, jobs: tuple[Job, ...]) -> None:
        for job in jobs:
            self._engine.admit(job.answer)
            self._watched[job.answer] = Watched(job)
