"""A request on its way through the engine: what came of it so far, and what is still to be told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from puna.engine.answer import Answer, Track
from puna.engine.completion import Completion, completion
from puna.engine.params import TokenLogprobs
from puna.engine.sequence import FinishReason


@dataclass(frozen=True)
class Delta:
    """What came to one of a job's sequences since the last look.

    `text` is what is certain: behind the tokens where it may yet be cut, or a character is incomplete.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None


class Job:
    """A request on its way through the engine; for the event loop only.

    Times are of `time.monotonic`; None where it did not come so far.
    """

    def __init__(self, answer: Answer, arrived: float) -> None:
        self.answer, self.arrived = answer, arrived
        self.started: float | None = None
        """When the first rows of it began to be computed."""
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.ended: float | None = None
        self.error: BaseException | None = None
        self._news: list[Delta] = []
        self._changed = asyncio.Event()

    async def deltas(self) -> AsyncIterator[Delta]:
        """What comes, in order; where the reader is slow, all that came to a sequence meanwhile is one.

        Raises:
            Exception: what ended the answer, where something did.
        """
        while self.ended is None or self._news:
            if not self._news:
                await self._next()
            news, self._news = self._news, []
            for delta in _merged(news):
                yield delta
        if self.error is not None:
            raise self.error

    async def completion(self) -> Completion:
        """The whole answer, once it is there.

        Raises:
            Exception: what ended the answer, where something did.
        """
        while self.ended is None:
            await self._next()
        if self.error is not None:
            raise self.error
        return completion(self.answer)

    async def _next(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def note(self, news: News) -> None:
        """Take in what the engine's thread reports."""
        self._news += news.deltas
        if self.started is None:
            self.started = news.started
        if any(delta.tokens for delta in news.deltas):
            self.first_token = self.first_token or news.at
            self.last_token = news.at
        if news.ended:
            self.ended, self.error = news.at, news.error
        self._changed.set()


@dataclass(frozen=True)
class News:
    """What a step did to a job."""

    job: Job
    at: float
    deltas: list[Delta]
    started: float | None
    ended: bool
    error: BaseException | None = None


class Watched:
    """A job as the engine's thread sees it, and how much of it has been told."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._given = [(0, 0, 0) for _ in job.answer.tracks]  # pieces, tokens, log-probabilities
        self._ended = [False for _ in job.answer.tracks]
        self._started = False

    def news(self, step_began: float, now: float) -> News | None:
        """What is new since the last time; None where nothing is."""
        answer = self.job.answer
        deltas = [d for i, track in enumerate(answer.tracks) if (d := self._delta(i, track)) is not None]
        starts = not self._started and (
            answer.tracks[0].sequence.computed > 0 or any(delta.tokens for delta in deltas)
        )
        if not (deltas or starts or answer.finished):
            return None
        self._started = self._started or starts
        began = step_began if starts else None
        return News(self.job, now, deltas, began, answer.finished, answer.error)

    def _delta(self, index: int, track: Track) -> Delta | None:
        sequence = track.sequence
        counts = (len(track.pieces), len(sequence.tokens), len(sequence.logprobs))
        reason = None if self._ended[index] else sequence.finish_reason
        if counts == self._given[index] and reason is None:
            return None
        pieces, tokens, logprobs = self._given[index]
        self._given[index], self._ended[index] = counts, reason is not None
        return Delta(
            index,
            "".join(track.pieces[pieces:]),
            tuple(sequence.tokens[tokens:]),
            tuple(sequence.logprobs[logprobs:]),
            reason,
        )


def _merged(news: list[Delta]) -> list[Delta]:
    """One delta for each sequence, in the order in which something first came to it."""
    by_index: dict[int, Delta] = {}
    for delta in news:
        earlier = by_index.get(delta.index)
        by_index[delta.index] = delta if earlier is None else _joined(earlier, delta)
    return list(by_index.values())


def _joined(first: Delta, second: Delta) -> Delta:
    return replace(
        second,
        text=first.text + second.text,
        tokens=first.tokens + second.tokens,
        logprobs=first.logprobs + second.logprobs,
    )
